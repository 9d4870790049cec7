"""The calls of a model: as graphs, each compiled once for each shape of its inputs, or operator by operator."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal

import mindspore as ms
import numpy as np
from mindspore import Tensor
from numpy.typing import NDArray

from visualglm.backends.mindspore.joined import VisualGLMModel
from visualglm.signals import held_signals

Call = Literal["prefill", "step", "logits"]
_CALLS: tuple[Call, ...] = ("prefill", "step", "logits")
# Shapes are rounded up to powers of two from here on, so that texts of like length share a graph.
_FEWEST_COLUMNS = 64


class Calls:
    """`compilations` are the graphs compiled so far: one for each call and shape of its inputs that has been met."""

    def __init__(self, model: VisualGLMModel, *, compiled: bool) -> None:
        self.compiled = compiled
        methods = {name: getattr(model, name) for name in _CALLS}
        self._methods = {name: ms.jit(method) for name, method in methods.items()} if compiled else methods
        self._met: set[tuple[object, ...]] = set()

    @property
    def compilations(self) -> int:
        return len(self._met) if self.compiled else 0

    def run(self, name: Call, *inputs: Tensor) -> tuple[NDArray[np.float32], Sequence[Tensor]]:
        """What the method of the model gives for `inputs`: logits, and keys and values.

        Ctrl-C and SIGTERM wait for a graph, also where it has to be compiled first.
        """
        self._met.add((name, *((tensor.shape, tensor.dtype) for tensor in inputs)))
        with held_signals() if self.compiled else nullcontext():
            outputs = self._methods[name](*inputs)
            logits, *present = outputs if isinstance(outputs, tuple) else (outputs,)
            # Before anything else: the next operator would wait for the graph too, and take five times as long over it.
            return logits.asnumpy(), present

    def columns(self, needed: int, most: int) -> int:
        """How many columns a prompt or a cache of `needed` gets, at most `most`."""
        return min(power_of_two(max(needed, _FEWEST_COLUMNS)), max(most, needed)) if self.compiled else needed

    def rows(self, needed: int) -> int:
        """How many rows a batch of `needed` gets."""
        return power_of_two(needed) if self.compiled else needed


def power_of_two(number: int) -> int:
    """The least that is not below `number`."""
    return 1 << (number - 1).bit_length()
