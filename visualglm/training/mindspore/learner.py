"""How the pairs of a model learn in MindSpore: accumulation, clipping, loss scaling, AdamW, one process or many."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import ParameterTuple, Tensor, ops
from mindspore.experimental.optim import AdamW
from numpy.typing import NDArray

from visualglm.backends.mindspore.joined import VisualGLMModel
from visualglm.signals import held_signals
from visualglm.training.batches import Batch
from visualglm.training.loop import LearnerState, Learnt, LoopConfig
from visualglm.training.mindspore.distributed import Processes
from visualglm.training.mindspore.inputs import LossInputs, Shape, loss_inputs
from visualglm.training.mindspore.lora import Pairs

_RANDOM = "mindspore"


@dataclass
class LossScale:
    """What losses are multiplied with where gradients are computed in float16, so that small ones do not vanish.

    The rules, and the names in checkpoints, are those of torch's `GradScaler`.
    """

    scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    _growth_tracker: int = 0

    def update(self, *, finite: bool) -> None:
        self._growth_tracker = self._growth_tracker + 1 if finite else 0
        if not finite:
            self.scale *= self.backoff_factor
        elif self._growth_tracker == self.growth_interval:
            self.scale *= self.growth_factor
            self._growth_tracker = 0


class MindSporeLearner:
    """Trains the pairs of a model.

    shape: of the largest batch, to which all are filled up, and their graph compiled once; None: every batch as it is,
    and nothing compiled (eager mode).
    """

    def __init__(
        self,
        config: LoopConfig,
        model: VisualGLMModel,
        pairs: Pairs,
        processes: Processes,
        *,
        shape: Shape | None,
        seed: int,
        scaled: bool,
    ) -> None:
        self.config = config
        self.model = model
        self.pairs = pairs
        self.processes = processes
        self.shape = shape
        self.parameters = pairs.parameters()
        self.scale = LossScale() if scaled else None
        own = ParameterTuple(self.parameters.values())
        self.optimizer = AdamW(own, 0.0, config.betas, config.eps, config.weight_decay)
        self._seed = seed
        self._drawn = 0
        losses = _losses_of(model)
        learnt = ms.value_and_grad(_weighted(losses), None, own, has_aux=True)
        compile_: Callable[..., Any] = (lambda function: function) if shape is None else ms.jit
        self._losses, self._learnt = compile_(losses), compile_(learnt)

    def learn(self, batches: Sequence[Batch], rate: float) -> Learnt:
        weights = [batch.token_count for batch in batches]
        (weight,) = self.processes.sums([sum(weights)])
        factor = (self.scale.scale if self.scale else 1.0) / weight
        found = [self._gradients(batch, factor) for batch in batches]
        flat = self.processes.add_up(sum((gradients for _, gradients in found[1:]), found[0][1]))
        norm = self._update(flat, rate)
        (loss,) = self.processes.sums([sum(total for total, _ in found)])
        return Learnt({"loss": loss / weight}, norm, weight)

    def evaluate(self, batches: Iterable[Sequence[Batch]]) -> dict[str, float]:
        self.pairs.drop(None)
        found = [(self._loss(batch), batch.token_count) for step in batches for batch in step]
        loss, weight = self.processes.sums([sum(total for total, _ in found), sum(count for _, count in found)])
        return {"loss": loss / weight} if weight else {}

    def state(self) -> LearnerState:
        step = np.array(float(self.optimizer.state_step.asnumpy()), np.float32)
        slots: dict[str, NDArray[Any]] = {}
        for name, mean, square in self._slots():
            slots |= {f"{name}.step": step, f"{name}.exp_avg": _array(mean), f"{name}.exp_avg_sq": _array(square)}
        weights = {name: _array(parameter) for name, parameter in self.parameters.items()}
        random = {"random": {_RANDOM: np.array([self._drawn], np.int64)}}
        scaler = vars(self.scale).copy() if self.scale else {}
        return LearnerState({"weights": weights, "optimizer": slots}, random, {"scaler": scaler})

    def restore(self, state: LearnerState) -> None:
        """Also from a checkpoint of torch; what dropout draws then goes on from the number of steps."""
        weights, slots = state.shared["weights"], state.shared["optimizer"]
        for name, parameter in self.parameters.items():
            _assign(parameter, weights[name])
        steps = 0
        for name, mean, square in self._slots() if slots else ():
            _assign(mean, slots[f"{name}.exp_avg"])
            _assign(square, slots[f"{name}.exp_avg_sq"])
            steps = int(slots[f"{name}.step"])
        ops.assign(self.optimizer.state_step, Tensor(steps, ms.int32))
        self._drawn = int(state.own["random"].get(_RANDOM, [steps])[0])
        if self.scale and state.values["scaler"]:
            self.scale = LossScale(**state.values["scaler"])

    def _slots(self) -> Iterable[tuple[str, Tensor, Tensor]]:
        """What AdamW keeps for each parameter: the means of its gradients, and of their squares."""
        return zip(self.parameters, self.optimizer.exp_avg, self.optimizer.exp_avg_sq, strict=True)

    def _gradients(self, batch: Batch, factor: float) -> tuple[float, Tensor]:
        """The sum of a batch's losses, and all gradients of it times `factor` as one vector."""
        self._drawn += 1
        self.pairs.drop((self._seed, self.processes.rank, self._drawn))
        inputs, tensors = self._tensors(batch)
        weights = np.where(np.arange(len(inputs.places)) < inputs.count, factor, 0.0).astype(np.float32)
        with held_signals():
            (_, losses), gradients = self._learnt(Tensor(weights), *tensors)
            return _sum(losses, inputs), ops.concat([ops.reshape(gradient, (-1,)) for gradient in gradients])

    def _loss(self, batch: Batch) -> float:
        inputs, tensors = self._tensors(batch)
        with held_signals():
            return _sum(self._losses(*tensors), inputs)

    def _tensors(self, batch: Batch) -> tuple[LossInputs, tuple[Tensor | None, ...]]:
        inputs = loss_inputs(batch, self.shape, self.model.config.text.pad_token_id)
        arrays = (inputs.image_starts, inputs.position_ids, inputs.mask, inputs.places, inputs.targets)
        return inputs, (Tensor(inputs.input_ids), self._image_embeds(batch), *map(Tensor, arrays))

    def _image_embeds(self, batch: Batch) -> Tensor | None:
        """Those of a batch, with as many more as make its shape; None where the batch has no image and no shape."""
        embeds = batch.image_embeds
        if batch.pixels is not None:
            pixels = Tensor(batch.pixels)
            embeds = ops.cast(self.model.encode_images(pixels), ms.float32).asnumpy()
        if self.shape is None:
            return None if embeds is None else Tensor(embeds)
        config = self.model.config
        filled = np.zeros((self.shape.rows, config.qformer.num_query_tokens, config.text.hidden_size), np.float32)
        if embeds is not None:
            filled[: len(embeds)] = embeds
        return Tensor(filled)

    def _update(self, flat: Tensor, rate: float) -> float:
        """Clip the gradients and change the parameters; returns the norm, which all processes find alike.

        One bad batch must not ruin the weights: a step whose gradient is not finite is left out.
        """
        unscaled = flat / self.scale.scale if self.scale else flat
        norm = float(ops.sqrt(ops.sum(unscaled * unscaled)).asnumpy())
        if self.scale:
            self.scale.update(finite=isfinite(norm))
        if isfinite(norm):
            clipped = unscaled * min(1.0, self.config.max_grad_norm / (norm + 1e-6))
            ops.assign(self.optimizer.param_groups[0]["lr"], Tensor(rate, ms.float32))
            with held_signals():
                self.optimizer(tuple(self._split(clipped)))
        return norm

    def _split(self, flat: Tensor) -> Iterable[Tensor]:
        start = 0
        for parameter in self.parameters.values():
            yield ops.reshape(flat[start : start + parameter.size], parameter.shape)
            start += parameter.size


def _losses_of(model: VisualGLMModel) -> Callable[..., Tensor]:
    """Cross-entropies, float32 [labels], of what `LossInputs` say; only the columns that predict go through lm_head."""

    def losses(
        input_ids: Tensor,
        image_embeds: Tensor | None,
        image_starts: Tensor,
        position_ids: Tensor,
        mask: Tensor,
        places: Tensor,
        targets: Tensor,
    ) -> Tensor:
        hidden = model.hidden_states(input_ids, image_embeds, image_starts, position_ids, mask)
        learnt = ops.gather(ops.reshape(hidden, (-1, hidden.shape[-1])), places, 0)
        logits = ops.cast(model.text.lm_head(learnt), ms.float32)
        # Not `ops.cross_entropy`: its last bits depend on how often it has run, and so on where a run was resumed.
        likely = ops.gather_elements(ops.log_softmax(logits, -1), 1, ops.expand_dims(targets, 1))
        return -ops.squeeze(likely, 1)

    return losses


def _weighted(losses: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """What is minimised, and beside it the losses themselves."""

    def weighted(weights: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        found = losses(*inputs)
        return ops.sum(found * weights), found

    return weighted


def _sum(losses: Tensor, inputs: LossInputs) -> float:
    """Of those that count. In float64: else it would depend on how tokens are spread over batches and processes."""
    return float(losses.asnumpy()[: inputs.count].sum(dtype=np.float64))


def _array(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.asnumpy()
    return array


def _assign(parameter: Tensor, array: NDArray[Any]) -> None:
    ops.assign(parameter, Tensor(np.array(array)))
