"""What a checkpoint holds, whatever its format: each format is read into it and written from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from visualglm.checkpoint.manifest import Source
from visualglm.checkpoint.tensors import Tensor, tensor_bytes
from visualglm.config import VisualGLMConfig


@dataclass(frozen=True)
class Checkpoint:
    """A model before it is loaded.

    `tensors` are named and shaped as in `parameter_shapes(config)`, all packed qkv in thirds. `extras` are tensors of a
    foreign file that the model does not compute with, under their foreign names; they are kept for the way back.
    """

    config: VisualGLMConfig
    tensors: Mapping[str, Tensor]
    source: Source
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    tokenizer_path: Path | None = None
    license_text: str | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor_bytes(tensor) for tensor in (*self.tensors.values(), *self.extras.values()))


def main_dtype(tensors: Mapping[str, Tensor]) -> str:
    """The type that most of the parameters have."""
    counts: Counter[str] = Counter()
    for tensor in tensors.values():
        counts[tensor.dtype] += prod(tensor.shape)
    return counts.most_common(1)[0][0]
