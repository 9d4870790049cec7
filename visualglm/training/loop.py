"""The training loop: steps, schedule, clipping, checkpoints, progress and the loss curve."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, distributed, nn

from visualglm.errors import ConfigError
from visualglm.training.checkpoints import (
    TrainingState,
    checkpoint_folders,
    flatten_optimizer,
    load_checkpoint,
    restore_optimizer,
    save_checkpoint,
)
from visualglm.training.schedule import warmup_cosine

B = TypeVar("B")


@dataclass(frozen=True)
class LoopConfig:
    """How long and how fast to train; none of it says on what."""

    total_steps: int
    learning_rate: float
    warmup_steps: int = 100
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 20


@dataclass
class StepReport:
    """What one step measured: `losses` by name, the gradient norm before clipping, the learning rate."""

    step: int
    losses: dict[str, float]
    grad_norm: float
    learning_rate: float
    skipped: bool = False
    seconds: float = field(default=0.0)


class Trainer(Generic[B]):
    """Trains the parameters of `modules` on batches that are a function of the step alone.

    compute_losses: batch → named losses; their sum is what is minimised.
    batches: first step → the batches from that step on; so a resumed run sees what the first would have.
    """

    def __init__(
        self,
        config: LoopConfig,
        modules: Mapping[str, nn.Module],
        compute_losses: Callable[[B], dict[str, Tensor]],
        batches: Callable[[int], Iterable[B]],
        folder: Path,
        fingerprint: Mapping[str, Any],
        *,
        saves: bool = True,
    ) -> None:
        self.config = config
        self.modules = modules
        self.compute_losses = compute_losses
        self.batches = batches
        self.folder = folder
        self.fingerprint = dict(fingerprint)
        self.saves = saves
        self.parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        self.step = 0
        self.skipped_steps = 0

    def resume(self) -> bool:
        """Go on from the newest checkpoint in the folder, if there is one.

        Raises `ConfigError` if it was written by another recipe, `CheckpointError` if it is damaged.
        """
        found = checkpoint_folders(self.folder)
        if not found:
            return False
        state = load_checkpoint(found[-1])
        if state.values["fingerprint"] != self.fingerprint:
            raise ConfigError(
                f"{found[-1]} was written by another recipe; resume with that one or train into another folder."
            )
        for name, module in self.modules.items():
            module.load_state_dict(state.tensors[name])
        restore_optimizer(self.optimizer, state.tensors["optimizer"])
        self.step = state.step
        self.skipped_steps = int(state.values["skipped_steps"])
        return True

    def run(self) -> Iterator[StepReport]:
        """Train to the end; each step's report comes as it is done. The last step is checkpointed."""
        batches = iter(self.batches(self.step))
        while self.step < self.config.total_steps:
            started = time.perf_counter()
            report = self._train_step(next(batches))
            report.seconds = time.perf_counter() - started
            if self.step % self.config.checkpoint_every == 0 or self.step == self.config.total_steps:
                self.save()
            yield report

    def save(self) -> None:
        """Write a checkpoint, in the one process of a run that does."""
        if not self.saves:
            return
        tensors = {name: module.state_dict() for name, module in self.modules.items()}
        values = {"fingerprint": self.fingerprint, "skipped_steps": self.skipped_steps}
        state = TrainingState(self.step, {**tensors, "optimizer": flatten_optimizer(self.optimizer)}, values)
        save_checkpoint(self.folder, state, keep=self.config.keep_checkpoints)

    def _train_step(self, batch: B) -> StepReport:
        config = self.config
        factor = warmup_cosine(self.step, warmup_steps=config.warmup_steps, total_steps=config.total_steps)
        rate = config.learning_rate * factor
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.compute_losses(batch)
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        average_gradients(self.parameters)
        norm = float(nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm))
        # One bad batch must not ruin the weights: a step whose gradient is not finite is left out, and counted.
        finite = norm == norm and norm != float("inf")
        if finite:
            self.optimizer.step()
        else:
            self.skipped_steps += 1
        self.step += 1
        return StepReport(
            self.step, {name: float(loss.detach()) for name, loss in losses.items()}, norm, rate, not finite
        )


def share_parameters(module: nn.Module) -> None:
    """Give every process the parameters of the first; nothing to do where there is one process."""
    if distributed.is_initialized():
        for parameter in module.parameters():
            distributed.broadcast(parameter.data, src=0)


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Mean of the gradients over all processes, in one exchange; nothing to do where there is one process."""
    if not distributed.is_initialized():
        return
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for parameter, mean in zip(parameters, flat.split_with_sizes([p.numel() for p in parameters]), strict=True):
        parameter.grad = mean.view_as(parameter)


def append_log(path: Path, report: StepReport) -> None:
    """One JSON line a step that is logged."""
    with path.open("a", encoding="utf-8") as log:
        log.write(json.dumps(vars(report)) + "\n")
