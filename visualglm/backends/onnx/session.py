"""Sessions of ONNX Runtime: on which device, with how many threads, and what its errors mean."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import onnxruntime as ort
import psutil
from onnxruntime.capi import onnxruntime_pybind11_state

from visualglm.backends.out_of_memory import OUT_OF_MEMORY
from visualglm.errors import CheckpointError, DeviceError

P = ParamSpec("P")
R = TypeVar("R")

CPU = "cpu"
# The device names of this package, and who serves them in ONNX Runtime.
_PROVIDERS = {CPU: "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "cann": "CANNExecutionProvider"}
_DEVICE = re.compile(r"(cpu|cuda|cann)(?::(\d+))?")
_FATAL_ONLY = 4
# What sessions raise: they have no base class of their own.
_FAILURES: tuple[type[Exception], ...] = (
    MemoryError,
    RuntimeError,
    *(
        kind
        for kind in vars(onnxruntime_pybind11_state).values()
        if isinstance(kind, type) and issubclass(kind, Exception)
    ),
)
# In the words of the runtime what it does not know, and in ours what a graph needs.
_LACKING = (
    (re.compile(r"Opset (\d+) is under development.*support for domain (\S+) is", re.DOTALL), "opset {0} of {1}"),
    (re.compile(r"Unsupported model IR version: (\d+)"), "version {0} of the ONNX format"),
    (re.compile(r"([\w.:]+)\(-?\d+\) is not a registered function/op"), "the operator {0}"),
    (re.compile(r"No Op registered for (\w+)"), "the operator {0}"),
    (re.compile(r"Could not find an implementation for (\w+)"), "a kernel for the operator {0}"),
)
_OWN_SOURCE = "/onnxruntime_src/"
_LONGEST_REASON = 200


class Device:
    """A device by name ("auto", "cpu", "cuda", "cuda:1", "cann"); raises `DeviceError` if it is not there."""

    def __init__(self, name: str) -> None:
        found = _DEVICE.fullmatch(CPU if name == "auto" else name)
        if found is None:
            raise DeviceError(f"The device {name!r} is unknown to the onnx backend; give auto, cpu, cuda or cann.")
        self.kind = found[1]
        self.index = int(found[2] or 0)
        if _PROVIDERS[self.kind] not in ort.get_available_providers():
            raise DeviceError(
                f"The device {name!r} needs {_PROVIDERS[self.kind]}, which the installed onnxruntime {ort.__version__} "
                "does not have; install onnxruntime-gpu (cuda) or onnxruntime-cann in its place, or give --device cpu."
            )

    def __str__(self) -> str:
        return self.kind if self.kind == CPU else f"{self.kind}:{self.index}"

    @property
    def providers(self) -> list[Any]:
        """As a session takes them."""
        return [_PROVIDERS[CPU]] if self.kind == CPU else [(_PROVIDERS[self.kind], {"device_id": self.index})]


def core_count() -> int:
    """Real cores that this process may use: a second thread on a core only gets in the way of the first."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def open_session(path: Path, device: Device, threads: int) -> ort.InferenceSession:
    """The graph at `path`, its weights mapped into memory.

    Raises `CheckpointError` if this onnxruntime cannot run it, `DeviceError` if the memory runs out or the device
    does not work.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # What goes wrong is raised; warnings are about what cannot be changed here.
    options.log_severity_level = _FATAL_ONLY
    try:
        session = ort.InferenceSession(path, options, providers=device.providers)
    except _FAILURES as error:
        raise _explained(error, path) from error
    if session.get_providers()[0] != _PROVIDERS[device.kind]:
        raise DeviceError(f"The device {device} does not work with the installed onnxruntime; give --device cpu.")
    return session


def _explained(error: Exception, path: Path) -> CheckpointError | DeviceError:
    if _is_out_of_memory(error):
        return DeviceError(f"The memory does not suffice for {path}; close other programs, or export it as int4.")
    for pattern, needed in _LACKING:
        found = pattern.search(str(error))
        if found:
            return CheckpointError(
                f"{path} needs {needed.format(*found.groups())}, which the installed onnxruntime {ort.__version__} "
                "lacks; run `pip install --upgrade onnxruntime`, or export the model again."
            )
    return CheckpointError(
        f"The installed onnxruntime {ort.__version__} cannot run {path}{_reason(error)}; export the model again, "
        "or run `pip install --upgrade onnxruntime` if it was made beside a newer one."
    )


def _reason(error: Exception) -> str:
    """What the runtime gives as its reason, in brackets; nothing where that is about its own source."""
    text = str(error).partition("\n")[0]
    reason = text.rpartition(" failed:")[2].rpartition(", Error ")[2].rstrip(". ")
    return "" if not reason or _OWN_SOURCE in text else f" ({reason[:_LONGEST_REASON]})"


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "bad_alloc" in str(error) or "allocate memory" in str(error)


def computes(method: Callable[P, R]) -> Callable[P, R]:
    """What goes wrong in a graph is told in a sentence: `DeviceError` if the memory ran out, else `CheckpointError`."""

    @wraps(method)
    def compute(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        except _FAILURES as error:
            if _is_out_of_memory(error):
                raise DeviceError(OUT_OF_MEMORY) from error
            raise CheckpointError(
                f"The installed onnxruntime {ort.__version__} could not run the export{_reason(error)}; "
                "export the model again."
            ) from error

    return compute
