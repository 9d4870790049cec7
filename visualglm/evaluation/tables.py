"""Scores as tables of text, for a terminal and for a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from visualglm.evaluation.scores import METRICS, VERDICTS, Metric, Scored, Scores, by_language, verdict

_NONE = "–"


@dataclass(frozen=True)
class Table:
    """Cells of text."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def score_table(scored: Scored) -> Table:
    """One metric a row; a column for all results, and for each language where there are two."""
    groups = by_language(scored.results)
    overall = {name: scored.overall(chosen) for name, chosen in groups.items()}
    counts = {
        "rows": [len(chosen) for chosen in groups.values()],
        "rows with an error": [_errors(scored, chosen) for chosen in groups.values()],
        "tokens of the loss": [scored.tokens(chosen) for chosen in groups.values()],
    }
    rows = [(name, *(f"{count:,}" for count in found)) for name, found in counts.items() if any(found)]
    for metric in METRICS:
        if any(metric in scores for scores in overall.values()):
            rows.append((metric.name, *(_shown(metric, scores) for scores in overall.values())))
    return Table(("metric", *groups), tuple(rows))


def comparison_table(before: Scored, after: Scored) -> Table:
    """One metric a row, over the rows that both have answered, and how many of these improved and got worse."""
    groups = by_language(after.results)
    rows: list[tuple[str, ...]] = []
    for name, chosen in groups.items():
        both = [index for index in chosen if before.rows[index] and after.rows[index]]
        rows.append(("rows" if name == "all" else f"rows, {name}", f"{len(both):,}", f"{len(both):,}", *[""] * 4))
        rows += _compared(before, after, both)
    return Table(("metric", "before", "after", "change", *VERDICTS), tuple(rows))


def _compared(before: Scored, after: Scored, chosen: Sequence[int]) -> Iterable[tuple[str, ...]]:
    first, second = before.overall(chosen), after.overall(chosen)
    for metric in METRICS:
        if metric in first and metric in second:
            change = f"{(second[metric] - first[metric]) * metric.scale:+.3f}"
            counts = Counter(verdict(metric, before.rows[index], after.rows[index]) for index in chosen)
            by_rows = [_NONE if counts[None] else f"{counts[each]:,}" for each in VERDICTS]
            yield (metric.name, _shown(metric, first), _shown(metric, second), change, *by_rows)


def _errors(scored: Scored, chosen: Iterable[int]) -> int:
    return sum(scored.results[index].answer is None for index in chosen)


def _shown(metric: Metric, scores: Scores) -> str:
    return f"{scores[metric] * metric.scale:.3f}" if metric in scores else _NONE
