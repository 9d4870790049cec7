"""What an export is calibrated on and judged by: questions about pictures with their answers, drawn or from a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from visualglm.checkpoint.model_dir import ModelDirectory, open_model_directory
from visualglm.config import VisualGLMConfig
from visualglm.errors import DataError, ImageError, PromptError, TokenizerError
from visualglm.json_lines import image_of, image_source, json_lines, shown
from visualglm.loading import builtin_path
from visualglm.processing.image import load_image, preprocess
from visualglm.processing.layout import Layout
from visualglm.processing.tokenizer import Tokenizer
from visualglm.scenes.dataset import BatchPlan, Row, Rows, SceneBatches, make_row, pad_rows
from visualglm.scenes.held_out import picture_of, questions_about

# Twice as many scenes bring no more: see docs/export.md.
_BATCHES, _PLAN, _SEED = 4, BatchPlan(scenes=16, questions=8), 1
_SCENES_AT_ONCE = 16
_ROWS_AT_ONCE = 8
# More rows bring next to nothing, and take memory.
_MOST_ROWS = 512
# Every so many rows of a file are kept from the calibration, to judge by.
_HELD_OUT_EVERY = 10


@dataclass(frozen=True)
class Examples:
    """Questions about some pictures.

    pixels: float32 [images, 3, S, S]; groups: padded rows, each of which names its picture in `scene_index`.
    """

    pixels: NDArray[np.float32]
    groups: tuple[Rows, ...]


class ExampleSource(Protocol):
    """Where examples come from. Those to judge by are never among those to calibrate on."""

    @property
    def name(self) -> str:
        """What they are, in the plural."""
        ...

    def to_calibrate(self) -> Iterator[Examples]: ...

    def to_judge(self, count: int) -> Iterator[Examples]:
        """No more than `count` scenes or rows; their answers are known."""
        ...


@dataclass(frozen=True)
class DrawnScenes:
    """Scenes as the built-in model was trained on, and such as it has never seen."""

    config: VisualGLMConfig
    tokenizer: Tokenizer
    name: str = "drawn scenes"

    def to_calibrate(self) -> Iterator[Examples]:
        batches = SceneBatches(self.config, self.tokenizer, _PLAN, seed=_SEED)
        for batch in (batches[index] for index in range(_BATCHES)):
            yield Examples(batch.pixels, batch.rows)

    def to_judge(self, count: int) -> Iterator[Examples]:
        size = self.config.vision.image_size
        for start in range(0, count, _SCENES_AT_ONCE):
            scenes = range(start, min(start + _SCENES_AT_ONCE, count))
            rows = [
                make_row(self.tokenizer, self.config, (asked.question, asked.answer), asked.language, scene - start)
                for scene in scenes
                for asked in questions_about(scene)
            ]
            pixels = np.stack([preprocess(picture_of(scene), size) for scene in scenes])
            yield Examples(pixels, (pad_rows(rows, self.config.text),))


@dataclass(frozen=True)
class ExampleRow:
    """A line of a file: a question, perhaps about a picture, and its answer if that is known."""

    where: str
    picture: str | None
    prompt: str
    label: str | None


@dataclass(frozen=True)
class RowFile:
    """The rows of a JSONL file; every tenth of those with an answer is kept to judge by."""

    path: Path
    config: VisualGLMConfig
    tokenizer: Tokenizer
    rows: tuple[ExampleRow, ...]

    @property
    def name(self) -> str:
        return f"rows of {self.path.name}"

    def to_calibrate(self) -> Iterator[Examples]:
        kept = set(self._held_out())
        rows = [row for row in self.rows if row not in kept]
        return self._examples(rows[:: -(-len(rows) // _MOST_ROWS)])

    def to_judge(self, count: int) -> Iterator[Examples]:
        return self._examples(self._held_out()[:count])

    def _held_out(self) -> list[ExampleRow]:
        return [row for row in self.rows if row.label is not None][_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY]

    def _examples(self, rows: Sequence[ExampleRow]) -> Iterator[Examples]:
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            yield self._batch(rows[start : start + _ROWS_AT_ONCE])

    def _batch(self, rows: Sequence[ExampleRow]) -> Examples:
        vision = self.config.vision
        pixels = [np.zeros((0, vision.in_channels, vision.image_size, vision.image_size), np.float32)]
        made = []
        for row in rows:
            try:
                if row.picture is not None:
                    pixels.append(preprocess(load_image(row.picture), vision.image_size)[None])
                made.append(self._row(row, -1 if row.picture is None else len(pixels) - 2))
            except (ImageError, PromptError) as error:
                raise DataError(f"{row.where}: {error}") from error
        return Examples(np.concatenate(pixels), (pad_rows(made, self.config.text),))

    def _row(self, row: ExampleRow, picture: int) -> Row:
        made = make_row(self.tokenizer, self.config, (row.prompt, row.label or ""), "auto", picture)
        # Without an answer the prompt is all there is: no end either.
        return made if row.label is not None else replace(made, ids=made.ids[:-1])


def text_columns(layout: Layout) -> NDArray[np.bool_]:
    """[rows, sequence]: all but the padding."""
    columns: NDArray[np.bool_] = np.arange(layout.sequence_length) >= layout.pad_lengths[:, None]
    return columns


def answer_columns(layout: Layout) -> NDArray[np.bool_]:
    """[rows, sequence]: the columns that tell the next token of an answer, from `<sop>` to the last but one."""
    columns = np.arange(layout.sequence_length)
    first = (layout.pad_lengths + layout.context_lengths)[:, None]
    return (columns >= first) & (columns < layout.sequence_length - 1)


def examples_for(directory: ModelDirectory, file: Path | None) -> ExampleSource | None:
    """Rows of `file` if that is given; drawn scenes for the built-in model and what was made of it; else None.

    Raises `DataError` for a malformed file, `TokenizerError` for one without a tokenizer to read it with.
    """
    if file is None and not _is_like_builtin(directory):
        return None
    if directory.tokenizer_path is None:
        raise TokenizerError(
            f"{directory.path} has no tokenizer.model, so that no rows can be read for it; convert it again with one."
        )
    tokenizer = Tokenizer.for_model(directory.tokenizer_path, directory.config.text)
    if file is None:
        return DrawnScenes(directory.config, tokenizer)
    return RowFile(file, directory.config, tokenizer, _read_rows(file))


def _is_like_builtin(directory: ModelDirectory) -> bool:
    """Whether the sizes and the tokenizer are those of the built-in model."""
    builtin = open_model_directory(builtin_path())
    tokenizers = [each.tokenizer_path and each.tokenizer_path.read_bytes() for each in (directory, builtin)]
    parts = [(each.config.vision, each.config.qformer, each.config.text) for each in (directory, builtin)]
    return tokenizers[0] == tokenizers[1] and parts[0] == parts[1]


def _read_rows(path: Path) -> tuple[ExampleRow, ...]:
    if not path.is_file():
        raise DataError(f"{path} is no file; give a JSONL file of rows to calibrate on.")
    rows = tuple(_parsed(where, values, path.parent) for where, values in json_lines(path))
    if not rows:
        raise DataError(f'{path} has no rows; write {{"img": FILE, "prompt": TEXT, "label": TEXT}} on each line.')
    return rows


def _parsed(where: str, values: dict[str, Any], folder: Path) -> ExampleRow:
    image, prompt, label = image_of(where, values), values.get("prompt"), values.get("label")
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f"{where}: the prompt is {shown(prompt)}; write a question.")
    if label is not None and (not isinstance(label, str) or not label):
        raise DataError(f"{where}: the label is {shown(label)}; write the answer, or leave it out.")
    return ExampleRow(where, None if image is None else image_source(folder, image), prompt, label)
