"""Rows in batches, what they need made ready by threads while the batches before are worked on."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

from visualglm.signals import keep_signals_away

Row = TypeVar("Row")
Prepared = TypeVar("Prepared")

_THREADS = min(4, os.cpu_count() or 1)
# Enough to hide a slow image behind the model, few enough for any memory.
_BATCHES_AHEAD = 2


@contextmanager
def prepared_batches(
    rows: Iterable[Row], prepare: Callable[[Row], Prepared], batch_size: int, start: int = 0
) -> Iterator[Iterator[list[tuple[Row, Prepared]]]]:
    """The rows from the one at `start` on, a batch at a time, each with what `prepare` makes of it in a thread.

    Batches end at multiples of `batch_size`, wherever they start: they are then those of a run from the beginning.
    """
    pool = ThreadPoolExecutor(_THREADS, initializer=keep_signals_away)
    try:
        yield _in_order(pool, prepare, _batches(rows, batch_size, start))
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ThreadPoolExecutor, prepare: Callable[[Row], Prepared], batches: Iterable[list[Row]]
) -> Iterator[list[tuple[Row, Prepared]]]:
    under_way: deque[list[tuple[Row, Future[Prepared]]]] = deque()
    for batch in batches:
        under_way.append([(row, pool.submit(prepare, row)) for row in batch])
        if len(under_way) > _BATCHES_AHEAD:
            yield [(row, future.result()) for row, future in under_way.popleft()]
    for waiting in under_way:
        yield [(row, future.result()) for row, future in waiting]


def _batches(rows: Iterable[Row], batch_size: int, start: int) -> Iterator[list[Row]]:
    rest = islice(rows, start, None)
    size = batch_size - start % batch_size
    while batch := list(islice(rest, size)):
        yield batch
        size = batch_size
