"""From examples to batches: which rows make a step, how a process pads its share of them, and in which order.

All of it is a function of the step alone, so that a resumed run, or one of another number of processes, sees the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from visualglm.config import TextConfig
from visualglm.processing.layout import Layout
from visualglm.training.examples import ExampleDataset, TrainingItem

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Examples of one forward pass, left-padded to the longest of them.

    labels: int64 [batch, seq], -100 where nothing is learnt
    pixels: float32 [images, 3, S, S], image_embeds: float32 [images, queries, text width]; one of them is None, and
        both if no row has an image. In the order of the rows that have one.
    rows: the number in the data file of each row of the batch; empty in a batch from which nothing is learnt, that only
        keeps a process in step with the others.
    """

    layout: Layout
    labels: Ints
    pixels: NDArray[np.float32] | None
    image_embeds: NDArray[np.float32] | None
    rows: tuple[int, ...]

    @property
    def token_count(self) -> int:
        """Labels that count."""
        raise NotImplementedError


def collate(items: Sequence[TrainingItem], text: TextConfig) -> Batch:
    """One padded batch of `items`."""
    raise NotImplementedError


class BatchSampler:
    """Which examples make each step: of like length, every one once an epoch, in an order of (seed, epoch) alone.

    lengths: int64 [examples], in tokens. The last step of an epoch has what is left over.
    """

    def __init__(self, lengths: Ints, rows_per_step: int, seed: int) -> None:
        raise NotImplementedError

    @property
    def steps_per_epoch(self) -> int:
        raise NotImplementedError

    def step(self, step: int) -> Ints:
        """Numbers of the examples of a step counted from the start of the first epoch, from short to long."""
        raise NotImplementedError


def step_batches(
    dataset: ExampleDataset,
    sampler: BatchSampler,
    *,
    start_step: int = 0,
    stop_step: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int,
    workers: int = 0,
) -> Iterator[list[Batch]]:
    """For each step, the batches of this process; one after another, epoch after epoch, up to `stop_step`.

    All processes get equally many batches of a step, so that they can meet in each. Their rows together are those of
    `sampler.step`. Raises `DataError` or `ImageError` if a row cannot be read any more.
    """
    raise NotImplementedError
