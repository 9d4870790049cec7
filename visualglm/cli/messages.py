"""What commands show: results as tables on stdout; notes and progress on stderr, unless they are to be quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from visualglm.cli.output import harmless, print_note

Report = Callable[[int, int], None]
"""Called with what is done and with what there is in all."""

# What is read by programs is not to be wrapped.
_UNWRAPPED = 10_000
_SECONDS_BETWEEN_LINES = 30.0


class _PerSecond(ProgressColumn):
    def __init__(self, unit: str) -> None:
        self._unit = unit
        super().__init__()

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} {self._unit}/s" if task.speed else "")


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
        return self._progress(title, DownloadColumn(), TransferSpeedColumn())

    def row_progress(self, title: str) -> AbstractContextManager[Report]:
        """Shows how many rows are done, how fast, and how long the rest takes."""
        return self._progress(title, MofNCompleteColumn(), _PerSecond("rows"))

    def step_progress(self, title: str) -> AbstractContextManager[Report]:
        """Shows how many steps are done, how fast, and how long the rest takes."""
        return self._progress(title, MofNCompleteColumn(), _PerSecond("steps"))

    @contextmanager
    def _progress(self, title: str, *columns: ProgressColumn) -> Iterator[Report]:
        console = Console(stderr=True)
        if not console.is_terminal:
            yield self._report_in_lines(title)
            return
        shown = (TextColumn(title), BarColumn(), *columns, TextColumn("left:"), TimeRemainingColumn())
        with Progress(*shown, console=console, disable=self._quiet, transient=True) as progress:
            task = progress.add_task(title, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)

    def _report_in_lines(self, title: str) -> Report:
        """For a log file: a line now and then."""
        told = time.monotonic()

        def report(done: int, total: int) -> None:
            nonlocal told
            if time.monotonic() - told > _SECONDS_BETWEEN_LINES:
                told = time.monotonic()
                self.tell(f"{title}: {done:,} of {total:,}")

        return report


def print_table(rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> None:
    """A table on stdout, each cell shown as it stands."""
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = _UNWRAPPED
    table = Table(*header, box=None, show_header=bool(header), pad_edge=False)
    for row in rows:
        table.add_row(*(harmless(cell, sys.stdout) for cell in row))
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        print(line.rstrip())
