"""Training batches of drawn scenes, each a function of seed and number: nothing is stored, any can be made again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt

from visualglm.config import TextConfig, VisualGLMConfig
from visualglm.processing.image import preprocess
from visualglm.processing.layout import Layout, pad_batch
from visualglm.processing.prompt import Language as PromptLanguage
from visualglm.processing.prompt import Turn, build_prompt
from visualglm.processing.tokenizer import Tokenizer
from visualglm.scenes.draw import draw_jumble, draw_scene
from visualglm.scenes.questions import ask_about, place_of
from visualglm.scenes.scene import (
    CANVAS,
    COLORS,
    MAX_SHAPES,
    SHAPES,
    SIZES,
    TEXTURES,
    Label,
    Scene,
    Shape,
    make_jumble,
    make_scene,
)
from visualglm.scenes.wording import KINDS, LANGUAGES, NO_PICTURE, TEXT_ONLY

IGNORED_LABEL = -100
HELD_OUT_SEEDS = 1 << 40  # scenes from this seed on are never trained on
CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MAX_CHARACTERS = 4
# Comparing and counting are learned last: they are asked more often than the rest.
_ASKED_KINDS = (*KINDS[1:], "count", "compare", "compare")
_LONGEST_ANSWER = 64

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """Rows of one padded forward pass. `scene_index` [rows] is the scene of each row, or -1 for a text-only row."""

    layout: Layout
    labels: Ints
    scene_index: Ints


@dataclass(frozen=True)
class SceneBatch:
    """pixels: float32 [scenes, 3, S, S]; rows: padded groups of like length; patch_targets, slot_targets: see below."""

    pixels: NDArray[np.float32]
    rows: tuple[Rows, ...]
    patch_targets: Ints
    slot_targets: Ints | None


@dataclass(frozen=True)
class Row:
    """A prompt and its answer: the prompt's ids up to `<sop>`, then the answer's and eos; `scene` is -1 without one."""

    ids: tuple[int, ...]
    image_start: int | None
    scene: int


class BatchPlan(BaseModel):
    """What a batch holds: scenes, and how many questions about each; with none, there is only something to see.

    `jumbles` are shown instead of scenes to learn to see: they hold three times as much.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scenes: PositiveInt
    questions: NonNegativeInt = 0
    jumbles: bool = False


class SceneBatches:
    """Batch number `index` by indexing.

    Of the questions about a scene the first asks to describe it, and each is in a random language; some rows carry an
    earlier turn, and a few have no image.
    """

    def __init__(self, config: VisualGLMConfig, tokenizer: Tokenizer, plan: BatchPlan, *, seed: int) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.plan = plan
        self.seed = seed

    def __getitem__(self, index: int) -> SceneBatch:
        rng = np.random.default_rng([self.seed, index])
        if self.plan.jumbles:
            return self._jumbles(rng)
        scenes = [make_scene(int(seed)) for seed in rng.integers(HELD_OUT_SEEDS, size=self.plan.scenes)]
        size = self.config.vision.image_size
        return SceneBatch(
            np.stack([preprocess(draw_scene(scene), size) for scene in scenes]),
            self._rows(scenes, rng) if self.plan.questions else (),
            np.stack([scene_patch_targets(scene, size // self.config.vision.patch_size) for scene in scenes]),
            np.stack([slot_targets(scene) for scene in scenes]),
        )

    def _jumbles(self, rng: np.random.Generator) -> SceneBatch:
        jumbles = [make_jumble(int(seed)) for seed in rng.integers(HELD_OUT_SEEDS, size=self.plan.scenes)]
        size = self.config.vision.image_size
        grid = size // self.config.vision.patch_size
        return SceneBatch(
            np.stack([preprocess(draw_jumble(jumble), size) for jumble in jumbles]),
            (),
            np.stack([patch_targets(jumble.shapes, jumble.labels, grid, ranked=False) for jumble in jumbles]),
            None,
        )

    def _rows(self, scenes: Sequence[Scene], rng: np.random.Generator) -> tuple[Rows, ...]:
        """All rows of a step, in three groups of like length, so that little of a forward pass is padding."""
        rows = [row for index, scene in enumerate(scenes) for row in self._scene_rows(scene, index, rng)]
        rows += [self._text_only_row(rng) for _ in range(max(1, len(rows) // 50))]
        rows.sort(key=lambda row: len(row.ids))
        cuts = [0, int(0.5 * len(rows)), int(0.8 * len(rows)), len(rows)]
        return tuple(pad_rows(rows[start:stop], self.config.text) for start, stop in pairwise(cuts))

    def _scene_rows(self, scene: Scene, index: int, rng: np.random.Generator) -> list[Row]:
        kinds = ["describe", *rng.choice(_ASKED_KINDS, self.plan.questions - 1)]
        rows = []
        for kind in kinds:
            language = LANGUAGES[int(rng.integers(2))]
            asked = ask_about(scene, kind, language, rng) or ask_about(scene, "exists", language, rng)
            earlier = (
                ask_about(scene, KINDS[int(rng.integers(len(KINDS)))], language, rng) if rng.random() < 0.1 else None
            )
            if asked is not None:
                history = [(earlier.question, earlier.answer)] if earlier is not None else []
                turn = (asked.question, asked.answer)
                rows.append(make_row(self.tokenizer, self.config, turn, language, index, history))
        return rows

    def _text_only_row(self, rng: np.random.Generator) -> Row:
        language = LANGUAGES[int(rng.integers(2))]
        if rng.random() < 0.5:
            question, answer = TEXT_ONLY[language][int(rng.integers(len(TEXT_ONLY[language])))]
        else:
            kind = KINDS[int(rng.integers(len(KINDS)))]
            asked = ask_about(make_scene(int(rng.integers(HELD_OUT_SEEDS))), kind, language, rng)
            question, answer = (asked.question if asked else "?"), NO_PICTURE[language]
        return make_row(self.tokenizer, self.config, (question, answer), language, -1)


def make_row(
    tokenizer: Tokenizer,
    config: VisualGLMConfig,
    turn: Turn,
    language: PromptLanguage,
    scene: int,
    history: Sequence[Turn] = (),
) -> Row:
    """A question, with the picture of a scene unless that is -1, and its answer, cut where the model's window ends.

    Raises `PromptError` if there is no room for question and answer.
    """
    question, answer = turn
    prompt = build_prompt(
        tokenizer,
        config,
        question,
        history=history,
        has_image=scene >= 0,
        language=language,
        max_new_tokens=_LONGEST_ANSWER,
    )
    ids = (*prompt.input_ids, *tokenizer.encode(answer), config.text.eos_token_id)
    return Row(ids[: config.text.max_sequence_length], prompt.image_start, scene)


def pad_rows(rows: Sequence[Row], text: TextConfig) -> Rows:
    """Rows of one forward pass, left-padded; every token from `<sop>` on is a label."""
    layout = pad_batch(
        [row.ids for row in rows],
        [row.image_start for row in rows],
        pad_token_id=text.pad_token_id,
        bos_token_id=text.bos_token_id,
    )
    columns = np.arange(layout.sequence_length)
    answers = columns >= (layout.pad_lengths + layout.context_lengths)[:, None]
    labels = np.where(answers, layout.input_ids, IGNORED_LABEL)
    return Rows(layout, labels, np.array([row.scene for row in rows], np.int64))


def sample_pixels(image_size: int, scenes: int = 300) -> NDArray[np.float32]:
    """Pixels [scenes, 3, S, S] of some scenes, none of them held out."""
    drawn = (draw_scene(make_scene(HELD_OUT_SEEDS - 1 - index)) for index in range(scenes))
    return np.stack([preprocess(picture, image_size) for picture in drawn])


# --- what the drawing knows: extra targets that teach the eye to see before the decoder can talk ----------------------

# Of each patch: kind, colour, size and rank (from the left) of its shape, its character and that one's place.
PATCH_CLASSES = (
    len(SHAPES) + 1,
    len(COLORS) + 1,
    len(SIZES) + 1,
    MAX_SHAPES + 1,
    len(CHARACTERS) + 1,
    MAX_CHARACTERS + 1,
)
# Of each shape's slot: kind, colour, size and the ninth of the canvas it lies in.
SHAPE_CLASSES = (*PATCH_CLASSES[:3], 10)


def scene_patch_targets(scene: Scene, grid: int) -> Ints:
    """See `patch_targets`."""
    return patch_targets(scene.shapes, () if scene.label is None else (scene.label,), grid, ranked=True)


def patch_targets(shapes: Sequence[Shape], labels: Sequence[Label], grid: int, *, ranked: bool) -> Ints:
    """[grid * grid, len(PATCH_CLASSES)]: what each patch shows; 0 is nothing, -100 a rank that shapes do not have."""
    edge = CANVAS / grid
    y, x = (np.mgrid[0:grid, 0:grid] + 0.5) * edge
    targets = np.zeros((grid, grid, len(PATCH_CLASSES)), np.int64)
    for rank, shape in enumerate(shapes, 1):
        covered = np.hypot(x - shape.x, y - shape.y) < max(shape.radius, 0.72 * edge)
        targets[covered, :3] = _attributes(shape.kind, shape.color, shape.size)
        targets[covered, 3] = rank if ranked else IGNORED_LABEL
    for label in labels:
        covered_rows = abs(y[:, 0] - label.y) < max(0.3 * label.height, 0.5 * edge)
        for place, (character, center) in enumerate(zip(label.text, _character_centers(label), strict=True), 1):
            column = int(np.clip(center // edge, 0, grid - 1))
            targets[covered_rows, column, 4:] = (1 + CHARACTERS.index(character), place)
    return targets.reshape(grid * grid, len(PATCH_CLASSES))


def slot_targets(scene: Scene) -> Ints:
    """[4 * shapes + characters + 1]: what the image slots are to tell.

    Attributes and place of each shape from left to right, the label's characters, the texture.
    """
    shapes = np.zeros((MAX_SHAPES, len(SHAPE_CLASSES)), np.int64)
    for index, shape in enumerate(scene.shapes):
        column, row = place_of(shape)
        shapes[index] = (*_attributes(shape.kind, shape.color, shape.size), 1 + 3 * row + column)
    characters = np.zeros(MAX_CHARACTERS, np.int64)
    text = scene.label.text if scene.label is not None else ""
    characters[: len(text)] = [1 + CHARACTERS.index(character) for character in text]
    return np.concatenate([shapes.ravel(), characters, [TEXTURES.index(scene.texture)]])


def _attributes(kind: str, color: str, size: str) -> tuple[int, int, int]:
    return 1 + SHAPES.index(kind), 1 + COLORS.index(color), 1 + SIZES.index(size)


def _character_centers(label: Label) -> list[float]:
    width = 0.62 * label.height * len(label.text)
    return [label.x + width * ((index + 0.5) / len(label.text) - 0.5) for index in range(len(label.text))]
