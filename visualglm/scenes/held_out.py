"""Scenes that are never trained on, and what is asked about them: the same for all who count right answers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

from visualglm.scenes.dataset import HELD_OUT_SEEDS
from visualglm.scenes.draw import draw_scene
from visualglm.scenes.questions import Question, ask_about
from visualglm.scenes.scene import make_scene
from visualglm.scenes.wording import KINDS, LANGUAGES


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
