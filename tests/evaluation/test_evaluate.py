"""The built-in model put to the test on drawn scenes, on both backends."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import visualglm
from tests.evaluation.conftest import DESCRIBE, Write
from visualglm.errors import ConfigError
from visualglm.evaluation.evaluate import Evaluator
from visualglm.evaluation.questions import Question, read_questions
from visualglm.model import VisualGLM


@pytest.fixture(scope="module", params=["onnx", "torch"])
def model(request: pytest.FixtureRequest) -> VisualGLM:
    return visualglm.load(backend=request.param, device="cpu", dtype="float32")


@pytest.fixture
def questions(model: VisualGLM, write: Write, tmp_path: Path) -> list[Question]:
    """What the model answers rightly, wrongly, without a picture, in two turns, and not at all."""
    described = model.ask(tmp_path / "a.png", DESCRIBE)
    asked = read_questions(
        write(
            [
                {"img": "a.png", "prompt": DESCRIBE, "label": described},
                {"img": "b.png", "prompt": DESCRIBE, "label": ["nothing", described]},
                {"prompt": "hello", "label": "hi"},
                {"img": "a.png", "conversations": [[DESCRIBE, described], [DESCRIBE, "no"]]},
                {"img": "c.png", "prompt": "long " * 300, "label": "no"},
                {"img": "c.png", "prompt": DESCRIBE, "label": "yes"},
            ]
        )
    )
    (tmp_path / "c.png").unlink()
    return asked


def run(evaluator: Evaluator, questions: list[Question], batch_size: int, start: int = 0) -> list[dict[str, Any]]:
    with evaluator.results(questions, batch_size, start) as batches:
        return [row for batch in batches for row in batch]


def test_results(model: VisualGLM, questions: list[Question], tmp_path: Path):
    evaluator = Evaluator(model, max_new_tokens=40)
    rows = run(evaluator, questions, 3)
    assert len(rows) == 7
    for row, question in zip(rows, questions, strict=True):
        assert row.items() >= question.named().items()
    for row, question in zip(rows[:5], questions, strict=False):
        source = question.row.source
        assert row["answer"] == model.ask(source, question.prompt, history=question.history, max_new_tokens=40)
    assert [row["exact_match"] for row in rows[:5]] == [1, 0, 0, 1, 0]
    assert rows[1]["vqa_accuracy"] == rows[2]["rouge_l"] == 0 and rows[0]["rouge_l"] == 1
    assert rows[0]["loss"] < 0.05 < 3 < rows[1]["loss"] and rows[4]["prompt_tokens"] > rows[3]["prompt_tokens"]
    assert rows[0]["loss_tokens"] == len(model.tokenizer.encode(questions[0].references[0])) + 2
    assert "shorten the question" in rows[5]["error"] and "c.png does not exist" in rows[6]["error"]
    assert "answer" not in rows[5]
    for other in (run(evaluator, questions, 1), rows[:2] + run(evaluator, questions, 3, start=2)):
        assert [row.get("answer") for row in other] == [row.get("answer") for row in rows]
        assert np.allclose([row.get("loss", 0) for row in other], [row.get("loss", 0) for row in rows], atol=1e-4)


def test_without_loss_and_with_options(model: VisualGLM, questions: list[Question]):
    rows = run(Evaluator(model, with_loss=False, max_new_tokens=2), questions, 7)
    assert all("loss" not in row and row.get("new_tokens", 0) <= 2 for row in rows)
    with pytest.raises(ConfigError, match="max_new_token"):
        Evaluator(model, max_new_token=2)


def test_an_image_is_encoded_once_for_all_questions_of_a_batch(
    model: VisualGLM, questions: list[Question], monkeypatch: pytest.MonkeyPatch
):
    encoded = []
    encode = model.backend.encode_images
    monkeypatch.setattr(model.backend, "encode_images", lambda pixels: encoded.append(len(pixels)) or encode(pixels))
    run(Evaluator(model, max_new_tokens=2), questions, 7)
    assert encoded == [2]


def test_a_history_that_does_not_fit_is_told(model: VisualGLM, write: Write):
    turns = [["word " * 40 + "?", "yes"]] * 4
    rows = run(Evaluator(model, max_new_tokens=8), read_questions(write([{"conversations": turns}])), 4)
    assert "dropped_turns" not in rows[0] and rows[3]["dropped_turns"] > 0
