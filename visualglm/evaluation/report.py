"""An evaluation as one HTML page that needs nothing else: pictures, questions, references and answers side by side."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from visualglm.checkpoint.files import replace_file
from visualglm.errors import ImageError
from visualglm.evaluation.questions import Question
from visualglm.evaluation.results import Result
from visualglm.evaluation.scores import METRICS, VERDICTS, Scored, Scores, row_verdict
from visualglm.evaluation.tables import Table
from visualglm.processing.ahead import prepared_batches
from visualglm.processing.image import load_image

Report = Callable[[int, int], None]
"""Called with the rows that are on the page and with those that will be."""

# A page that a browser still opens at once: about 8 MB.
MOST_ROWS = 1000
_THUMBNAIL = 160
_QUALITY = 75
_BATCH = 16

# Scripts and anything from elsewhere are forbidden, whatever an answer may hold.
_HEAD = """<!doctype html>
<html>
<head>
<meta charset="utf-8">
<meta name="generator" content="visualglm evaluate">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 80rem; padding: 0 1rem; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
th, td {{ border-bottom: 1px solid #8885; padding: .4rem .7rem; text-align: left; vertical-align: top; }}
th {{ position: sticky; top: 0; background: Canvas; }}
.figures td:not(:first-child), .figures th:not(:first-child) {{ text-align: right; }}
.answers td {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
.answers td:first-child {{ white-space: nowrap; }}
img {{ display: block; }}
small {{ display: block; opacity: .7; }}
.right, .improved {{ color: #17803d; }} .wrong, .worse {{ color: #c0392b; }}
</style>
</head>
<body>
"""


_START = _HEAD[: _HEAD.index("<meta http-equiv")].encode()


@dataclass(frozen=True)
class Column:
    """One evaluation on the page, under its name."""

    name: str
    scored: Scored


def is_report(path: Path) -> bool:
    """Whether `path` is such a page; raises `OSError`."""
    with open(path, "rb") as file:
        return file.read(len(_START)) == _START


def write_report(
    path: Path,
    title: str,
    questions: Sequence[Question],
    columns: Sequence[Column],
    table: Table,
    report: Report | None = None,
) -> None:
    """Write the page, which replaces `path` when it is whole. Of two columns the second is what became of the first.

    At most `MOST_ROWS` questions are shown, of two columns those that got worse or improved first. Raises `OSError`.
    """
    order = _order(columns)
    page = _page(title, questions, columns, table, order[:MOST_ROWS], report or (lambda done, total: None))
    replace_file(path, (piece.encode("utf-8", "replace") for piece in page))


def _order(columns: Sequence[Column]) -> list[int]:
    """The numbers of the questions, in the order they are shown."""
    numbers = list(range(len(columns[0].scored.results)))
    if len(columns) < 2:
        return numbers
    return sorted(numbers, key=lambda number: VERDICTS.index(_verdict(columns, number)))


def _verdict(columns: Sequence[Column], number: int) -> str:
    return row_verdict(*(column.scored.rows[number] for column in columns))


def _page(
    title: str,
    questions: Sequence[Question],
    columns: Sequence[Column],
    table: Table,
    shown: Sequence[int],
    report: Report,
) -> Iterator[str]:
    yield _HEAD.format(title=escape(title))
    yield f"<h1>{escape(title)}</h1>\n"
    yield f'<table class="figures">\n{_row("th", table.header)}'
    yield from (_row("td", cells) for cells in table.rows)
    yield "</table>\n"
    if len(shown) < len(questions):
        yield f"<p>The first {len(shown):,} of {len(questions):,} questions; all are in the JSONL file.</p>\n"
    names = [escape(column.name) for column in columns]
    yield '<table class="answers">\n<tr>' + "".join(
        f"<th>{name}</th>" for name in ("row", "picture", "question", "references", *names)
    )
    yield "</tr>\n"
    with prepared_batches(shown, lambda number: _picture(questions[number].row.source), _BATCH) as batches:
        done = 0
        for batch in batches:
            for number, picture in batch:
                yield _question_row(questions[number], picture, columns, number)
            done += len(batch)
            report(done, len(shown))
    yield "</table>\n</body>\n</html>\n"


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>\n"


def _question_row(question: Question, picture: str, columns: Sequence[Column], number: int) -> str:
    place = f"{question.number}" + (f", turn {question.turn + 1}" if len(question.row.turns) > 1 else "")
    if len(columns) > 1:
        verdict = _verdict(columns, number)
        place += f'<small class="{verdict}">{verdict}</small>'
    history = "".join(f"<small>{escape(asked)}\n→ {escape(answer)}</small>" for asked, answer in question.history)
    references = "\n".join(escape(reference) for reference in dict.fromkeys(question.references))
    answers = [_answer(column.scored.results[number], column.scored.rows[number]) for column in columns]
    cells = [place, picture, history + escape(question.prompt), references, *answers]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n"


def _answer(result: Result, scores: Scores) -> str:
    if result.answer is None:
        return f'<span class="wrong">{escape(result.error or "")}</span>'
    exact = scores[METRICS[0]] > 0
    figures = ", ".join(
        f"{metric.name} {scores[metric] * metric.scale:.4g}" for metric in METRICS[1:] if metric in scores
    )
    kind = "right" if exact else "wrong"
    return f'<span class="{kind}">{"✓" if exact else "✗"}</span> {escape(result.answer)}<small>{figures}</small>'


def _picture(source: Path | None) -> str:
    """A small copy inside the page; an image that cannot be read is told as its result tells it."""
    if source is None:
        return ""
    try:
        image = load_image(source)
    except ImageError:
        return "✗"
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_QUALITY)
    data = b64encode(file.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" width="{image.width}" height="{image.height}" alt="">'
