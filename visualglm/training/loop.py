"""The training loop: steps, reports and checkpoints, whatever computes them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from visualglm.training.checkpoints import Groups, TrainingState, load_checkpoint, save_checkpoint
from visualglm.training.fingerprint import newest_of_run
from visualglm.training.recipe import FinetuneRecipe

B = TypeVar("B")
B_contra = TypeVar("B_contra", contravariant=True)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long to train and how a step is made; none of it says on what."""

    total_steps: int
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 20


@dataclass
class StepReport:
    """What one step measured: `losses` by name, their mean over all that all processes saw of the step;
    the gradient norm before clipping; `weight`, what the losses were divided by, such as tokens."""

    step: int
    losses: dict[str, float]
    grad_norm: float
    learning_rate: float
    weight: float = 1.0
    skipped: bool = False
    seconds: float = field(default=0.0)


@dataclass(frozen=True)
class Learnt:
    """What a learner found in one step; see `StepReport`."""

    losses: dict[str, float]
    grad_norm: float
    weight: float


@dataclass(frozen=True)
class LearnerState:
    """What a learner needs to go on: what all processes have alike, what each has for itself, and plain values."""

    shared: Groups
    own: Groups
    values: Mapping[str, Any]


class Learner(Protocol[B_contra]):
    """A model and its optimiser, in one process of a run; with others it meets in every step."""

    def learn(self, batches: Sequence[B_contra], rate: float) -> Learnt:
        """One step from this process's batches. One whose gradients are not finite changes nothing.

        Raises `DeviceError` if another process is gone.
        """

    def evaluate(self, batches: Iterable[Sequence[B_contra]]) -> dict[str, float]:
        """The mean losses of `batches`, from which nothing is learnt; each process brings its own, equally many."""

    def state(self) -> LearnerState: ...

    def restore(self, state: LearnerState) -> None: ...


@dataclass(frozen=True)
class Course(Generic[B]):
    """What is learnt in each step, and how fast.

    batches: first step → for each step from there on, the batches of this process; as many in every process.
    learning_rate: step, from 0 → the rate.
    """

    batches: Callable[[int], Iterable[Sequence[B]]]
    learning_rate: Callable[[int], float]


class _Meeting(Protocol):
    @property
    def rank(self) -> int: ...

    def wait(self) -> None: ...


class Trainer(Generic[B]):
    """Takes a learner through a course.

    fingerprint: what must be the same for a run to go on; see `newest_of_run`.
    notes: plain values that the user of the loop wants in checkpoints and back from them.
    """

    def __init__(
        self,
        config: LoopConfig,
        learner: Learner[B],
        course: Course[B],
        processes: _Meeting,
        folder: Path,
        fingerprint: Mapping[str, Any],
    ) -> None:
        self.config = config
        self.learner = learner
        self.course = course
        self.processes = processes
        self.folder = folder
        self.fingerprint = dict(fingerprint)
        self.step = 0
        self.skipped_steps = 0
        self.notes: dict[str, Any] = {}

    def resume(self) -> bool:
        """Go on from the newest checkpoint in the folder, if there is one.

        Raises `ConfigError` if it was written by another recipe or by another number of processes, `CheckpointError`
        if it is damaged.
        """
        newest = newest_of_run(self.folder, self.fingerprint)
        if newest is None:
            return False
        state = load_checkpoint(newest, self.processes.rank)
        self.learner.restore(LearnerState(state.tensors, state.own, state.values))
        self.step = state.step
        self.skipped_steps = int(state.values["skipped_steps"])
        self.notes = dict(state.values["notes"])
        return True

    def run(self) -> Iterator[StepReport]:
        """Train to the end; each step's report comes as it is done, and only then it is checkpointed, if it is due.

        The last step always is. Raises `DeviceError` if another process is gone.
        """
        batches = iter(self.course.batches(self.step))
        while self.step < self.config.total_steps:
            started = time.perf_counter()
            report = self._train_step(next(batches))
            report.seconds = time.perf_counter() - started
            yield report
            if self.step % self.config.checkpoint_every == 0 or self.step == self.config.total_steps:
                self.save()

    def save(self) -> None:
        """Write a checkpoint; all processes do it together."""
        learner = self.learner.state()
        values = {
            "fingerprint": self.fingerprint,
            "skipped_steps": self.skipped_steps,
            **learner.values,
            "notes": self.notes,
        }
        save_checkpoint(
            self.folder,
            TrainingState(self.step, learner.shared, values, learner.own),
            keep=self.config.keep_checkpoints,
            rank=self.processes.rank,
            wait=self.processes.wait,
        )

    def _train_step(self, batches: Sequence[B]) -> StepReport:
        rate = self.course.learning_rate(self.step)
        learnt = self.learner.learn(batches, rate)
        self.step += 1
        skipped = not isfinite(learnt.grad_norm)
        self.skipped_steps += skipped
        return StepReport(self.step, learnt.losses, learnt.grad_norm, rate, learnt.weight, skipped)


def loop_config(recipe: FinetuneRecipe, total_steps: int) -> LoopConfig:
    """What a recipe of fine-tuning says of the loop."""
    optimizer, run = recipe.optimizer, recipe.run
    return LoopConfig(
        total_steps=total_steps,
        weight_decay=optimizer.weight_decay,
        betas=optimizer.betas,
        eps=optimizer.eps,
        max_grad_norm=optimizer.max_grad_norm,
        checkpoint_every=run.checkpoint_every,
        keep_checkpoints=run.keep_checkpoints,
        log_every=run.log_every,
    )
