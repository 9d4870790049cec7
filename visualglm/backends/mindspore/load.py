"""Loads a model directory onto a device: what is asked for, what is there, and whether it fits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore.nn.utils import no_init_parameters

from visualglm.backends.mindspore.backend import MindSporeBackend
from visualglm.backends.mindspore.joined import VisualGLMModel
from visualglm.checkpoint.model_dir import ModelDirectory
from visualglm.checkpoint.tensors import Tensor as StoredTensor
from visualglm.config import DType, VisualGLMConfig
from visualglm.errors import CheckpointError, DeviceError
from visualglm.memory import available_memory, estimate_memory, require_memory
from visualglm.parameters import parameter_count
from visualglm.signals import held_signals

CPU = "cpu"
_TARGETS = {CPU: "CPU", "ascend": "Ascend"}
_DEVICE = re.compile(r"(auto|cpu|ascend)(?::(\d+))?")
# Below this size exact float32 costs nothing worth saving, and threads cost more than they bring.
_SMALL_MODEL = 100_000_000


@dataclass(frozen=True)
class Device:
    """kind: "cpu" or "ascend"."""

    kind: str
    index: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == CPU else f"{self.kind}:{self.index}"


def load_mindspore_backend(
    directory: ModelDirectory,
    device: str = "auto",
    dtype: str = "auto",
    *,
    compiled: bool = True,
    threads: int | None = None,
) -> MindSporeBackend:
    """The model of `directory` on `device` ("auto", "cpu", "ascend", "ascend:1") in `dtype`.

    compiled: whether it runs as graphs, which are compiled when they are first needed, or operator by operator.
    threads: how many compute on a CPU; None: one for a small model, or else as many as MindSpore takes by itself.
    Raises `DeviceError` if the device is not there or lacks the precision, or the memory is too small.
    """
    target = use_device(device)
    precision = choose_dtype(dtype, directory.config, target)
    if target.kind == CPU:
        require_memory(estimate_memory(directory.config, precision), available_memory(), "this machine")
    if threads is None and parameter_count(directory.config) < _SMALL_MODEL:
        threads = 1
    if threads is not None:
        ms.set_context(runtime_num_threads=threads)
    model = new_model(directory.config, directory.tensors, precision)
    return MindSporeBackend(model, device=str(target), dtype=precision, compiled=compiled)


def find_device(name: str) -> Device:
    """The device of that name; "auto" is the first Ascend processor, "auto:1" the second, and either the CPU where
    there is none. Raises `DeviceError`."""
    found = _DEVICE.fullmatch(name)
    if found is None:
        raise DeviceError(f"The device {name!r} is unknown to the mindspore backend; give auto, cpu or ascend.")
    is_auto, index = found[1] == "auto", int(found[2] or 0)
    kind = found[1] if not is_auto else "ascend" if ms.hal.is_available("Ascend") else CPU
    if kind == CPU and index:
        why = "MindSpore sees no Ascend card, and the CPU is one device" if is_auto else "the CPU is one device"
        raise DeviceError(f"The device {name!r} is not there: {why}; leave the number out.")
    return Device(kind, index)


def use_device(name: str) -> Device:
    """Compute on the device of that name (see `find_device`) in this process, operator by operator where no graph is
    compiled. MindSpore can do so with one device a process. Raises `DeviceError` if it is not there.
    """
    device = find_device(name)
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        with held_signals():
            ms.set_device(_TARGETS[device.kind], device.index)
    except RuntimeError as error:
        if _TARGETS[device.kind] == ms.get_context("device_target") and device.index == ms.get_context("device_id"):
            return device  # it is in use already
        raise DeviceError(
            f"The device {str(device)!r} cannot be used by the installed MindSpore {ms.__version__}; "
            "install the build and the drivers for it, or give --device cpu."
        ) from error
    if device.kind == CPU:
        # An operator handed from thread to thread waits longer than most of them compute here.
        ms.runtime.launch_blocking()
    return device


def choose_dtype(name: str, config: VisualGLMConfig, device: Device) -> DType:
    """The precision of that name; "auto" is float32 for a small model and on a CPU, else that of the weights.

    Raises `DeviceError` if the device lacks it.
    """
    if name == "auto":
        return "float32" if device.kind == CPU or parameter_count(config) < _SMALL_MODEL else config.dtype
    if name == "bfloat16" and device.kind == CPU:
        raise DeviceError("MindSpore has no bfloat16 on a CPU; give float32, or float16, which is slow there.")
    for known in get_args(DType):
        if name == known:
            return known
    raise DeviceError(f"The mindspore backend has no {name}; give auto, {', '.join(get_args(DType))}.")


def new_model(config: VisualGLMConfig, tensors: Mapping[str, StoredTensor], dtype: DType) -> VisualGLMModel:
    """A model of these weights; those stored in `dtype` are used where they lie (memory maps).

    Raises `CheckpointError` if they are not exactly the parameters of the model.
    """
    with no_init_parameters():
        model = VisualGLMModel(config)
    parameters = dict(model.parameters_and_names())
    if differing := parameters.keys() ^ tensors.keys():
        raise CheckpointError(f"The weights do not fit the model: {', '.join(sorted(differing))} are on one side only.")
    for name, stored in tensors.items():
        with held_signals():
            parameters[name].set_dtype(getattr(ms, dtype))
            parameters[name].set_data(mapped_tensor(stored).astype(getattr(ms, dtype)))
    return model


def mapped_tensor(stored: StoredTensor) -> Tensor:
    """A tensor where it lies on the disk, mapped into memory; writing to it changes no file."""
    array = stored.array()
    # numpy has no bfloat16: the bits come as uint16.
    is_bits = stored.dtype == "bfloat16"
    return Tensor.from_numpy(array.view(np.int16)).view(ms.bfloat16) if is_bits else Tensor.from_numpy(array)
