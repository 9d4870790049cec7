"""The rows of a run: found, checked, split, and with their images encoded where those stay as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from visualglm.config import VisualGLMConfig
from visualglm.processing.tokenizer import Tokenizer
from visualglm.training.batches import Batch, BatchSampler, ReadAhead, step_batches
from visualglm.training.examples import ExampleDataset, ExamplePlan, plan_examples
from visualglm.training.image_cache import ImageCache
from visualglm.training.recipe import DEFAULT_STEPS, FinetuneRecipe
from visualglm.training.rows import Report, RowIndex, open_rows, split_rows


@dataclass(frozen=True)
class PlannedRows:
    """Rows of one file that have been checked, and what they make."""

    index: RowIndex
    plan: ExamplePlan


@dataclass(frozen=True)
class PlannedData:
    """What a run trains on, and what it validates on: None for nothing."""

    train: PlannedRows
    validation: PlannedRows | None

    @property
    def notes(self) -> list[str]:
        """What a user should know before training."""
        return [note for part in self._parts for note in part.plan.notes(part.index)]

    @property
    def longest(self) -> tuple[int, int]:
        """Most tokens of an example, and most that are learnt of one."""
        plans = [part.plan for part in self._parts]
        return max(int(plan.lengths.max()) for plan in plans), max(int(plan.labels.max()) for plan in plans)

    @property
    def has_images(self) -> bool:
        return any(bool(part.plan.has_image.any()) for part in self._parts)

    @property
    def hashes(self) -> dict[str, str | None]:
        """Of the files, so that a resumed run sees the same rows."""
        validation = self.validation.index.sha256 if self.validation else None
        return {"train": self.train.index.sha256, "validation": validation}

    @property
    def _parts(self) -> list[PlannedRows]:
        return [self.train, *([self.validation] if self.validation else [])]


def plan_data(
    recipe: FinetuneRecipe, tokenizer: Tokenizer, config: VisualGLMConfig, report: Report | None = None
) -> PlannedData:
    """Check all rows and images, and split them. Raises `DataError` naming bad rows by line."""
    data = recipe.data

    def planned(path: Path) -> PlannedRows:
        index = open_rows(path)
        plan = plan_examples(index, tokenizer, config, max_length=data.max_length, loss_on=data.loss_on, report=report)
        return PlannedRows(index, plan)

    train = planned(data.train)
    if data.validation is not None:
        return PlannedData(train, planned(data.validation))
    learnt, held_out = split_rows(len(train.index), data.held_out, recipe.run.seed)
    validation = PlannedRows(train.index, train.plan.of_rows(held_out)) if len(held_out) else None
    return PlannedData(PlannedRows(train.index, train.plan.of_rows(learnt)), validation)


class RunData:
    """The batches of one process, `rank` of `world_size`, all a function of the step alone.

    cache: where the embeddings of images are or will be; None: images are read and encoded in every step.
    """

    def __init__(
        self,
        planned: PlannedData,
        recipe: FinetuneRecipe,
        tokenizer: Tokenizer,
        config: VisualGLMConfig,
        cache: ImageCache | None,
        *,
        rank: int,
        world_size: int,
        read_ahead: ReadAhead,
    ) -> None:
        self._run = recipe.run
        self._workers = recipe.data.workers
        self._rank, self._world_size = rank, world_size
        self._read_ahead = read_ahead

        def dataset(part: PlannedRows) -> ExampleDataset:
            length = recipe.data.max_length
            return ExampleDataset(part.index, part.plan, tokenizer, config, max_length=length, cache=cache)

        self.train = dataset(planned.train)
        self.validation = dataset(planned.validation) if planned.validation else None
        rows_at_once = recipe.run.batch_size * world_size
        self._order = BatchSampler(self.train.plan.lengths, rows_at_once * recipe.run.accumulation, recipe.run.seed)
        if self.validation:
            self._validation_order = BatchSampler(self.validation.plan.lengths, rows_at_once, recipe.run.seed)

    @property
    def steps_per_epoch(self) -> int:
        return self._order.steps_per_epoch

    @property
    def total_steps(self) -> int:
        if self._run.epochs is not None:
            return max(1, ceil(self._run.epochs * self.steps_per_epoch))
        return self._run.steps or DEFAULT_STEPS

    def images(self) -> list[Path]:
        """Of all rows, this process's share."""
        parts = [part for part in (self.train, self.validation) if part]
        return list(dict.fromkeys(path for part in parts for path in part.images()))[self._rank :: self._world_size]

    def batches(self, first_step: int) -> Iterator[Sequence[Batch]]:
        """Those of each step from the first on, to the end of the run."""
        return self._batches(self.train, self._order, first_step, self.total_steps)

    def validation_batches(self) -> Iterator[Sequence[Batch]]:
        """Those of the rows that are not trained on; none without such rows."""
        if not self.validation:
            return iter(())
        return self._batches(self.validation, self._validation_order, 0, self._validation_order.steps_per_epoch)

    def _batches(
        self, dataset: ExampleDataset, order: BatchSampler, first_step: int, total_steps: int
    ) -> Iterator[Sequence[Batch]]:
        return step_batches(
            dataset,
            order,
            start_step=first_step,
            stop_step=total_steps,
            rank=self._rank,
            world_size=self._world_size,
            batch_size=self._run.batch_size,
            workers=self._workers,
            read_ahead=self._read_ahead,
        )
