"""The loss of answers: the original's figure, and the same whatever shares a batch."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import visualglm
from visualglm.backends.base import ImageEmbeds
from visualglm.checkpoint.convert import convert
from visualglm.evaluation import loss as loss_module
from visualglm.evaluation.loss import answer_losses
from visualglm.model import VisualGLM
from visualglm.processing.layout import Layout
from visualglm.training.examples import IGNORED_LABEL, Example

GOLDENS = Path(__file__).parent.parent / "goldens"


@pytest.mark.parametrize("name", ["a_image_b1", "c_text_only"])
def test_the_loss_is_that_of_the_original(name: str, tmp_path: Path):
    """On torch and on ONNX Runtime, within 1e-5."""
    convert(GOLDENS / name, tmp_path / name)
    arrays = np.load(GOLDENS / name / "golden.npz")
    start = json.loads((GOLDENS / name / "meta.json").read_text())["pre_image"] if "image" in arrays else None
    example = Example(arrays["train_input_ids"][0], arrays["train_labels"][0], start, 0, 0)
    for backend in ("torch", "onnx"):
        model = visualglm.load(tmp_path / name, backend=backend, device="cpu", dtype="float32")
        images = model.backend.encode_images(arrays["image"]) if start is not None else [None]
        [(total, tokens)] = answer_losses(model.backend, [example], images)
        assert tokens == (example.labels != IGNORED_LABEL).sum()
        assert total / tokens == pytest.approx(float(arrays["train_loss"]), abs=1e-5)


def examples_of(model: VisualGLM) -> list[Example]:
    """Of unequal length, every second with an image."""
    text, slots = model.config.text, model.config.qformer.num_query_tokens
    random = np.random.default_rng(1)
    examples = []
    for number in range(6):
        question, answer = (random.integers(20, text.vocab_size, size).tolist() for size in (3 + number, 7 - number))
        start = 1 if number % 2 else None
        image = [text.pad_token_id] * slots if start else []
        prompt = [25, *image, *question, text.gmask_token_id]
        ids = np.array([*prompt, text.bos_token_id, *answer, text.eos_token_id])
        labels = np.where(np.arange(len(ids)) < len(prompt), IGNORED_LABEL, ids)
        examples.append(Example(ids, labels, start, 0, 0))
    return examples


def test_a_batch_loses_what_its_rows_lose_alone(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch):
    model = visualglm.load(tiny_model_dir, dtype="float32")
    examples = examples_of(model)
    size = model.config.vision.image_size
    images = model.backend.encode_images(np.random.default_rng(2).normal(size=(3, 3, size, size)).astype(np.float32))
    embeds = [None, images[0], None, images[1], None, images[2]]
    together = answer_losses(model.backend, examples, embeds)
    alone = [answer_losses(model.backend, [each], [image])[0] for each, image in zip(examples, embeds, strict=True)]
    assert [tokens for _, tokens in together] == [tokens for _, tokens in alone] == [9, 8, 7, 6, 5, 4]
    assert np.allclose(together, alone, atol=1e-4) and len({round(total, 3) for total, _ in alone}) == 6
    for example, (total, _) in zip(examples[::2], alone[::2], strict=True):
        logits = model.logits(example.input_ids[None])[0].astype(np.float64)
        log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        places = np.flatnonzero(example.labels != IGNORED_LABEL)
        assert total == pytest.approx(-log_probabilities[places - 1, example.labels[places]].sum(), abs=1e-4)
    assert answer_losses(model.backend, [], []) == []


def test_rows_share_a_pass_as_far_as_their_logits_have_room(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch):
    model = visualglm.load(tiny_model_dir, dtype="float32")
    examples = examples_of(model)[::2]
    together, passes = answer_losses(model.backend, examples, [None] * 3), []
    compute = model.backend.logits

    def counted(layout: Layout, images: Sequence[ImageEmbeds]) -> NDArray[np.float32]:
        passes.append((layout.batch_size, compute(layout, images).nbytes))
        return compute(layout, images)

    monkeypatch.setattr(model.backend, "logits", counted)
    longest = 4 * model.config.text.vocab_size * max(len(example.input_ids) for example in examples)
    for room, rows in ((3 * longest, [3]), (3 * longest - 1, [2, 1]), (1, [1, 1, 1])):
        passes.clear()
        monkeypatch.setattr(loss_module, "_LOGITS_BYTES", room)
        assert np.allclose(answer_losses(model.backend, examples, [None] * 3), together, atol=1e-4)
        assert [count for count, _ in passes] == rows
        assert room == 1 or max(size for _, size in passes) <= room
