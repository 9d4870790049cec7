"""Greedy answers of the built-in model about held-out scenes: those of torch, and those of others to hold against them.

The questions with the longest answers, by torch, come last and are asked together: a batch takes as many steps as its
longest answer, and most are of two or three tokens. In what company a row is answered changes none of its ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import visualglm
from visualglm.backends.base import ImageEmbeds
from visualglm.generation.config import GenerationConfig
from visualglm.generation.decoding import generate_ids
from visualglm.loading import builtin_path
from visualglm.model import VisualGLM
from visualglm.processing.layout import pad_batch
from visualglm.processing.prompt import Prompt
from visualglm.scenes.held_out import LONGEST_ANSWER, picture_of, questions_about

_ROWS_AT_ONCE, _SCENES_AT_ONCE = 64, 32


@dataclass(frozen=True)
class Asked:
    """A question about a scene, and what torch says to it.

    room: how many tokens an answer may take; once that of torch is known, one more, so that none can go on unseen.
    """

    scene: int
    prompt: Prompt
    room: int = LONGEST_ANSWER
    answer: tuple[int, ...] = ()


@cache
def torch_model() -> VisualGLM:
    return visualglm.load(builtin_path(), backend="torch", device="cpu")


@cache
def asked_about(scenes: int) -> tuple[Asked, ...]:
    """Every question about the first so many held-out scenes, by the length of the answer."""
    model, config = torch_model(), GenerationConfig(max_new_tokens=LONGEST_ANSWER)
    unanswered = [
        Asked(scene, model.prompt(asked.question, has_image=True, language=asked.language, config=config))
        for scene in range(scenes)
        for asked in questions_about(scene)
    ]
    assert len(unanswered) > 5 * scenes
    answers = answer_ids(model, unanswered, scene_images(model, scenes))
    answered = [replace(each, room=len(ids) + 1, answer=ids) for each, ids in zip(unanswered, answers, strict=True)]
    return tuple(sorted(answered, key=lambda asked: (asked.room, len(asked.prompt.input_ids))))


def scene_images(model: VisualGLM, scenes: int) -> list[ImageEmbeds]:
    """The first so many held-out scenes as the model sees them."""
    return [
        image
        for start in range(0, scenes, _SCENES_AT_ONCE)
        for image in model.encode_images(
            [picture_of(scene) for scene in range(start, min(start + _SCENES_AT_ONCE, scenes))]
        )
    ]


def answer_ids(
    model: VisualGLM, asked: Sequence[Asked], images: Sequence[ImageEmbeds], rows_at_once: int = _ROWS_AT_ONCE
) -> list[tuple[int, ...]]:
    """What the model says to each question, greedily and in ragged batches; images: those of all scenes."""
    answered: list[tuple[int, ...]] = []
    for start in range(0, len(asked), rows_at_once):
        batch = asked[start : start + rows_at_once]
        layout = pad_batch(
            [each.prompt.input_ids for each in batch],
            [each.prompt.image_start for each in batch],
            pad_token_id=model.config.text.pad_token_id,
            bos_token_id=model.config.text.bos_token_id,
        )
        config = GenerationConfig(max_new_tokens=max(each.room for each in batch))
        answered += map(tuple, generate_ids(model.backend, layout, [images[each.scene] for each in batch], config))
    return answered
