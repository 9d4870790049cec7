"""What commands show: results as tables on stdout; notes and progress on stderr, unless they are to be quiet."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, TextIO

from visualglm.cli.log_lines import LogLines
from visualglm.cli.output import print_note

if TYPE_CHECKING:
    from visualglm.cli.display import Unit

Report = Callable[[int, int], None]
"""Called with what is done and with what there is in all."""
NotedReport = Callable[[int, int, str], None]
"""The same, with a note such as the loss."""


class Messages:
    """The notes of one command."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet

    def tell(self, text: str) -> None:
        """One note, on a line of its own."""
        if not self._quiet:
            print_note(text)

    def byte_progress(self, title: str) -> AbstractContextManager[Report]:
        """Shows how many bytes are done, how fast, and how long the rest takes."""
        return self._progress(title, "bytes")

    def row_progress(self, title: str) -> AbstractContextManager[Report]:
        """Shows how many rows are done, how fast, and how long the rest takes."""
        return self._progress(title, "rows")

    def step_progress(self, title: str) -> AbstractContextManager[Report]:
        """Shows how many steps are done, how fast, and how long the rest takes."""
        return self._progress(title, "steps")

    def noted_progress(self, title: str) -> AbstractContextManager[NotedReport]:
        """Shows the same, and what is told with each step."""
        return self._noted_progress(title, "steps")

    def show_table(self, rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> None:
        """A table among the notes."""
        for line in _table_lines(rows, header, sys.stderr):
            self.tell(line)

    @contextmanager
    def _progress(self, title: str, unit: Unit) -> Iterator[Report]:
        with self._noted_progress(title, unit) as report:
            yield lambda done, total: report(done, total, "")

    def _noted_progress(self, title: str, unit: Unit) -> AbstractContextManager[NotedReport]:
        if self._quiet or not sys.stderr.isatty():
            return nullcontext(LogLines(title, self.tell).report)
        from visualglm.cli.display import progress_bar

        return progress_bar(title, unit)


def print_table(rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> None:
    """A table on stdout, each cell shown as it stands."""
    for line in _table_lines(rows, header, sys.stdout):
        print(line)


def _table_lines(rows: Iterable[Sequence[str]], header: Sequence[str], stream: TextIO) -> list[str]:
    from visualglm.cli.display import table_lines

    return table_lines(rows, header, stream)
