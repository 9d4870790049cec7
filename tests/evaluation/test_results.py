import json
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.conftest import Write
from visualglm.errors import DataError
from visualglm.evaluation.questions import Question, read_questions
from visualglm.evaluation.results import Result, read_results

ANSWER = {"answer": "a", "loss": 0.5, "loss_tokens": 4}


@pytest.fixture
def questions(write: Write) -> list[Question]:
    return read_questions(
        write([{"prompt": "what?", "label": ["a", "b"]}, {"conversations": [["one?", "1"], ["two?", "2"]]}])
    )


def save(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_results_are_read(questions: list[Question], tmp_path: Path):
    path = save(
        tmp_path / "out.jsonl",
        [questions[0].named() | ANSWER, questions[1].named() | {"error": "no"}, questions[2].named() | {"answer": ""}],
    )
    assert read_results(path, questions) == [
        Result(("a", "b"), "a", None, 0.5, 4),
        Result(("1",), None, "no", None, 0),
        Result(("2",), "", None, None, 0),
    ]


@pytest.mark.parametrize("changed", [{"prompt": "why?"}, {"references": ["a"]}, {"image": "x.png"}, {"history": []}])
def test_other_questions_are_refused(changed: dict[str, Any], questions: list[Question], tmp_path: Path):
    rows = [question.named() | ANSWER for question in questions]
    with pytest.raises(DataError, match=r"out\.jsonl, line 3 is of another data set"):
        read_results(save(tmp_path / "out.jsonl", [*rows[:2], rows[2] | changed]), questions)


def test_fewer_and_more_are_refused(questions: list[Question], tmp_path: Path):
    rows = [question.named() | ANSWER for question in questions]
    with pytest.raises(DataError, match="2 results of 3 questions; finish"):
        read_results(save(tmp_path / "out.jsonl", rows[:2]), questions)
    with pytest.raises(DataError, match="line 4 is of another data set"):
        read_results(save(tmp_path / "out.jsonl", [*rows, rows[0]]), questions)


@pytest.mark.parametrize(
    "changed",
    [
        {"answer": None},
        {"answer": 3},
        {"references": "a"},
        {"references": [1]},
        {"loss": "x"},
        {"loss_tokens": 0},
        {"references": []},
    ],
)
def test_what_is_no_result_is_refused(changed: dict[str, Any], questions: list[Question], tmp_path: Path):
    path = save(tmp_path / "out.jsonl", [questions[0].named() | ANSWER | changed])
    with pytest.raises(DataError, match="line 1 is no result of an evaluation"):
        read_results(path, questions)
