"""The speed at which memory is read, which bounds the speed of decoding."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch

# Many times the caches, and little beside the weights of a model.
_PROBE_BYTES = 1 << 29
# So that one thread that is held up does not hold up all.
_PIECES_PER_THREAD = 4


class Bandwidth(Protocol):
    """Reads a buffer as fast as can be."""

    def measure(self) -> float:
        """Bytes a second, the median of three readings."""
        ...


class CpuReadBandwidth:
    """Main memory, read by so many threads at once."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads)
        # The largest of whole numbers is found as fast as they come, and without the lock of the interpreter.
        self._pieces = np.array_split(np.ones(_PROBE_BYTES // 8, np.int64), _PIECES_PER_THREAD * threads)

    def measure(self) -> float:
        return _bytes_per_second(lambda: list(self._pool.map(np.max, self._pieces)))


class TorchReadBandwidth:
    """The memory of a torch device, read by all of its threads."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._buffer = torch.ones(_PROBE_BYTES // 8, dtype=torch.int64, device=device)

    def measure(self) -> float:
        return _bytes_per_second(lambda: self._buffer.sum().item())


def seconds_of(action: Callable[[], object]) -> float:
    """How long `action` takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _bytes_per_second(read: Callable[[], object]) -> float:
    return _PROBE_BYTES / median(seconds_of(read) for _ in range(3))
