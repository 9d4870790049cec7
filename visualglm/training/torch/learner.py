"""How a torch module learns: accumulation, clipping, loss scaling and AdamW, in one process or many."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import isfinite
from typing import Any, Generic, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from visualglm.training.loop import Learner, LearnerState, Learnt, LoopConfig
from visualglm.training.torch.distributed import Processes, lost_process_named, own_part, split_like

B = TypeVar("B")

_FIRST_SCALE = 65536.0


@dataclass(frozen=True)
class Task(Generic[B]):
    """What is trained.

    module: its parameters that require gradients are trained; if `sharded`, they are split over the processes.
    losses: (module, batch) → the sums of the batch's losses by name; what is minimised is their total, divided by
        the weight of the whole step. Must call the module that it gets: that one exchanges gradients.
    weigh: batch → what it counts for, such as its tokens.
    kept: what checkpoints hold beside the optimiser, by name; None: the parameters that are trained.
    scaled: whether losses are scaled, because gradients are computed in float16.
    """

    module: nn.Module
    losses: Callable[[nn.Module, B], Mapping[str, Tensor]]
    weigh: Callable[[B], float]
    kept: Mapping[str, Tensor] | None = None
    sharded: bool = False
    scaled: bool = False


class TorchLearner(Learner[B]):
    """Learns a task."""

    def __init__(self, config: LoopConfig, task: Task[B], processes: Processes) -> None:
        self.config = config
        self.task = task
        self.processes = processes
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

    def learn(self, batches: Sequence[B], rate: float) -> Learnt:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        with lost_process_named():
            weights = [self.task.weigh(batch) for batch in batches]
            (weight,) = self.processes.sums([sum(weights)])
            last = len(batches) - 1
            found = [self._learn_from(batch, weight, last=index == last) for index, batch in enumerate(batches)]
            norm = self._update()
            _, losses = self._means(found, weights)
        return Learnt(losses, norm, weight)

    def evaluate(self, batches: Iterable[Sequence[B]]) -> dict[str, float]:
        module = self.task.module
        training = [part for part in module.modules() if part.training]
        module.eval()
        with torch.no_grad(), lost_process_named():
            found = [(self.task.losses(module, batch), self.task.weigh(batch)) for step in batches for batch in step]
            weight, losses = self._means([losses for losses, _ in found], [weight for _, weight in found])
        for part in training:
            part.training = True
        return losses if weight else {}

    def state(self) -> LearnerState:
        weights = {name: _array(tensor) for name, tensor in self._kept.items()}
        slots = {
            f"{name}.{slot}": _array(value)
            for name, parameter in self.parameters.items()
            for slot, value in self.optimizer.state[parameter].items()
        }
        groups = {"weights": weights, "optimizer": slots}
        random = {"random": {name: _array(state) for name, state in random_state(self.processes.device).items()}}
        shared, own = ({}, groups | random) if self.task.sharded else (groups, random)
        return LearnerState(shared, own, {"scaler": self.scaler.state_dict()})

    def restore(self, state: LearnerState) -> None:
        groups = {**state.shared, **state.own}
        with torch.no_grad():
            for name, tensor in self._kept.items():
                own_part(tensor).copy_(_tensor(groups["weights"][name]))
        for flat, array in groups["optimizer"].items():
            name, _, slot = flat.rpartition(".")
            parameter, value = self.parameters[name], _tensor(array)
            on_device = value.to(parameter.device)
            self.optimizer.state[parameter][slot] = on_device if slot == "step" else split_like(parameter, on_device)
        set_random_state({name: _tensor(own) for name, own in groups["random"].items()}, self.processes.device)
        self.scaler.load_state_dict(state.values["scaler"])

    @property
    def _kept(self) -> Mapping[str, Tensor]:
        return self.task.kept if self.task.kept is not None else self.parameters

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

        One bad batch must not ruin the weights: a step whose gradient is not finite is left out.
        """
        self.scaler.unscale_(self.optimizer)
        norm = float(
            self.processes.accelerator.clip_grad_norm_(list(self.parameters.values()), self.config.max_grad_norm)
        )
        if isfinite(norm):
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self.scaler.is_enabled():
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
    """Put back what `random_state` gave; a checkpoint that another backend wrote has nothing of it."""
    if "cpu" in state:
        torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"])


def _array(tensor: Tensor) -> NDArray[Any]:
    """What this process holds of it, on the CPU."""
    array: NDArray[Any] = own_part(tensor).detach().cpu().numpy()
    return array


def _tensor(array: NDArray[Any]) -> Tensor:
    """A copy, which may be changed."""
    return torch.tensor(array)
