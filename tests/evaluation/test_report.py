"""The page: whole, harmless, and of bounded size."""

import re
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from tests.evaluation.conftest import Write
from visualglm.evaluation import report
from visualglm.evaluation.questions import Question, read_questions
from visualglm.evaluation.report import Column, write_report
from visualglm.evaluation.results import Result
from visualglm.evaluation.scores import Scored
from visualglm.evaluation.tables import score_table

EVIL = "<script>alert('1')</script> & \"</td>"


class Page(HTMLParser):
    """Names of tags, and the text of each cell."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.removesuffix("\n")


@pytest.fixture
def questions(write: Write) -> list[Question]:
    rows = [
        {"img": "a.png", "prompt": EVIL, "label": ["red", "red", EVIL]},
        {"prompt": "what?", "label": "blue"},
        {"img": "b.png", "conversations": [["one?", "1"], ["two?", "2"]]},
    ]
    return read_questions(write(rows))


def scored(questions: list[Question], *answers: str | None) -> Scored:
    return Scored(
        [
            Result(question.references, answer, "no <b>answer</b>" if answer is None else None, None, 0)
            for question, answer in zip(questions, answers, strict=True)
        ]
    )


def test_one_evaluation(questions: list[Question], tmp_path: Path):
    result = scored(questions, EVIL, "blue", None, "3")
    path = tmp_path / "page.html"
    seen = []
    write_report(
        path,
        f"of {EVIL}",
        questions,
        [Column("now", result)],
        score_table(result),
        lambda done, total: seen.append((done, total)),
    )
    page = Page(path)
    assert not page.tags & {"script", "b", "link", "iframe"} and seen == [(4, 4)]
    header = page.rows.index(["row", "picture", "question", "references", "now"])
    first, second, third, fourth = page.rows[header + 1 :]
    assert first[2] == EVIL and first[3] == f"red\n{EVIL}" and first[4].startswith(f"✓ {EVIL}")
    assert second[4].startswith("✓ blue") and third[4] == "no <b>answer</b>" and fourth[4].startswith("✗ 3")
    assert fourth[0] == "3, turn 2" and fourth[2] == "one?\n→ 1two?"
    text = path.read_text("utf-8")
    assert "default-src 'none'" in text and not re.search(r'(src|href)="(?!data:image/jpeg)', text)
    images = [Image.open(BytesIO(b64decode(data))) for data in re.findall(r"base64,([^\"]+)", text)]
    assert len(images) == 3 and all(max(image.size) <= 160 for image in images)


def test_two_evaluations_worse_first(questions: list[Question], tmp_path: Path):
    before, after = scored(questions, "red", "x", "1", None), scored(questions, "red", "blue", "x", None)
    path = tmp_path / "page.html"
    columns = [Column("before", before), Column("after", after)]
    write_report(path, "two", questions, columns, score_table(after))
    rows = Page(path).rows
    header = rows.index(["row", "picture", "question", "references", "before", "after"])
    assert [row[0] for row in rows[header + 1 :]] == ["3, turn 1worse", "2improved", "1same", "3, turn 2same"]


def test_bounded_and_pictures_that_are_gone(questions: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.png").unlink()
    monkeypatch.setattr(report, "MOST_ROWS", 2)
    result = scored(questions, "a", "b", "c", "d")
    write_report(tmp_path / "page.html", "t", questions, [Column("now", result)], score_table(result))
    text = (tmp_path / "page.html").read_text("utf-8")
    assert "The first 2 of 4 questions" in text and "base64" not in text and "<td>✗</td>" in text
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
