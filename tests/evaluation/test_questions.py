import json
from pathlib import Path

import pytest

from tests.evaluation.conftest import Write
from visualglm.errors import DataError
from visualglm.evaluation.questions import read_questions

ROWS = [
    {"img": "a.png", "prompt": "what?", "label": "a"},
    {"prompt": "which?", "label": ["b", "c"]},
    {"img": "b.png", "conversations": [["one?", "1"], ["two?", "2"]]},
]
NAMED = [
    {"row": 1, "image": "a.png", "prompt": "what?", "references": ["a"]},
    {"row": 2, "image": None, "prompt": "which?", "references": ["b", "c"]},
    {"row": 3, "turn": 1, "history": [], "image": "b.png", "prompt": "one?", "references": ["1"]},
    {"row": 3, "turn": 2, "history": [["one?", "1"]], "image": "b.png", "prompt": "two?", "references": ["2"]},
]


def test_every_turn_is_a_question(write: Write, tmp_path: Path):
    reported = []
    questions = read_questions(write(ROWS), lambda done, total: reported.append((done, total)))
    assert [question.named() for question in questions] == NAMED
    assert questions[3].history == (("one?", "1"),) and questions[3].row.source == tmp_path / "b.png"
    assert reported[-1] == (3, 3)
    (tmp_path / "list.json").write_text(json.dumps(ROWS, indent=1))
    assert [question.named() for question in read_questions(tmp_path / "list.json")] == NAMED


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"img": "a.png", "prompt": "what?"}, "line 2: there is no label"),
        ({"img": "a.png", "prompt": "what?", "label": []}, r"line 2: the label is \[\]"),
        ({"img": "a.png", "prompt": "what?", "label": ["x", " "]}, 'line 2: the label is " "'),
        ({"img": "missing.png", "prompt": "what?", "label": "x"}, "line 2: .*missing.png does not exist"),
        ({"img": "rows.jsonl", "prompt": "what?", "label": "x"}, "line 2: .*rows.jsonl"),
        ([1], "line 2"),
    ],
)
def test_a_bad_row_is_named(row: object, words: str, write: Write):
    with pytest.raises(DataError, match=words):
        read_questions(write([ROWS[0], row]))
