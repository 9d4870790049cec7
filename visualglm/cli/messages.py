"""What commands show: results as tables on stdout; notes and progress on stderr, unless they are to be quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TextIO

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
NotedReport = Callable[[int, int, str], None]
"""The same, with a note such as the loss."""

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

    def noted_progress(self, title: str) -> AbstractContextManager[NotedReport]:
        """Shows the same, and what is told with each step."""
        return self._noted_progress(title, MofNCompleteColumn(), _PerSecond("steps"))

    def show_table(self, rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> None:
        """A table among the notes."""
        for line in _table_lines(rows, header, sys.stderr):
            self.tell(line)

    @contextmanager
    def _progress(self, title: str, *columns: ProgressColumn) -> Iterator[Report]:
        with self._noted_progress(title, *columns) as report:
            yield lambda done, total: report(done, total, "")

    @contextmanager
    def _noted_progress(self, title: str, *columns: ProgressColumn) -> Iterator[NotedReport]:
        console = Console(stderr=True)
        if not console.is_terminal:
            yield self._report_in_lines(title)
            return
        note = TextColumn("{task.fields[note]}", markup=False)
        shown = (TextColumn(title), BarColumn(), *columns, TextColumn("left:"), TimeRemainingColumn(), note)
        with Progress(*shown, console=console, disable=self._quiet, transient=True) as progress:
            task = progress.add_task(title, total=None, note="")
            yield lambda done, total, note: progress.update(task, completed=done, total=total, note=note)

    def _report_in_lines(self, title: str) -> NotedReport:
        """For a log file: a line now and then."""
        told = time.monotonic()

        def report(done: int, total: int, note: str) -> None:
            nonlocal told
            if time.monotonic() - told > _SECONDS_BETWEEN_LINES:
                told = time.monotonic()
                self.tell(f"{title}: {done:,} of {total:,}{', ' if note else ''}{note}")

        return report


def print_table(rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> None:
    """A table on stdout, each cell shown as it stands."""
    for line in _table_lines(rows, header, sys.stdout):
        print(line)


def _table_lines(rows: Iterable[Sequence[str]], header: Sequence[str], stream: TextIO) -> list[str]:
    console = Console(file=stream, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = _UNWRAPPED
    table = Table(*header, box=None, show_header=bool(header), pad_edge=False)
    for row in rows:
        table.add_row(*(harmless(cell, stream) for cell in row))
    with console.capture() as captured:
        console.print(table)
    return [line.rstrip() for line in captured.get().splitlines()]
