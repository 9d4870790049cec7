"""The built-in model, whose answers mean something, against torch: logits, and greedy ids over held-out scenes."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

from tests.mindspore.greedy import answer_ids, asked_about, scene_images, torch_model
from visualglm.backends.base import ImageEmbeds
from visualglm.backends.mindspore.backend import MindSporeBackend
from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.generation.config import GenerationConfig
from visualglm.loading import builtin_path
from visualglm.model import VisualGLM
from visualglm.processing.image import preprocess
from visualglm.scenes.held_out import LONGEST_ANSWER, picture_of

# Of the largest logit. In single precision either is that far from the exact logits: up to 3e-5 torch, 5e-5 MindSpore.
RELATIVE = 2e-6
ABSOLUTE_LOGITS = 2e-5


@pytest.fixture(scope="module")
def load(load_backend: Callable[..., MindSporeBackend]) -> Callable[[str], VisualGLM]:
    """The same on MindSpore, in a mode."""
    directory = open_model_directory(builtin_path())
    return lambda mode: VisualGLM(load_backend(directory, mode), torch_model().tokenizer)


@pytest.fixture
def model(load: Callable[[str], VisualGLM], mode: str) -> VisualGLM:
    return load(mode)


@pytest.fixture(scope="module")
def images(load: Callable[[str], VisualGLM]) -> Callable[[int], list[ImageEmbeds]]:
    """So many scenes as MindSpore sees them, in either mode: images are always encoded operator by operator."""
    return cache(lambda scenes: scene_images(load("eager"), scenes))


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


@pytest.mark.parametrize("scenes", [100, pytest.param(500, marks=pytest.mark.slow)])
def test_greedy_ids_are_those_of_torch(scenes: int, model: VisualGLM, images: Callable[[int], list[ImageEmbeds]]):
    asked = asked_about(scenes)
    assert answer_ids(model, asked, images(scenes)) == [each.answer for each in asked]


def test_answers_in_words_in_any_company(model: VisualGLM):
    """A batch answers as its rows do alone, text-only and English rows among them."""
    pairs = [(picture_of(0), "图里有什么？"), (None, "你好"), (picture_of(1), "What is in the picture?")]
    together = model.ask_batch(pairs, max_new_tokens=LONGEST_ANSWER)
    assert together == [model.ask(*pair, max_new_tokens=LONGEST_ANSWER) for pair in pairs]
    assert together == torch_model().ask_batch(pairs, max_new_tokens=LONGEST_ANSWER)
