"""The training loop: steps, accumulation, clipping, loss scaling and checkpoints, in one process or many."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from visualglm.training.checkpoints import TrainingState, load_checkpoint, save_checkpoint
from visualglm.training.distributed import Processes, lost_process_named, own_part, split_like
from visualglm.training.fingerprint import newest_of_run

B = TypeVar("B")

_FIRST_SCALE = 65536.0


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
class Task(Generic[B]):
    """What is trained, and on what.

    module: its parameters that require gradients are trained; if `sharded`, they are split over the processes.
    losses: (module, batch) → the sums of the batch's losses by name; what is minimised is their total, divided by
        the weight of the whole step. Must call the module that it gets: that one exchanges gradients.
    weigh: batch → what it counts for, such as its tokens.
    batches: first step → for each step from there on, the batches of this process; as many in every process.
    learning_rate: step, from 0 → the rate.
    kept: what checkpoints hold beside the optimiser, by name; None: the parameters that are trained.
    scaled: whether losses are scaled, because gradients are computed in float16.
    """

    module: nn.Module
    losses: Callable[[nn.Module, B], Mapping[str, Tensor]]
    weigh: Callable[[B], float]
    batches: Callable[[int], Iterable[Sequence[B]]]
    learning_rate: Callable[[int], float]
    kept: Mapping[str, Tensor] | None = None
    sharded: bool = False
    scaled: bool = False


class Trainer(Generic[B]):
    """Runs a task.

    fingerprint: what must be the same for a run to go on; see `newest_of_run`.
    notes: plain values that the user of the loop wants in checkpoints and back from them.
    """

    def __init__(
        self, config: LoopConfig, task: Task[B], processes: Processes, folder: Path, fingerprint: Mapping[str, Any]
    ) -> None:
        self.config = config
        self.task = task
        self.processes = processes
        self.folder = folder
        self.fingerprint = dict(fingerprint)
        self.parameters = {name: p for name, p in task.module.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            0.0,
            config.betas,
            config.eps,
            config.weight_decay,
            fused=processes.device.type in ("cpu", "cuda"),
        )
        self.scaler = torch.amp.GradScaler(processes.device.type, init_scale=_FIRST_SCALE, enabled=task.scaled)
        self.module = task.module if task.sharded else processes.replicate(task.module)
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
        self._restore(load_checkpoint(newest, self.processes.rank))
        return True

    def run(self) -> Iterator[StepReport]:
        """Train to the end; each step's report comes as it is done, and only then it is checkpointed, if it is due.

        The last step always is. Raises `DeviceError` if another process is gone.
        """
        batches = iter(self.task.batches(self.step))
        while self.step < self.config.total_steps:
            with lost_process_named():
                started = time.perf_counter()
                with own_randomness():
                    step_batches = next(batches)
                report = self._train_step(step_batches)
                report.seconds = time.perf_counter() - started
            yield report
            if self.step % self.config.checkpoint_every == 0 or self.step == self.config.total_steps:
                self.save()

    def evaluate(self, batches: Iterable[Sequence[B]]) -> dict[str, float]:
        """The mean losses of `batches`, from which nothing is learnt; each process brings its own, equally many."""
        module = self.task.module
        training = [part for part in module.modules() if part.training]
        module.eval()
        with torch.no_grad(), own_randomness(), lost_process_named():
            found = [(self.task.losses(module, batch), self.task.weigh(batch)) for step in batches for batch in step]
            weight, losses = self._means([losses for losses, _ in found], [weight for _, weight in found])
        for part in training:
            part.training = True
        return losses if weight else {}

    def save(self) -> None:
        """Write a checkpoint; all processes do it together."""
        shared, own = self._tensors()
        values = {
            "fingerprint": self.fingerprint,
            "skipped_steps": self.skipped_steps,
            "scaler": self.scaler.state_dict(),
            "notes": self.notes,
        }
        state = TrainingState(self.step, shared, values, own)
        with lost_process_named():
            save_checkpoint(
                self.folder,
                state,
                keep=self.config.keep_checkpoints,
                rank=self.processes.rank,
                wait=self.processes.wait,
            )

    def _tensors(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
        """What the first process writes for all, and what each writes for itself."""
        kept = self.task.kept if self.task.kept is not None else self.parameters
        weights = {name: own_part(tensor) for name, tensor in kept.items()}
        slots = {
            f"{name}.{slot}": own_part(value)
            for name, parameter in self.parameters.items()
            for slot, value in self.optimizer.state[parameter].items()
        }
        groups = {"weights": weights, "optimizer": slots}
        random = {"random": random_state(self.processes.device)}
        return ({}, groups | random) if self.task.sharded else (groups, random)

    def _restore(self, state: TrainingState) -> None:
        groups = {**state.tensors, **state.own}
        kept = self.task.kept if self.task.kept is not None else self.parameters
        with torch.no_grad():
            for name, tensor in kept.items():
                own_part(tensor).copy_(groups["weights"][name])
        for flat, value in groups["optimizer"].items():
            name, _, slot = flat.rpartition(".")
            parameter = self.parameters[name]
            on_device = value.to(parameter.device)
            self.optimizer.state[parameter][slot] = on_device if slot == "step" else split_like(parameter, on_device)
        set_random_state(groups["random"], self.processes.device)
        self.scaler.load_state_dict(state.values["scaler"])
        self.step = state.step
        self.skipped_steps = int(state.values["skipped_steps"])
        self.notes = dict(state.values["notes"])

    def _train_step(self, batches: Sequence[B]) -> StepReport:
        rate = self.task.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        weights = [self.task.weigh(batch) for batch in batches]
        (weight,) = self.processes.sums([sum(weights)])
        last = len(batches) - 1
        found = [self._learn_from(batch, weight, last=index == last) for index, batch in enumerate(batches)]
        norm = self._update()
        self.step += 1
        _, losses = self._means(found, weights)
        return StepReport(self.step, losses, norm, rate, weight, skipped=not isfinite(norm))

    def _learn_from(self, batch: B, weight: float, *, last: bool) -> dict[str, Tensor]:
        """Adds to the gradients; with the last batch they are averaged over the processes, so that the sums of all
        divided by `weight` are what is minimised."""
        with nullcontext() if last else self.processes.accelerator.no_sync(self.module):
            losses = self.task.losses(self.module, batch)
            total = torch.stack(list(losses.values())).sum() * (self.processes.world_size / weight)
            self.scaler.scale(total).backward()  # type: ignore[no-untyped-call]
        return {name: loss.detach() for name, loss in losses.items()}

    def _update(self) -> float:
        """Clip the gradients and change the parameters; returns the norm, which all processes find alike.

        One bad batch must not ruin the weights: a step whose gradient is not finite is left out, and counted.
        """
        self.scaler.unscale_(self.optimizer)
        norm = float(
            self.processes.accelerator.clip_grad_norm_(list(self.parameters.values()), self.config.max_grad_norm)
        )
        if isfinite(norm):
            self.scaler.step(self.optimizer)
            self.scaler.update()
            return norm
        self.skipped_steps += 1
        if self.scaler.is_enabled():
            # What is not finite may lie in the part of another process: the scale is set, and alike in all.
            self.scaler.update(self.scaler.get_scale() * self.scaler.get_backoff_factor())
        return norm

    def _means(
        self, losses: Sequence[Mapping[str, Tensor]], weights: Sequence[float]
    ) -> tuple[float, dict[str, float]]:
        """The weight of all batches of all processes, and the mean of each loss over them."""
        names = list(losses[0]) if losses else []
        totals = [sum(float(found[name]) for found in losses) for name in names]
        weight, *sums = self.processes.sums([sum(weights), *totals])
        return weight, {name: total / weight for name, total in zip(names, sums, strict=True) if weight}


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Of the generators that dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state()
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device"])


@contextmanager
def own_randomness() -> Iterator[None]:
    """What is drawn inside changes nothing of what is drawn after it: loaders of data start when they like."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
