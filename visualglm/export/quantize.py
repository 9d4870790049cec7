"""Weights as whole numbers of 4 or 8 bits in blocks, each with a scale and perhaps a zero point of its own.

The forms are those of ONNX Runtime's `MatMulNBits` and `GatherBlockQuantized`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from visualglm.errors import CheckpointError, ConfigError
from visualglm.export.block_fit import CodeRange, Method, Tile
from visualglm.export.packed_weight import Bits, Bytes, Floats, Packing, QuantizedWeight

__all__ = ["Bits", "Method", "QuantizedEmbedding", "QuantizedWeight", "quantize_blocks", "quantize_embedding"]

# Weights that one thread works on at once. Short calls of numpy hold up the other threads, so they must be few.
_TILE = 1 << 19
# More would wait for one another, and take more than 100 MiB.
_MOST_THREADS = 8
# Weights by which symmetric and asymmetric codes are compared.
_SAMPLE = 1 << 18
# No input feature counts less than this share of the mean: that calibration saw little of it proves little.
_LEAST_ENERGY = 1e-4
_SMALLEST_BLOCK = 16


class Matrix(Protocol):
    """Rows that are read when they are needed: an array, a memory map, or what turns one into numbers."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice, /) -> NDArray[Any]: ...


class QuantizedEmbedding(NamedTuple):
    """A table [vocab, width] for `GatherBlockQuantized`, without zero points: `scale * (code - 128)`.

    data: uint8 [vocab, width]; scales: float32 [vocab, ceil(width / block_size)]; error: squared, as a share.
    """

    data: Bytes
    scales: Floats
    error: float


def quantize_blocks(
    weight: Matrix,
    bits: Bits,
    block_size: int,
    method: Method = "search",
    input_energy: NDArray[np.floating[Any]] | None = None,
    *,
    symmetric: bool | None = None,
    name: str = "weight",
    threads: int | None = None,
) -> QuantizedWeight:
    """Weight [out, in], of any float type, in blocks of `block_size` inputs.

    "rtn" rounds to nearest; "search" looks for the scales and zero points of the smallest squared error. `input_energy`
    [in], the mean squares of the layer's inputs, says how much each input's errors count. Without `symmetric`, the
    smaller error decides whether there are zero points; on no more than a sample of the rows.

    Raises `CheckpointError` for a weight that is no matrix or not finite, `ConfigError` for an unusable block size or
    energies that do not fit.
    """
    check_matrix(weight, block_size, name)
    importance = _importance(input_energy, weight.shape[1], block_size, name)

    def run(rows: Matrix, symmetric: bool) -> QuantizedWeight:
        return _Quantization(rows, CodeRange(bits, symmetric), block_size, method, importance, name).run(threads)

    return run(weight, symmetric_is_better(weight, run) if symmetric is None else symmetric)


def quantize_embedding(
    table: Matrix, block_size: int, *, name: str = "embedding", threads: int | None = None
) -> QuantizedEmbedding:
    """Rows of a table [vocab, width] in 8 bits; raises as `quantize_blocks`."""
    packed = quantize_blocks(table, 8, block_size, symmetric=True, name=name, threads=threads)
    data = packed.data.reshape(len(packed.data), -1)[:, : packed.in_features]
    return QuantizedEmbedding(np.ascontiguousarray(data), packed.scales, packed.error)


def symmetric_is_better(weight: Matrix, run: Callable[[Matrix, bool], QuantizedWeight]) -> bool:
    """Whether zero points bring nothing, by what `run(rows, symmetric)` makes of a sample of the rows."""
    sample = weight[:: max(1, weight.shape[0] * weight.shape[1] // _SAMPLE)]
    return run(sample, True).error <= run(sample, False).error


def check_matrix(weight: Matrix, block_size: int, name: str) -> None:
    """Raises `CheckpointError` or `ConfigError` for what no method can quantise."""
    if len(weight.shape) != 2 or not all(weight.shape):
        raise CheckpointError(
            f"The tensor {name} has the shape {list(weight.shape)}, but only matrices [out, in] can be quantised; "
            "export it unquantised."
        )
    if block_size < _SMALLEST_BLOCK or block_size & (block_size - 1):
        raise ConfigError(
            f"Blocks of {block_size} weights cannot be run; choose a power of two from {_SMALLEST_BLOCK} on."
        )


def check_finite(peaks: Floats | np.float32, name: str) -> None:
    """`peaks`: the largest magnitudes of a tensor's parts; raises `CheckpointError`."""
    if not np.isfinite(peaks).all():
        raise CheckpointError(
            f"The tensor {name} holds values that are not finite numbers, which cannot be quantised; "
            "get or convert the checkpoint again."
        )


def in_parallel(quantize: Callable[[slice], NDArray[np.float64]], rows: int, step: int, threads: int | None) -> float:
    """Call `quantize`, which gives squared error and square, on every `step` rows, and tell the share of the one."""
    parts = (slice(start, min(start + step, rows)) for start in range(0, rows, step))
    with ThreadPoolExecutor(threads or min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        error, energy = sum(pool.map(quantize, parts), np.zeros(2))
    return float(error / energy) if energy else 0.0


def _importance(energy: NDArray[np.floating[Any]] | None, columns: int, block_size: int, name: str) -> Floats | None:
    """How much errors count, float32 [block_size, k_blocks], zero in the padding; None if all count alike."""
    padding = -columns % block_size
    if energy is None and not padding:
        return None
    counts = np.ones(columns) if energy is None else np.asarray(energy, np.float64)
    if counts.shape != (columns,) or not np.isfinite(counts).all() or counts.min() < 0:
        raise ConfigError(
            f"The input energies of {name} must be {columns} finite numbers that are not negative; calibrate again."
        )
    mean = counts.mean()
    counts = np.maximum(counts / mean, _LEAST_ENERGY) if mean > 0 else np.ones(columns)
    return np.pad(counts, (0, padding)).reshape(-1, block_size).T.astype(np.float32)


@dataclass(frozen=True)
class _Quantization:
    """What to do with every tile of a weight."""

    weight: Matrix
    codes: CodeRange
    block_size: int
    method: Method
    importance: Floats | None
    name: str

    def run(self, threads: int | None) -> QuantizedWeight:
        rows, columns = self.weight.shape
        packing = Packing((rows, columns), self.codes.bits, self.block_size)
        step = max(1, _TILE // columns)
        # Once for all tiles: as many rows as the tallest has.
        importance = None if self.importance is None else np.tile(self.importance, min(step, rows))

        error = in_parallel(lambda part: self._quantize_rows(part, importance, packing), rows, step, threads)
        return packing.finish(error, symmetric=self.codes.symmetric)

    def _quantize_rows(self, rows: slice, importance: Floats | None, packing: Packing) -> NDArray[np.float64]:
        """Squared error and square of these rows."""
        blocks = self._blocks(rows)
        with np.errstate(invalid="ignore"):  # infinite times zero: told in words below
            tile = Tile(blocks, None if importance is None else importance[:, : blocks.shape[1]], self.codes)
        check_finite(tile.peak, self.name)
        grid = tile.fit(self.method)
        codes = tile.round(grid)
        squares = np.square(tile.peak, dtype=np.float64)
        totals = np.array([tile.squared_error(codes, grid) @ squares, tile.energy @ squares])
        packing.put(rows, slice(None), codes, tile.scales(grid), grid.zero)
        return totals

    def _blocks(self, rows: slice) -> Floats:
        """Blocks as columns, row after row: [block_size, rows * k_blocks]."""
        values = np.asarray(self.weight[rows])
        padding = -values.shape[1] % self.block_size
        if padding:
            values = np.pad(values, ((0, 0), (0, padding)))
        return np.array(values.reshape(-1, self.block_size).T, np.float32, order="C")
