"""Weights of 4 or 8 bits by blocks, packed as ONNX Runtime's `MatMulNBits` reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Bits = Literal[4, 8]
Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix [out, in]: `weight = scale * (code - zero_point)`, the last block of a row padded with zeros.

    data: uint8 [out, k_blocks, block_size * bits / 8]; of two codes in a byte, the first is the low half.
    scales: float32 [out, k_blocks]. zero_points: uint8 [out, ceil(k_blocks * bits / 8)]; None if all are 2**(bits - 1).
    error: squared error as a share of the weight's own square, in the measure that the quantisation made small.
    """

    data: Bytes
    scales: Floats
    zero_points: Bytes | None
    bits: Bits
    block_size: int
    in_features: int
    error: float

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix that is meant, [out, in]."""
        return len(self.data), self.in_features

    def codes(self) -> Bytes:
        """uint8 [out, k_blocks, block_size]."""
        return unpack(self.data, self.bits)

    def zeros(self) -> Bytes:
        """The zero point of each block, uint8 [out, k_blocks]."""
        if self.zero_points is None:
            return np.full(self.scales.shape, 2 ** (self.bits - 1), np.uint8)
        return unpack(self.zero_points, self.bits)[:, : self.scales.shape[1]]

    def dequantize(self) -> Floats:
        """The matrix that is meant, float32 [out, in]."""
        weights = (self.codes().astype(np.float32) - self.zeros()[..., None]) * self.scales[..., None]
        return weights.reshape(len(weights), -1)[:, : self.in_features]


class Packing:
    """The arrays of a `QuantizedWeight` [out, in] while its blocks come in, in any order and from any thread."""

    def __init__(self, shape: tuple[int, int], bits: Bits, block_size: int) -> None:
        self.shape, self.bits, self.block_size = shape, bits, block_size
        blocks = -(-shape[1] // block_size)
        self._data = np.empty((shape[0], blocks, block_size * bits // 8), np.uint8)
        self._scales = np.empty((shape[0], blocks), np.float32)
        self._zeros = np.empty((shape[0], blocks), np.uint8)

    def put(self, rows: slice, blocks: slice, codes: Floats, scales: Floats, zeros: Floats) -> None:
        """Blocks as columns, row after row: codes [block_size, n], scales and zeros [n]; codes and zeros around 0."""
        middle = 2 ** (self.bits - 1)
        target = self._scales[rows, blocks]
        target[:] = scales.reshape(target.shape)
        self._zeros[rows, blocks] = (zeros + middle).reshape(target.shape)
        packed = pack((codes + middle).astype(np.uint8).T, self.bits)
        self._data[rows, blocks] = packed.reshape(*target.shape, -1)

    def finish(self, error: float, *, symmetric: bool) -> QuantizedWeight:
        zeros = None if symmetric else pack(self._zeros, self.bits)
        return QuantizedWeight(self._data, self._scales, zeros, self.bits, self.block_size, self.shape[1], error)


def pack(codes: Bytes, bits: Bits) -> Bytes:
    """Bytes of `codes` along the last axis, which is filled up with a zero to whole bytes."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    return codes[..., ::2] | codes[..., 1::2] << np.uint8(4)


def unpack(packed: Bytes, bits: Bits) -> Bytes:
    """Inverse of `pack`, with the zero that it filled up with."""
    if bits == 8:
        return packed
    halves = np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1)
    return halves.reshape(*packed.shape[:-1], -1)
