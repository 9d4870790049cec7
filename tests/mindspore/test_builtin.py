"""The built-in model, whose answers mean something, against torch: logits, and greedy ids over held-out scenes."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest

import visualglm
from visualglm.backends.mindspore.backend import MindSporeBackend
from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.generation.config import GenerationConfig
from visualglm.generation.decoding import generate_ids
from visualglm.loading import builtin_path
from visualglm.model import VisualGLM
from visualglm.processing.image import preprocess
from visualglm.processing.layout import pad_batch
from visualglm.scenes.held_out import LONGEST_ANSWER, picture_of, questions_about

# Of the largest logit. In single precision either is that far from the exact logits: up to 3e-5 torch, 5e-5 MindSpore.
RELATIVE = 2e-6
ABSOLUTE_LOGITS = 2e-5
SCENES_AT_ONCE = 40
Ids = list[list[int]]


@cache
def torch_model() -> VisualGLM:
    return visualglm.load(builtin_path(), backend="torch", device="cpu")


@pytest.fixture
def model(load_backend: Callable[..., MindSporeBackend], mode: str) -> VisualGLM:
    """The same on MindSpore."""
    directory = open_model_directory(builtin_path())
    return VisualGLM(load_backend(directory, mode), torch_model().tokenizer)


def answer_ids(model: VisualGLM, scenes: Sequence[int]) -> Ids:
    """To every question about each scene, those of some scenes in one ragged batch."""
    text, config = model.config.text, GenerationConfig(max_new_tokens=LONGEST_ANSWER)
    answered: Ids = []
    for start in range(0, len(scenes), SCENES_AT_ONCE):
        chosen = scenes[start : start + SCENES_AT_ONCE]
        images = model.encode_images([picture_of(scene) for scene in chosen])
        pairs = [
            (image, asked) for image, scene in zip(images, chosen, strict=True) for asked in questions_about(scene)
        ]
        prompts = [
            model.prompt(asked.question, has_image=True, language=asked.language, config=config) for _, asked in pairs
        ]
        layout = pad_batch(
            [prompt.input_ids for prompt in prompts],
            [prompt.image_start for prompt in prompts],
            pad_token_id=text.pad_token_id,
            bos_token_id=text.bos_token_id,
        )
        answered += generate_ids(model.backend, layout, [image for image, _ in pairs], config)
    return answered


@pytest.mark.parametrize("scene", [None, 0, 1, 2])
def test_logits_are_those_of_torch(scene: int | None, model: VisualGLM):
    config = GenerationConfig(max_new_tokens=LONGEST_ANSWER)
    prompt = torch_model().prompt("图里有什么？", has_image=scene is not None, config=config)
    found, expected = (
        each.logits([prompt.input_ids], *seen(each, scene, prompt.image_start)) for each in (model, torch_model())
    )
    difference = np.abs(found - expected).max()
    assert difference < RELATIVE * np.abs(expected).max()
    assert scene is not None or difference < ABSOLUTE_LOGITS


def seen(model: VisualGLM, scene: int | None, start: int | None) -> tuple[Any, ...]:
    """The pixels of a scene, and where its slots begin."""
    if scene is None:
        return ()
    return preprocess(picture_of(scene), model.config.vision.image_size)[None], start


def check(model: VisualGLM, scenes: Sequence[int]) -> None:
    found, expected = answer_ids(model, scenes), answer_ids(torch_model(), scenes)
    assert len(found) > 5 * len(scenes) and found == expected


def test_greedy_ids_are_those_of_torch(model: VisualGLM):
    check(model, range(40))


@pytest.mark.slow
def test_greedy_ids_are_those_of_torch_over_500_scenes(model: VisualGLM):
    check(model, range(500))


def test_answers_in_words_in_any_company(model: VisualGLM):
    """A batch answers as its rows do alone, text-only and English rows among them."""
    pairs = [(picture_of(0), "图里有什么？"), (None, "你好"), (picture_of(1), "What is in the picture?")]
    together = model.ask_batch(pairs, max_new_tokens=LONGEST_ANSWER)
    assert together == [model.ask(*pair, max_new_tokens=LONGEST_ANSWER) for pair in pairs]
    assert together == torch_model().ask_batch(pairs, max_new_tokens=LONGEST_ANSWER)
