"""Tables and bars of progress, by Rich: to be imported when the first of them is shown, for that takes a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal, TextIO

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

from visualglm.cli.output import harmless
from visualglm.signals import held_signals

Unit = Literal["bytes", "rows", "steps"]

# What is read by programs is not to be wrapped.
_UNWRAPPED = 10_000


class _PerSecond(ProgressColumn):
    def __init__(self, unit: str) -> None:
        self._unit = unit
        super().__init__()

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} {self._unit}/s" if task.speed else "")


@contextmanager
def progress_bar(title: str, unit: Unit) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr while the block runs: how much is done, how fast, how long the rest takes, and the note."""
    counts = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(), _PerSecond(unit))
    note = TextColumn("{task.fields[note]}", markup=False)
    shown = (TextColumn(title), BarColumn(), *counts, TextColumn("left:"), TimeRemainingColumn(), note)
    with ExitStack() as stack:
        # It is drawn by a thread, which is to leave signals to this one.
        with held_signals():
            progress = stack.enter_context(Progress(*shown, console=Console(stderr=True), transient=True))
        task = progress.add_task(title, total=None, note="")
        yield lambda done, total, note: progress.update(task, completed=done, total=total, note=note)


def table_lines(rows: Iterable[Sequence[str]], header: Sequence[str], stream: TextIO) -> list[str]:
    """The lines of a table, as `stream` shows them."""
    console = Console(file=stream, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = _UNWRAPPED
    table = Table(*header, box=None, show_header=bool(header), pad_edge=False)
    for row in rows:
        table.add_row(*(harmless(cell, stream) for cell in row))
    with console.capture() as captured:
        console.print(table)
    return [line.rstrip() for line in captured.get().splitlines()]
