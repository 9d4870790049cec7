"""What was measured of engines, and the table of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

_GB = 1e9


@dataclass(frozen=True)
class Cell:
    """One thing that engines are timed at; `tokens` is the length of the prompt, or of the context."""

    command: Literal["encode", "prefill", "decode"]
    tokens: int = 0
    batch: int = 1

    def request(self, steps: int) -> dict[str, Any]:
        """What a worker is asked."""
        if self.command == "encode":
            return {"command": "encode"}
        if self.command == "prefill":
            return {"command": "prefill", "tokens": self.tokens}
        return {"command": "decode", "context": self.tokens, "batch": self.batch, "steps": steps}

    @property
    def needs(self) -> frozenset[str]:
        """The abilities that an engine must have for it."""
        if self.command == "encode":
            return frozenset({"images"})
        return frozenset({"batches"}) if self.batch > 1 else frozenset()


@dataclass(frozen=True)
class Series:
    """One engine at one cell, a number a round.

    seconds: of one image, one prompt, or one step of the whole batch
    bandwidths: bytes read a second, the mean of just before and just after
    peak_memory: bytes, behind the last round
    """

    engine: str
    cell: Cell
    seconds: Sequence[float]
    bandwidths: Sequence[float]
    peak_memory: int


@dataclass(frozen=True)
class Run:
    """All engines with one number of threads; the ratios are those of the first engine to each other one."""

    threads: int
    load_seconds: dict[str, float]
    step_bytes: dict[str, int]
    series: Sequence[Series]

    @property
    def engines(self) -> list[str]:
        return list(self.load_seconds)

    def at(self, cell: Cell) -> dict[str, Series]:
        return {series.engine: series for series in self.series if series.cell == cell}


@dataclass(frozen=True)
class Row:
    """A line of the table: texts by engine, and by other engine how many times as fast the first one is."""

    title: str
    texts: dict[str, str]
    speedups: dict[str, float]


def markdown(runs: Iterable[Run]) -> str:
    """One table for each number of threads."""
    return "\n\n".join("\n".join(_lines(run)) for run in runs)


def _lines(run: Run) -> Iterator[str]:
    others = run.engines[1:]
    heads = [f"threads: {run.threads}", *run.engines, *(f"{run.engines[0]} : {other}" for other in others)]
    yield _line(heads)
    yield _line(["---"] * len(heads))
    for row in _rows(run):
        speedups = (f"{row.speedups[other]:.2f}×" if other in row.speedups else "" for other in others)
        yield _line([row.title, *(row.texts.get(engine, "–") for engine in run.engines), *speedups])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rows(run: Run) -> Iterator[Row]:
    yield Row("weights read for a token, GB", {name: f"{size / _GB:.2f}" for name, size in run.step_bytes.items()}, {})
    yield Row("loading, warm cache, s", {name: f"{spent:.1f}" for name, spent in run.load_seconds.items()}, {})
    cells = list(dict.fromkeys(series.cell for series in run.series))
    for cell in cells:
        yield from _cell_rows(run, cell)
    single = next(cell for cell in cells if cell.command == "decode")
    yield _memory_row("peak memory, one row, GB", run.at(single).values())
    yield _memory_row("peak memory, all of this, GB", run.series)
    yield _row(
        "read bandwidth meanwhile, GB/s", run.at(single), lambda series: f"{median(series.bandwidths) / _GB:.1f}"
    )


def _cell_rows(run: Run, cell: Cell) -> Iterator[Row]:
    measured = run.at(cell)
    if cell.command == "encode":
        yield _timed_row(run, "encoding an image, s", measured, lambda spent: f"{spent:.2f}")
    elif cell.command == "prefill":
        yield _timed_row(run, f"prefill of {cell.tokens}, s", measured, lambda spent: f"{spent:.2f}")
    elif cell.batch == 1:
        title = f"decoding, context {cell.tokens}"
        yield _timed_row(run, f"{title}, ms/token", measured, lambda spent: f"{1000 * spent:.1f}")
        yield _row("its share of the bandwidth, %", measured, lambda series: f"{100 * _share(run, series):.0f}")
    else:
        title = f"batch {cell.batch}, context {cell.tokens}, tokens/s"
        yield _timed_row(run, title, measured, lambda spent: f"{cell.batch / spent:.1f}")


def _row(title: str, measured: dict[str, Series], text: Callable[[Series], str]) -> Row:
    return Row(title, {name: text(series) for name, series in measured.items()}, {})


def _timed_row(run: Run, title: str, measured: dict[str, Series], text: Callable[[float], str]) -> Row:
    texts = {name: text(median(series.seconds)) for name, series in measured.items()}
    return Row(title, texts, dict(_speedups(measured, run.engines[0])))


def _speedups(measured: dict[str, Series], first: str) -> Iterator[tuple[str, float]]:
    """How many times as fast the first one is, round by round: neighbours in time saw the same machine."""
    ours = measured[first].seconds if first in measured else []
    for name, series in measured.items():
        if ours and name != first:
            yield name, median(theirs / mine for mine, theirs in zip(ours, series.seconds, strict=True))


def _share(run: Run, series: Series) -> float:
    """The share of the bandwidth that reading the weights takes."""
    size = run.step_bytes[series.engine]
    return median(size / spent / speed for spent, speed in zip(series.seconds, series.bandwidths, strict=True))


def _memory_row(title: str, measured: Iterable[Series]) -> Row:
    peaks: dict[str, int] = {}
    for series in measured:
        peaks[series.engine] = max(peaks.get(series.engine, 0), series.peak_memory)
    return Row(title, {name: f"{peak / _GB:.1f}" for name, peak in peaks.items()}, {})
