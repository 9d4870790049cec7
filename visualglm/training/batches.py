"""From examples to batches: which rows make a step, how a process pads its share of them, and in which order.

All of it is a function of the step alone, so that a resumed run, or one of another number of processes, sees the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from visualglm.config import TextConfig
from visualglm.errors import VisualGLMError
from visualglm.processing.layout import Layout, pad_batch
from visualglm.signals import keep_signals_away
from visualglm.training.examples import IGNORED_LABEL, ExampleDataset, TrainingItem

Ints = NDArray[np.int64]
S = TypeVar("S")
R = TypeVar("R")

# As many as the usual samplers take: padding is small, and who shares a step with whom is still by chance.
_STEPS_SORTED_TOGETHER = 50


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
        """Labels that count: the tokens whose losses add up to that of the batch."""
        return int((self.labels[:, 1:] != IGNORED_LABEL).sum())


def collate(items: Sequence[TrainingItem], text: TextConfig, *, learns: bool = True) -> Batch:
    """One padded batch of `items`; without `learns`, nothing in it counts."""
    examples = [item.example for item in items]
    layout = pad_batch(
        [example.input_ids.tolist() for example in examples],
        [example.image_start for example in examples],
        pad_token_id=text.pad_token_id,
        bos_token_id=text.bos_token_id,
    )
    labels = np.full(layout.input_ids.shape, IGNORED_LABEL, np.int64)
    for row, example in enumerate(examples if learns else ()):
        labels[row, layout.pad_lengths[row] :] = example.labels
    return Batch(
        layout,
        labels,
        _stacked([item.pixels for item in items]),
        _stacked([item.image_embeds for item in items]),
        tuple(item.row for item in items) if learns else (),
    )


class BatchSampler:
    """Which examples make each step: of like length, every one once an epoch, in an order of (seed, epoch) alone.

    lengths: int64 [examples], in tokens. The last step of an epoch has what is left over.
    """

    def __init__(self, lengths: Ints, rows_per_step: int, seed: int) -> None:
        self.lengths = lengths
        self.rows_per_step = rows_per_step
        self.seed = seed
        self._epoch: tuple[int, list[Ints]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.lengths) // self.rows_per_step)

    def step(self, step: int) -> Ints:
        """Numbers of the examples of a step counted from the start of the first epoch, from short to long."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._steps(epoch)
        return self._epoch[1][place]

    def _steps(self, epoch: int) -> list[Ints]:
        """Examples are sorted by length within a few steps' worth of them at a time, so that steps still differ."""
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(self.lengths))
        whole = len(order) // self.rows_per_step
        steps_sorted_together = max(1, min(_STEPS_SORTED_TOGETHER, whole // 4))
        cut, size = whole * self.rows_per_step, steps_sorted_together * self.rows_per_step
        ordered = [self._by_length(order[start : min(start + size, cut)]) for start in range(0, cut, size)]
        steps = np.split(np.concatenate(ordered), whole) if whole else []
        shuffled = [steps[place] for place in random.permutation(whole)]
        # What is left over is drawn before anything is sorted: else it would always be the longest.
        return [*shuffled, self._by_length(order[cut:])] if cut < len(order) else shuffled

    def _by_length(self, examples: Ints) -> Ints:
        return examples[np.argsort(self.lengths[examples], kind="stable")]


@dataclass(frozen=True)
class _Share:
    """What one process takes of a step: the examples of each of its batches; none where only others have some left.

    stand_in: an example for the batches without any.
    """

    batches: tuple[Ints, ...]
    stand_in: int


class ReadAhead(Protocol):
    """Calls a function with one thing after another, in order, by workers ahead of who asks; 0: when asked."""

    def __call__(self, load: Callable[[S], R], things: Iterable[S], workers: int) -> Iterator[R]: ...


def read_by_threads(load: Callable[[S], R], things: Iterable[S], workers: int) -> Iterator[R]:
    """A `ReadAhead` that needs no library: threads, which read files and pictures side by side."""
    if not workers:
        yield from map(load, things)
        return
    under_way: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(workers, initializer=keep_signals_away)
    try:
        for thing in things:
            under_way.append(pool.submit(load, thing))
            if len(under_way) > 2 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


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
    read_ahead: ReadAhead = read_by_threads,
) -> Iterator[list[Batch]]:
    """For each step, the batches of this process; one after another, epoch after epoch, up to `stop_step`.

    All processes get equally many batches of a step, so that they can meet in each. Their rows together are those of
    `sampler.step`. Raises `DataError` if a row cannot be read any more, or a worker dies.
    """
    steps = count(start_step) if stop_step is None else range(start_step, stop_step)
    shares = (_share(sampler.step(step), rank, world_size, batch_size) for step in steps)
    for loaded in read_ahead(_StepLoader(dataset), shares, workers):
        if isinstance(loaded, VisualGLMError):
            raise loaded
        yield loaded


def _share(examples: Ints, rank: int, world_size: int, batch_size: int) -> _Share:
    """Neighbours in length go into one batch, and into the batches that processes work on at the same time."""
    rounds = -(-len(examples) // (world_size * batch_size))
    parts = np.array_split(examples, rounds * world_size)
    return _Share(tuple(parts[rank::world_size]), int(examples[0]))


class _StepLoader:
    """The batches of a share; what goes wrong is handed over like them, as workers would wrap it in a traceback."""

    def __init__(self, dataset: ExampleDataset) -> None:
        self.dataset = dataset

    def __call__(self, share: _Share) -> list[Batch] | VisualGLMError:
        try:
            return [self._batch(examples, share.stand_in) for examples in share.batches]
        except VisualGLMError as error:
            return error

    def _batch(self, examples: Ints, stand_in: int) -> Batch:
        items = [self.dataset[int(number)] for number in examples]
        text = self.dataset.config.text
        return collate(items, text) if items else collate([self.dataset[stand_in]], text, learns=False)


def _stacked(arrays: Sequence[NDArray[np.float32] | None]) -> NDArray[np.float32] | None:
    given = [array for array in arrays if array is not None]
    return np.stack(given) if given else None
