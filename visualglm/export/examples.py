"""What an export is calibrated on and judged by: questions about pictures with their answers, drawn or from a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from visualglm.checkpoint.model_dir import ModelDirectory, open_model_directory
from visualglm.config import VisualGLMConfig
from visualglm.errors import DataError, ImageError, TokenizerError
from visualglm.loading import builtin_path
from visualglm.processing.image import load_image, preprocess
from visualglm.processing.layout import Layout
from visualglm.processing.tokenizer import Tokenizer
from visualglm.scenes.dataset import BatchPlan, Row, Rows, SceneBatches, make_row, pad_rows
from visualglm.scenes.held_out import picture_of, questions_about
from visualglm.training.examples import build_example
from visualglm.training.rows import TrainingRow, check_rows, open_rows

# Twice as many scenes bring no more: see docs/export.md.
_BATCHES, _PLAN, _SEED = 4, BatchPlan(scenes=16, questions=8), 1
_SCENES_AT_ONCE = 16
_ROWS_AT_ONCE = 8
# More bring next to nothing, and take memory.
_MOST_ANSWERS = 512
# Every so many rows of a file are kept from the calibration, to judge by; of fewer rows the last.
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
class _Answer:
    """Answer number `turn`, from 0, of a row of a file; `where` that is, in words."""

    where: str
    row: TrainingRow
    turn: int


@dataclass(frozen=True)
class RowFile:
    """The rows of a file, each with where it is; every tenth, or else the last, is kept to judge by.

    Each answer of a conversation is an example of its own.
    """

    path: Path
    config: VisualGLMConfig
    tokenizer: Tokenizer
    rows: tuple[tuple[str, TrainingRow], ...]

    @property
    def name(self) -> str:
        return f"rows of {self.path.name}"

    def to_calibrate(self) -> Iterator[Examples]:
        answers = self._answers(held_out=False)
        return self._examples(answers[:: -(-len(answers) // _MOST_ANSWERS)])

    def to_judge(self, count: int) -> Iterator[Examples]:
        return self._examples(self._answers(held_out=True)[:count])

    def _answers(self, *, held_out: bool) -> list[_Answer]:
        every = min(_HELD_OUT_EVERY, len(self.rows))
        return [
            _Answer(where, row, turn)
            for number, (where, row) in enumerate(self.rows, 1)
            if (number % every == 0) == held_out
            for turn in range(len(row.turns))
        ]

    def _examples(self, answers: Sequence[_Answer]) -> Iterator[Examples]:
        for start in range(0, len(answers), _ROWS_AT_ONCE):
            yield self._batch(answers[start : start + _ROWS_AT_ONCE])

    def _batch(self, answers: Sequence[_Answer]) -> Examples:
        vision = self.config.vision
        pixels = [np.zeros((0, vision.in_channels, vision.image_size, vision.image_size), np.float32)]
        places: dict[Path | None, int] = {None: -1}
        for answer in answers:
            source = answer.row.source
            if source is not None and source not in places:
                places[source] = len(pixels) - 1
                pixels.append(self._pixels(answer.where, source))
        rows = [self._row(answer, places[answer.row.source]) for answer in answers]
        return Examples(np.concatenate(pixels), (pad_rows(rows, self.config.text),))

    def _pixels(self, where: str, source: Path) -> NDArray[np.float32]:
        """[1, 3, S, S]"""
        try:
            return preprocess(load_image(source), self.config.vision.image_size)[None]
        except ImageError as error:
            raise DataError(f"{where}: {error}") from error

    def _row(self, answer: _Answer, picture: int) -> Row:
        window = self.config.text.max_sequence_length
        made = build_example(answer.row, answer.turn, self.tokenizer, self.config, window)
        return Row(tuple(made.input_ids.tolist()), made.image_start, picture)


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

    Raises `DataError` that names the bad rows of a file, or for one row alone; `TokenizerError` if there is nothing to
    read rows with.
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
    return _row_file(file, directory.config, tokenizer)


def _is_like_builtin(directory: ModelDirectory) -> bool:
    """Whether the sizes and the tokenizer are those of the built-in model."""
    builtin = open_model_directory(builtin_path())
    tokenizers = [each.tokenizer_path and each.tokenizer_path.read_bytes() for each in (directory, builtin)]
    parts = [(each.config.vision, each.config.qformer, each.config.text) for each in (directory, builtin)]
    return tokenizers[0] == tokenizers[1] and parts[0] == parts[1]


def _row_file(path: Path, config: VisualGLMConfig, tokenizer: Tokenizer) -> RowFile:
    index, rows = open_rows(path), list[tuple[str, TrainingRow]]()
    if len(index) == 1:
        raise DataError(f"{path} has one row alone, which would be kept to judge by; write more of them.")

    def take(number: int, row: TrainingRow) -> None:
        for turn in range(len(row.turns)):
            build_example(row, turn, tokenizer, config, config.text.max_sequence_length)
        rows.append((index.where(number), row))

    check_rows(index, take)
    return RowFile(path, config, tokenizer, tuple(rows))
