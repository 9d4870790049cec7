"""From rows to what a decoder learns from: ids, labels and the place of the image.

Every answer is an example of its own, with the turns before it as its context. In one sequence for a whole
conversation the earlier answers would lie in the context of the last one, where this model sees in both directions:
each of their tokens would be predicted from itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from visualglm.config import VisualGLMConfig
from visualglm.processing.tokenizer import Tokenizer
from visualglm.training.image_cache import ImageCache
from visualglm.training.rows import Report, RowIndex, TrainingRow

Ints = NDArray[np.int64]
IGNORED_LABEL = -100


@dataclass(frozen=True)
class Example:
    """One answer to learn.

    input_ids: int64 [seq], the prompt up to and with `<sop>`, the answer, `<eop>`
    labels: int64 [seq], -100 before `<sop>`, and the ids from there on
    image_start: index of the first image slot, None without an image
    cut: tokens of the answer that were left out, because the row would have been too long; it then has no `<eop>`
    """

    input_ids: Ints
    labels: Ints
    image_start: int | None
    cut: int


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
    cut: int64 [examples], tokens that were cut off the answer
    has_image: bool [examples]
    """

    rows: Ints
    turns: Ints
    lengths: Ints
    cut: Ints
    has_image: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.rows)

    def of_rows(self, rows: Ints) -> ExamplePlan:
        """The examples of some rows only."""
        raise NotImplementedError


def build_example(
    row: TrainingRow, turn: int, tokenizer: Tokenizer, config: VisualGLMConfig, max_length: int
) -> Example:
    """Question and answer number `turn` of a row, in at most `max_length` tokens; raises `DataError`."""
    raise NotImplementedError


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
    raise NotImplementedError


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
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, number: int) -> TrainingItem:
        raise NotImplementedError
