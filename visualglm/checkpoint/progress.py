"""How far a long reading or writing of files has come, over several threads, and how to stop them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from threading import Lock
from typing import TypeVar

from visualglm.checkpoint.tensors import Piece, Tensor, tensor_bytes

Report = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all, from any thread but never from two at once."""

T = TypeVar("T")
TensorT = TypeVar("TensorT", bound=Tensor)

# Hashing sets the pace (0.3 GB/s a core without SHA instructions), so that files are handled side by side.
THREADS = 4


def each_reported(tensors: Mapping[str, TensorT], report: Report | None) -> Iterator[tuple[str, TensorT]]:
    """Names and tensors, to be dealt with one by one; how far that has come is reported."""
    progress = ByteProgress(sum(map(tensor_bytes, tensors.values())), report)
    for name, tensor in tensors.items():
        yield name, tensor
        progress.add(tensor_bytes(tensor))


class _StoppedError(Exception):
    """Ends a thread whose work is no longer wanted, because another one failed."""


class ByteProgress:
    """Counts bytes towards `total` and reports them."""

    def __init__(self, total: int, report: Report | None = None) -> None:
        self._total = total
        self._report = report
        self._done = 0
        self._lock = Lock()
        self._stopped = False

    def track(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Pass `pieces` through, counting each when it has been dealt with."""
        for piece in pieces:
            yield piece
            self.add(len(piece))

    def run(self, tasks: Iterable[Callable[[], T]]) -> list[T]:
        """Results of `tasks`, which run in threads; the first failure, or Ctrl-C, stops the others."""
        with ThreadPoolExecutor(THREADS) as pool:
            futures = [pool.submit(task) for task in tasks]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                return [future.result() for future in futures]
            except BaseException:
                self._stopped = True
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def add(self, count: int) -> None:
        """So many bytes more have been dealt with."""
        with self._lock:
            if self._stopped:
                raise _StoppedError
            self._done += count
            if self._report:
                # Headers and small files are not in the total.
                self._report(min(self._done, self._total), self._total)
