"""Reading ahead in processes, which are torch's."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, TypeVar, cast

import torch
from torch.utils.data import DataLoader, Dataset

from visualglm.errors import DataError
from visualglm.training.launch import die_with

S = TypeVar("S")
R = TypeVar("R")


def read_by_processes(load: Callable[[S], R], things: Iterable[S], workers: int) -> Iterator[R]:
    """`load` of one thing after another, in `workers` processes; in this one if that is 0.

    Raises `DataError` if a worker dies.
    """
    loader = DataLoader(
        cast("Dataset[R]", _Loads(load)),
        batch_size=None,
        sampler=cast("Any", things),
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=partial(_die_with, os.getpid()),
        # Its own: from the global one it would draw a number, and a resumed run would go on with another dropout.
        generator=torch.Generator(),
    )
    with dead_workers_named():
        yield from loader


@contextmanager
def dead_workers_named() -> Iterator[None]:
    """Turns what torch raises, wherever this process is just then, when a worker has died into a `DataError`."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"A process that reads rows has died ({error}), maybe for want of memory; "
            "set data.workers lower, or to 0 for none."
        ) from error


class _Loads(Generic[S, R]):
    """What the loader of torch takes for a data set: its elements are what `load` makes of their "indices"."""

    def __init__(self, load: Callable[[S], R]) -> None:
        self._load = load

    def __getitem__(self, thing: S) -> R:
        return self._load(thing)


def _die_with(parent: int, worker: int) -> None:
    """Workers wait for one another by locks, and those of a process that was killed may wait for ever.

    A SIGTERM for the whole group is that process's matter, which ends them; torch would take their end for an accident.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with(parent)


def _unchanged(loaded: R) -> R:
    return loaded
