"""Random weights in ggml's types: what they measure, and their bytes without holding more than one block of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

WeightType = Literal["f32", "f16", "q4_0", "q8_0"]
Shape = tuple[int, ...]

# ggml's number of the type, the elements of one of its blocks and their bytes (of which two are a scale in float16).
_TYPES: dict[WeightType, tuple[int, int, int]] = {
    "f32": (0, 1, 4),
    "f16": (1, 1, 2),
    "q4_0": (2, 32, 18),
    "q8_0": (8, 32, 34),
}
# Scales that make weights of about the size of a trained model's: deviations of all codes are 4.6 and 74.
_SCALES: dict[WeightType, float] = {"q4_0": 0.02 / 4.6, "q8_0": 0.02 / 74}
_PIECE_BLOCKS = 1 << 18


@dataclass(frozen=True)
class Weight:
    """A tensor of a file: `shape` has the outputs of a linear layer first."""

    name: str
    shape: Shape
    type: WeightType

    @property
    def type_code(self) -> int:
        return _TYPES[self.type][0]

    @property
    def size(self) -> int:
        """Bytes in the file."""
        _, elements, block_bytes = _TYPES[self.type]
        return prod(self.shape) // elements * block_bytes

    def write(self, file: BinaryIO, pieces: RandomPieces) -> None:
        """Its bytes, which repeat one piece; vectors are ones, and biases zeros."""
        if self.type == "f32":
            file.write(np.full(self.shape, float(self.name.endswith("weight")), "<f4").data)
            return
        piece = pieces.of(self.type)
        for start in range(0, self.size, len(piece)):
            file.write(piece[: self.size - start])


class RandomPieces:
    """A few megabytes of random weights of each type, made when they are first asked for."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)
        self._made: dict[WeightType, memoryview] = {}

    def of(self, kind: WeightType) -> memoryview:
        if kind not in self._made:
            array = self._floats() if kind == "f16" else self._blocks(kind)
            self._made[kind] = array.view(np.uint8).reshape(-1).data
        return self._made[kind]

    def _floats(self) -> NDArray[np.float16]:
        return self._rng.normal(0, 0.02, 16 * _PIECE_BLOCKS).astype("<f2")

    def _blocks(self, kind: WeightType) -> NDArray[np.uint8]:
        blocks = self._rng.integers(0, 256, (_PIECE_BLOCKS, _TYPES[kind][2]), dtype=np.uint8)
        blocks[:, :2] = np.array([_SCALES[kind]], "<f2").view(np.uint8)
        return blocks


def total_bytes(weights: Iterable[Weight]) -> int:
    return sum(weight.size for weight in weights)


def linear(name: str, outputs: int, inputs: int, kind: WeightType) -> Iterator[Weight]:
    """A linear layer with a bias."""
    yield Weight(f"{name}.weight", (outputs, inputs), kind)
    yield Weight(f"{name}.bias", (outputs,), "f32")


def norm(name: str, width: int) -> Iterator[Weight]:
    yield Weight(f"{name}.weight", (width,), "f32")
    yield Weight(f"{name}.bias", (width,), "f32")
