"""Scenes that are never trained on, and what is asked about them: the same for all who count right answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from visualglm.generation.config import GenerationConfig
from visualglm.generation.decoding import generate_ids
from visualglm.model import VisualGLM
from visualglm.processing.layout import pad_batch
from visualglm.scenes.dataset import HELD_OUT_SEEDS
from visualglm.scenes.draw import draw_scene
from visualglm.scenes.questions import Question, ask_about
from visualglm.scenes.scene import make_scene
from visualglm.scenes.wording import KINDS, LANGUAGES

Answered = tuple[Question, str]
"""A question, and what a model says to it."""

LONGEST_ANSWER = 64
_SCENES_AT_ONCE, _ROWS_AT_ONCE = 64, 128


def picture_of(index: int) -> Image.Image:
    """The held-out scene number `index`, drawn."""
    return draw_scene(make_scene(HELD_OUT_SEEDS + index))


def questions_about(index: int) -> Iterator[Question]:
    """One question of each kind where the scene allows it, half of them in one language and half in the other."""
    scene = make_scene(HELD_OUT_SEEDS + index)
    rng = np.random.default_rng([HELD_OUT_SEEDS, index])
    for place, kind in enumerate(KINDS):
        question = ask_about(scene, kind, LANGUAGES[(index + place) % 2], rng)
        if question is not None:
            yield question


def answer_scenes(model: VisualGLM, scenes: Sequence[int]) -> list[Answered]:
    """What the model says to every question about some held-out scenes."""
    answered: list[Answered] = []
    for start in range(0, len(scenes), _SCENES_AT_ONCE):
        chosen = scenes[start : start + _SCENES_AT_ONCE]
        images = model.encode_images([picture_of(scene) for scene in chosen])
        asked = [
            (image, question)
            for image, scene in zip(images, chosen, strict=True)
            for question in questions_about(scene)
        ]
        pairs = [(image, question.question) for image, question in asked]
        answers = model.ask_batch(pairs, batch_size=_ROWS_AT_ONCE, max_new_tokens=LONGEST_ANSWER)
        answered += [(question, answer) for (_, question), answer in zip(asked, answers, strict=True)]
    return answered


def answer_ids(model: VisualGLM, scenes: Sequence[int]) -> list[list[int]]:
    """The same in ids, greedily, eos not included."""
    text, config = model.config.text, GenerationConfig(max_new_tokens=LONGEST_ANSWER)
    answered: list[list[int]] = []
    for scene in scenes:
        prompts = [
            model.prompt(asked.question, has_image=True, language=asked.language, config=config)
            for asked in questions_about(scene)
        ]
        layout = pad_batch(
            [prompt.input_ids for prompt in prompts],
            [prompt.image_start for prompt in prompts],
            pad_token_id=text.pad_token_id,
            bos_token_id=text.bos_token_id,
        )
        images = [model.encode_image(picture_of(scene))] * len(prompts)
        answered += generate_ids(model.backend, layout, images, config)
    return answered
