"""Loads a model directory onto a device: what is asked for, what is there, and whether it fits."""

from __future__ import annotations

import re
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from visualglm.backends.torch.backend import TorchBackend
from visualglm.checkpoint.model_dir import ModelDirectory
from visualglm.checkpoint.tensors import Tensor as StoredTensor
from visualglm.config import DType, VisualGLMConfig
from visualglm.errors import DeviceError
from visualglm.memory import available_memory, estimate_memory, require_memory
from visualglm.parameters import parameter_count

_DEVICE = re.compile(r"cpu|mps|(cuda|npu)(:\d+)?")
# Below this size exact float32 costs nothing worth saving.
_SMALL_MODEL = 100_000_000


def load_torch_backend(directory: ModelDirectory, device: str = "auto", dtype: str = "auto") -> TorchBackend:
    """The model of `directory` on `device` ("auto", "cpu", "cuda", "cuda:1", "mps", "npu") in `dtype`.

    Raises `DeviceError` if the device is not there, the precision unknown, or the memory too small.
    """
    target = choose_device(device)
    precision = choose_dtype(dtype, directory.config, target)
    require_memory(estimate_memory(directory.config, precision), memory_of(target), str(target))
    if precision == "float32" and target.type == "cuda":
        # By default convolutions, unlike matrix products, are rounded to 10 bits there: not what float32 is asked for.
        torch.backends.cudnn.allow_tf32 = False
    tensors = ((name, mapped_tensor(stored)) for name, stored in directory.tensors.items())
    return TorchBackend.from_tensors(directory.config, tensors, device=target, dtype=getattr(torch, precision))


def choose_device(device: str | torch.device) -> torch.device:
    """The device of that name; for "auto" the first CUDA device, or else the CPU."""
    name = str(device)
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if not _DEVICE.fullmatch(name):
        raise DeviceError(f"The device {name!r} is unknown; give auto, cpu, cuda, cuda:1, mps or npu.")
    if name.startswith("npu"):
        _import_npu()
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(
            f"The device {name!r} is not to be had here; this machine has {', '.join(_devices_here())}."
        ) from error
    return found


def choose_dtype(name: str, config: VisualGLMConfig, device: torch.device) -> DType:
    """The precision of that name; "auto" is float32 for a small model, and for others that of the weights.

    On a CPU, which is slow at float16, bfloat16 takes its place.
    """
    if name == "auto":
        if parameter_count(config) < _SMALL_MODEL:
            return "float32"
        return "bfloat16" if device.type == "cpu" and config.dtype == "float16" else config.dtype
    for known in get_args(DType):
        if name == known:
            return known  # type: ignore[no-any-return]
    raise DeviceError(f"The precision {name!r} is unknown; give auto, {', '.join(get_args(DType))}.")


def exact_dtype(device: torch.device) -> torch.dtype:
    """What long sums are taken in: float64 where the device has it."""
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32


def mapped_tensor(stored: StoredTensor) -> Tensor:
    """A tensor where it lies on the disk, mapped into memory; writing to it changes no file."""
    array = stored.array()
    # numpy has no bfloat16: the bits come as uint16.
    is_bits = stored.dtype == "bfloat16"
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if is_bits else torch.from_numpy(array)


def memory_of(device: torch.device) -> int:
    """Bytes that can still be had on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return available_memory()


def _devices_here() -> list[str]:
    cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ["cpu", *cuda, *(["mps"] if torch.backends.mps.is_available() else [])]


def _import_npu() -> None:
    try:
        import torch_npu  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        raise DeviceError("The device npu needs the package torch_npu for Ascend; install it first.") from error
