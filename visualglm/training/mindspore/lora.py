"""LoRA on the decoder: pairs of matrices beside its linear layers, from the very numbers that torch starts with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import sqrt

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from numpy.typing import NDArray

from visualglm.backends.mindspore.joined import VisualGLMModel
from visualglm.config import TextConfig
from visualglm.training.parts import lora_modules
from visualglm.training.recipe import TuneRecipe

Floats = NDArray[np.float32]

_IN_ORDER = ("qkv", "proj", "fc1", "fc2")


class LoraDense(nn.Cell):
    """A frozen linear layer with a float32 pair beside it: `base(x) + scale * (x * kept) A^T B^T`.

    kept: what dropout leaves of the input, float32 [batch, seq, in] of the largest batch; None without dropout.
    """

    def __init__(self, base: nn.Cell, a: Floats, outputs: int, scale: float) -> None:
        super().__init__()
        self.base = base
        self.scale = scale
        self.lora_a = Parameter(Tensor(a))
        self.lora_b = Parameter(Tensor(np.zeros((outputs, len(a)), np.float32)))
        self.kept: Parameter | None = None

    def construct(self, x: Tensor) -> Tensor:
        output, inputs = self.base(x), ops.cast(x, ms.float32)
        if self.kept is not None:
            inputs = inputs * self.kept[: x.shape[0], : x.shape[1]]
        down = ops.matmul(inputs, ops.transpose(self.lora_a, (1, 0)))
        pair = ops.matmul(down, ops.transpose(self.lora_b, (1, 0))) * self.scale
        return ops.cast(ops.cast(output, ms.float32) + pair, output.dtype)


class Pairs:
    """The LoRA of a model, by the names of its modules, and what dropout leaves of their inputs.

    What it leaves is drawn on the host, by (seed, process, draw): a run that is resumed needs only the number of draws.
    """

    def __init__(self, cells: Mapping[str, LoraDense], dropout: float) -> None:
        self.cells = cells
        self._dropout = dropout

    def parameters(self) -> dict[str, Parameter]:
        """By the names that they have in the checkpoints of training, which are those of torch's modules."""
        return {
            f"model.{module}.lora_{part}.default.weight": parameter
            for module, cell in self.cells.items()
            for part, parameter in (("A", cell.lora_a), ("B", cell.lora_b))
        }

    def stored(self) -> dict[str, Floats]:
        """As adapters hold them, by PEFT's names."""
        return {
            f"base_model.model.{name.removeprefix('model.').replace('.default.', '.')}": parameter.asnumpy()
            for name, parameter in self.parameters().items()
        }

    def reserve(self, rows: int, columns: int) -> None:
        """Room for the dropout of batches up to that size."""
        for module, cell in self.cells.items() if self._dropout else ():
            ones = Tensor(np.ones((rows, columns, cell.lora_a.shape[1]), np.float32))
            cell.kept = Parameter(ones, name=f"{module}.kept", requires_grad=False)

    def drop(self, key: tuple[int, ...] | None) -> None:
        """What `key` leaves, in every pair, until the next call; None leaves all."""
        if not self._dropout:
            return
        random = np.random.default_rng(key)
        for kept in (cell.kept for cell in self.cells.values()):
            if kept is not None:
                left = random.random(kept.shape, np.float32) >= self._dropout if key else np.ones(kept.shape)
                ops.assign(kept, Tensor((left / (1 - self._dropout if key else 1)).astype(np.float32)))


def add_lora(model: VisualGLMModel, tune: TuneRecipe, seed: int) -> Pairs:
    """Put pairs beside `lora_modules`; nothing else is trained.

    Raises `ConfigError` for a layer that the model does not have, or a rank above the width of its layers.
    """
    for parameter in model.get_parameters():
        parameter.requires_grad = False
    scale = tune.lora_alpha / tune.lora_rank
    cells = {}
    for module, a in initial_pairs(tune, model.config.text, seed):
        parent, leaf = _parent(model, module)
        base = getattr(parent, leaf)
        cells[module] = LoraDense(base, a, base.weight.shape[0], scale)
        setattr(parent, leaf, cells[module])
    # What is new in a model has names by its nearest cell alone, and no two may have one.
    for name, parameter in model.parameters_and_names():
        parameter.name = name
    return Pairs(cells, tune.lora_dropout)


def initial_pairs(tune: TuneRecipe, text: TextConfig, seed: int) -> Iterator[tuple[str, Floats]]:
    """The A of each pair [rank, in], in the order of the model; every B is zero.

    They have the bits that PEFT draws with torch seeded by `seed`: torch's generator is the usual Mersenne Twister, of
    whose every word the lowest 24 bits count. PEFT makes two linear layers, which draw for themselves, and then A anew.
    """
    words = np.random.RandomState(seed)
    widths = {"qkv": (text.hidden_size, 3 * text.hidden_size), "proj": (text.hidden_size, text.hidden_size)}
    widths |= {"fc1": (text.hidden_size, text.intermediate_size), "fc2": (text.intermediate_size, text.hidden_size)}
    for module in sorted(lora_modules(tune, text), key=_place):
        inputs, outputs = widths[module.rpartition(".")[2]]
        words.bytes(4 * tune.lora_rank * (inputs + outputs))
        drawn = np.frombuffer(words.bytes(4 * tune.lora_rank * inputs), "<u4") & 0xFFFFFF
        bound = float(np.float32(sqrt(3.0) * (sqrt(2.0 / 6.0) / sqrt(inputs))))
        yield module, (drawn * 2.0**-24 * (2 * bound) - bound).astype(np.float32).reshape(tune.lora_rank, inputs)


def _place(module: str) -> tuple[int, int]:
    _, _, layer, _, kind = module.split(".")
    return int(layer), _IN_ORDER.index(kind)


def _parent(model: nn.Cell, module: str) -> tuple[nn.Cell, str]:
    *path, leaf = module.split(".")
    for name in path:
        model = model[int(name)] if name.isdigit() else getattr(model, name)
    return model, leaf
