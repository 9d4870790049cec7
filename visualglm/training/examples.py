"""From rows to what a decoder learns from: ids, labels and the place of the image.

Every answer is an example of its own, with the turns before it as its context. In one sequence for a whole
conversation the earlier answers would lie in the context of the last one, where this model sees in both directions:
each of their tokens would be predicted from itself.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from visualglm.config import VisualGLMConfig
from visualglm.errors import ConfigError, DataError, ImageError, PromptError
from visualglm.processing.image import load_image, preprocess
from visualglm.processing.prompt import Prompt, build_prompt
from visualglm.processing.tokenizer import Tokenizer
from visualglm.training.image_cache import ImageCache
from visualglm.training.rows import Report, RowIndex, TrainingRow, check_rows

Ints = NDArray[np.int64]
IGNORED_LABEL = -100


@dataclass(frozen=True)
class Example:
    """One answer to learn.

    input_ids: int64 [seq], the prompt up to and with `<sop>`, the answer, `<eop>`
    labels: int64 [seq], -100 before `<sop>`, and the ids from there on
    image_start: index of the first image slot, None without an image
    cut: tokens at the end of answer and `<eop>` that were left out, because the row would have been too long
    dropped_turns: earlier turns that were left out for the same reason
    """

    input_ids: Ints
    labels: Ints
    image_start: int | None
    cut: int
    dropped_turns: int


@dataclass(frozen=True)
class TrainingItem:
    """An example with its image: float32 pixels [3, S, S] or image_embeds [queries, text width], or neither."""

    example: Example
    row: int
    pixels: NDArray[np.float32] | None
    image_embeds: NDArray[np.float32] | None


@dataclass(frozen=True)
class ExamplePlan:
    """Which examples the rows of a file make, and how long they are.

    rows, turns, lengths: int64 [examples], the number of the row, the place of the answer in it, the length in tokens
    labels: int64 [examples], those of the tokens that are learnt
    cut, dropped_turns: int64 [examples], what was left out of them (see `Example`)
    has_image: bool [examples]
    """

    rows: Ints
    turns: Ints
    lengths: Ints
    labels: Ints
    cut: Ints
    dropped_turns: Ints
    has_image: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.rows)

    def of_rows(self, rows: Ints) -> ExamplePlan:
        """The examples of some rows only."""
        kept = np.isin(self.rows, rows)
        return ExamplePlan(*(getattr(self, field.name)[kept] for field in fields(self)))

    def notes(self, index: RowIndex) -> list[str]:
        """What a user should know before training: what was left out of how many examples, and what has no image."""
        told = (
            (~self.has_image, "have no image and are of text alone"),
            (self.cut > 0, f"had their answer cut, by {self.cut.sum()} tokens in all, to fit"),
            (self.dropped_turns > 0, f"lost their oldest turns, {self.dropped_turns.sum()} in all, to fit"),
        )
        return [
            f"{which.sum()} of {len(self)} answers to learn {what}; the first is {index.where(self.rows[which][0])}."
            for which, what in told
            if which.any()
        ]


def longest_row(config: VisualGLMConfig, max_length: int | None) -> int:
    """`max_length`, by default the window of the model; raises `ConfigError` if it is beyond that."""
    window = config.text.max_sequence_length
    if max_length is not None and max_length > window:
        raise ConfigError(f"data.max_length is {max_length}, more than the {window} tokens of the model; give less.")
    return max_length or window


def build_example(
    row: TrainingRow, turn: int, tokenizer: Tokenizer, config: VisualGLMConfig, max_length: int
) -> Example:
    """Question and answer number `turn` of a row, in at most `max_length` tokens.

    If that is too few, the oldest turns before it go first, as they do when the model is asked, and then the end of
    the answer. Raises `DataError` if the image and the question leave no room for any of it.
    """
    question, answer = row.turns[turn]
    answer_ids = [*tokenizer.encode(answer), config.text.eos_token_id]

    def prompt_beside(kept: int, *, with_history: bool) -> Prompt:
        return build_prompt(
            tokenizer,
            config,
            question,
            history=row.turns[:turn] if with_history else (),
            has_image=row.source is not None,
            max_new_tokens=config.text.max_sequence_length - max_length + kept,
        )

    try:
        prompt = prompt_beside(1, with_history=False)
    except PromptError as error:
        what = f"question {turn + 1}{' with the image' if row.source else ''}"
        # The window of the model is as it is.
        remedy = "raise data.max_length or " if max_length < config.text.max_sequence_length else ""
        raise DataError(
            f"{what} leaves no room for its answer in {max_length} tokens; {remedy}shorten the question."
        ) from error
    kept_ids = answer_ids[: max_length - len(prompt.input_ids)]
    if turn:
        prompt = prompt_beside(len(kept_ids), with_history=True)
    return _example(prompt, kept_ids, cut=len(answer_ids) - len(kept_ids))


def plan_examples(
    index: RowIndex,
    tokenizer: Tokenizer,
    config: VisualGLMConfig,
    *,
    max_length: int | None = None,
    loss_on: Literal["all", "last"] = "all",
    report: Report | None = None,
) -> ExamplePlan:
    """Check every row and every image of a file, and measure its examples.

    max_length: None is the window of the model. Raises `DataError` listing the bad rows by line (see `check_rows`),
    `ConfigError` if `max_length` is beyond the window.
    """
    longest = longest_row(config, max_length)
    found: list[tuple[int, ...]] = []

    def measure(number: int, row: TrainingRow) -> None:
        last = len(row.turns) - 1
        for turn in range(last if loss_on == "last" else 0, last + 1):
            example = build_example(row, turn, tokenizer, config, longest)
            trims = (example.cut, example.dropped_turns)
            learnt = int((example.labels != IGNORED_LABEL).sum())
            found.append((number, turn, len(example.input_ids), learnt, *trims, row.source is not None))

    check_rows(index, measure, report=report)
    rows, turns, lengths, labels, cut, dropped_turns, has_image = np.array(found, np.int64).T
    return ExamplePlan(rows, turns, lengths, labels, cut, dropped_turns, has_image.astype(np.bool_))


class ExampleDataset:
    """The examples of a plan with their images, made when asked for. Can be sent to other processes.

    cache: where the embeddings of the images are; without it, items hold pixels.
    """

    def __init__(
        self,
        index: RowIndex,
        plan: ExamplePlan,
        tokenizer: Tokenizer,
        config: VisualGLMConfig,
        *,
        max_length: int | None = None,
        cache: ImageCache | None = None,
    ) -> None:
        self.index = index
        self.plan = plan
        self.tokenizer = tokenizer
        self.config = config
        self.max_length = longest_row(config, max_length)
        self.cache = cache

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, number: int) -> TrainingItem:
        """One example; raises `DataError` naming its line if the row or its image cannot be read any more."""
        place, turn = int(self.plan.rows[number]), int(self.plan.turns[number])
        row = self.index[place]
        example = build_example(row, turn, self.tokenizer, self.config, self.max_length)
        try:
            return TrainingItem(example, place, *self._image(row))
        except ImageError as error:
            raise DataError(f"{self.index.where(place)}: {error}") from error

    def images(self) -> list[Path]:
        """The images of all examples, each path once, in the order of the rows; every row is read."""
        rows = (self.index[int(place)] for place in np.unique(self.plan.rows[self.plan.has_image]))
        return list(dict.fromkeys(row.source for row in rows if row.source is not None))

    def _image(self, row: TrainingRow) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
        """Pixels and embeddings, as far as they are wanted."""
        if row.source is None:
            return None, None
        if self.cache is not None:
            return None, self.cache.read(row.source)
        return preprocess(load_image(row.source), self.config.vision.image_size), None


def _example(prompt: Prompt, answer_ids: list[int], *, cut: int) -> Example:
    input_ids = np.array([*prompt.input_ids, *answer_ids], np.int64)
    labels = input_ids.copy()
    labels[: len(prompt.input_ids) - 1] = IGNORED_LABEL
    return Example(input_ids, labels, prompt.image_start, cut, prompt.dropped_turns)
