"""How much memory a model takes, told before it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Literal

import psutil

from visualglm.config import DType, TextConfig, VisualGLMConfig
from visualglm.errors import DeviceError
from visualglm.parameters import parameter_count

BYTES_PER_ELEMENT: dict[DType, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
CacheType = Literal["float32", "float16", "int8"]
"""How the ONNX export of a model keeps keys and values."""
_CACHE_BYTES: dict[CacheType, int] = {"float32": 4, "float16": 2, "int8": 1}
# Activations of one prompt, and the libraries themselves.
_WORKING_BYTES = 600 * 2**20
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes a loaded model takes: its weights, the KV cache of one full window, and what it works with."""

    weights: int
    kv_cache: int
    working: int = _WORKING_BYTES

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.working

    def fits(self, available: int) -> bool:
        return self.total <= available

    def beside(self, available: int) -> str:
        """In words, with what there is."""
        return f"takes {self}; {'fits' if self.fits(available) else 'does not fit'}: {gib(available)} are free"

    def __str__(self) -> str:
        return f"{gib(self.total)} (weights {gib(self.weights)}, cache {gib(self.kv_cache)}, work {gib(self.working)})"


def estimate_memory(config: VisualGLMConfig, dtype: DType, *, batch_size: int = 1) -> MemoryEstimate:
    """What a model of `config` takes in `dtype` with `batch_size` rows of the whole window."""
    size = BYTES_PER_ELEMENT[dtype]
    kv_cache = _cache_elements(config.text, batch_size) * size
    return MemoryEstimate(parameter_count(config) * size, kv_cache, _working_bytes(config.text))


def estimate_lite_memory(
    config: VisualGLMConfig, weights: int, cache_type: CacheType | None, *, batch_size: int = 1
) -> MemoryEstimate:
    """What the ONNX export of a model takes with `batch_size` rows of the whole window.

    weights: bytes of its graphs and their data. cache_type: None if it has no KV cache.
    """
    kv_cache = _cache_elements(config.text, batch_size) * _CACHE_BYTES[cache_type] if cache_type else 0
    return MemoryEstimate(weights, kv_cache, _working_bytes(config.text))


def _cache_elements(text: TextConfig, batch_size: int) -> int:
    return 2 * text.num_hidden_layers * text.hidden_size * text.max_sequence_length * batch_size


def _working_bytes(text: TextConfig) -> int:
    """The rotary table of a long window counts."""
    return _WORKING_BYTES + text.max_sequence_length * text.head_dim * BYTES_PER_ELEMENT["float32"]


def available_memory() -> int:
    """Bytes of main memory that can be had without swapping; in a container, no more than its limit leaves."""
    return int(min(psutil.virtual_memory().available, container_memory(_CGROUP)))


def container_memory(cgroup: Path) -> float:
    """Bytes that the memory limit of a container leaves, infinity without one."""
    try:
        limit, used = ((cgroup / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        # Files that were read count as used, but are given up first.
        return int(limit) - int(used) + int(statistics["inactive_file"])
    except (OSError, ValueError, KeyError):
        return inf  # no control group of version 2, or its limit is the word "max"


def require_memory(estimate: MemoryEstimate, available: int, where: str) -> None:
    """Raise `DeviceError` if a model's weights and working memory do not fit in what `where` has left."""
    if estimate.weights + estimate.working > available:
        raise DeviceError(
            f"The model takes {estimate}, but {where} has {gib(available)} left; "
            "close other programs, or load it in a smaller precision or on another machine."
        )


def gib(size: int, *, digits: int = 0) -> str:
    """A number of bytes in the unit people read, with so many more digits than they mostly want."""
    if size >= 2**30:
        return f"{size / 2**30:.{digits + 1}f} GiB"
    return f"{size / 2**20:.{digits}f} MiB" if size >= 2**20 else f"{size / 2**10:.{digits}f} KiB"


def gib_apart(needed: int, left: int) -> tuple[str, str]:
    """Two numbers of bytes, of which the second does not suffice, with as many digits as it takes to see that."""
    pairs = ((gib(needed, digits=digits), gib(left, digits=digits)) for digits in range(3))
    return next((pair for pair in pairs if pair[0] != pair[1]), (f"{needed:,} bytes", f"{left:,} bytes"))
