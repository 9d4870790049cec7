"""Rows to train on, in a JSONL file or a JSON list: found by their place in the file, read one by one when asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visualglm.processing.prompt import Turn

Report = Callable[[int, int], None]
"""Called with the rows done and the rows in all."""


@dataclass(frozen=True)
class TrainingRow:
    """Questions and answers about one image, or about none.

    `image` is as the file names it, `source` is where that lies: relative to the folder of the file.
    """

    image: str | None
    source: Path | None
    turns: tuple[Turn, ...]


class RowIndex:
    """Where each row of a file lies. Small (24 bytes a row), and the same in every process that it is sent to.

    sha256: of the whole file, so that a resumed run can tell whether it is still the same.
    """

    path: Path
    sha256: str

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, number: int) -> TrainingRow:
        """Read a row; raises `DataError` naming its line if it is malformed."""
        raise NotImplementedError

    def where(self, number: int) -> str:
        """ "FILE, line N" of a row, for messages."""
        raise NotImplementedError


def open_rows(path: Path) -> RowIndex:
    """Find the rows of a file; raises `DataError` if it cannot be read, has none, or is a JSON list cut short."""
    raise NotImplementedError


def check_rows(
    index: RowIndex, inspect: Callable[[int, TrainingRow], None] | None = None, *, report: Report | None = None
) -> None:
    """Read every row and every image; raises one `DataError` with the first ten bad rows by line, and their number.

    inspect: called in order with the number of each row and the row, also to raise `DataError` for it.
    """
    raise NotImplementedError


def split_rows(count: int, held_out: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of the rows to train on and of those held out for validation, each in rising order."""
    raise NotImplementedError
