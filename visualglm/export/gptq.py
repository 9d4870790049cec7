"""GPTQ (Frantar et al. 2022): what rounding one input's weights does to the outputs, later inputs' weights undo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from visualglm.errors import ConfigError
from visualglm.export.block_fit import CodeRange, Grid, Tile, inverse
from visualglm.export.packed_weight import Bits, Floats, Packing, QuantizedWeight
from visualglm.export.quantize import Matrix, check_finite, check_matrix, in_parallel, symmetric_is_better

# Outputs that one thread works on at once: each is a problem of its own.
_OUTPUTS = 1024
# Inputs of which the matrices are factorised and inverted at once.
_BLOCK = 256


def gptq(
    weight: Matrix,
    hessian: NDArray[np.floating[Any]],
    bits: Bits,
    block_size: int,
    *,
    symmetric: bool | None = None,
    damping: float = 0.01,
    name: str = "weight",
    threads: int | None = None,
) -> QuantizedWeight:
    """Weight [out, in] rounded for the smallest squared error of the layer's outputs, in one pass over its inputs.

    `hessian` [in, in] is the mean of x xᵀ over inputs x of the layer. `damping`, a share of its mean diagonal, is added
    to the diagonal: the more, the less the sample of inputs is trusted. The `error` of the result is a share of the
    outputs' square. Works in some matrices [in, in] of float64. Raises `CheckpointError` and `ConfigError` as
    `quantize_blocks` does.
    """
    check_matrix(weight, block_size, name)
    inputs = _Inputs.from_hessian(hessian, weight.shape[1], block_size, damping, name)

    def run(rows: Matrix, symmetric: bool) -> QuantizedWeight:
        return _Gptq(rows, inputs, CodeRange(bits, symmetric), block_size, name).run(threads)

    return run(weight, symmetric_is_better(weight, run) if symmetric is None else symmetric)


@dataclass(frozen=True)
class _Inputs:
    """What is known of a layer's inputs, filled up to whole blocks with inputs that have to do with no other.

    factor: upper triangular R with `R Rᵀ` the damped Hessian over its mean diagonal; feedback: the inverse of R, of
    which row j says how later inputs' weights undo an error in those of input j. Both float32 [in, in].
    importance: float32 [in], what an error still costs when that is done.
    """

    factor: Floats
    feedback: Floats
    importance: Floats

    @classmethod
    def from_hessian(
        cls, hessian: NDArray[np.floating[Any]], columns: int, block_size: int, damping: float, name: str
    ) -> Self:
        mean = float(np.trace(hessian)) / columns if hessian.shape == (columns, columns) else 0.0
        if not 0 < mean < np.inf:
            raise ConfigError(
                f"The Hessian of {name} must be [{columns}, {columns}], finite and positive; calibrate again."
            )
        factor = np.zeros((columns + -columns % block_size,) * 2)
        np.divide(hessian, mean, out=factor[:columns, :columns])
        factor[np.diag_indices_from(factor)] += damping
        try:
            _factorize(factor)
        except np.linalg.LinAlgError as error:
            raise ConfigError(f"The Hessian of {name} is not positive; calibrate again, or damp it more.") from error
        importance = np.where(np.arange(len(factor)) < columns, np.diag(factor) ** 2, 0)
        kept = np.ascontiguousarray(factor, np.float32)
        _invert_triangle(factor)
        return cls(kept, np.ascontiguousarray(factor, np.float32), importance.astype(np.float32))


def _factorize(matrix: NDArray[np.float64]) -> None:
    """Turn a symmetric matrix into the upper triangular R with `R Rᵀ` the matrix, in place.

    By blocks from the last: numpy's own Cholesky takes two more matrices, and crashes on those as wide as the full size
    has (16384, with the OpenBLAS of numpy 2.4).
    """
    for start in reversed(range(0, len(matrix), _BLOCK)):
        own, later, done = slice(start, start + _BLOCK), slice(start + _BLOCK, None), slice(start + _BLOCK)
        matrix[done, own] -= matrix[done, later] @ matrix[own, later].T
        # Of the reversed block, since Cholesky's own factor is a lower one.
        block = np.linalg.cholesky(matrix[own, own][::-1, ::-1])[::-1, ::-1]
        matrix[:start, own] = matrix[:start, own] @ np.linalg.inv(block).T
        matrix[own, own] = block
        matrix[later, own] = 0


def _invert_triangle(upper: NDArray[np.float64]) -> None:
    """Invert an upper triangular matrix in place, by halves."""
    if len(upper) <= _BLOCK:
        upper[:] = np.linalg.inv(upper)
        return
    half = len(upper) // 2
    first, corner, last = upper[:half, :half], upper[:half, half:], upper[half:, half:]
    _invert_triangle(first)
    _invert_triangle(last)
    corner[:] = -(first @ corner @ last)


@dataclass(frozen=True)
class _Gptq:
    """What to do with every 1024 outputs of a weight. Values lie as [in, outputs]."""

    weight: Matrix
    inputs: _Inputs
    codes: CodeRange
    block_size: int
    name: str

    def run(self, threads: int | None) -> QuantizedWeight:
        rows, columns = self.weight.shape
        packing = Packing((rows, columns), self.codes.bits, self.block_size)
        error = in_parallel(lambda part: self._quantize_outputs(part, packing), rows, _OUTPUTS, threads)
        return packing.finish(error, symmetric=self.codes.symmetric)

    def _quantize_outputs(self, rows: slice, packing: Packing) -> NDArray[np.float64]:
        """Squared error and square of these outputs."""
        factor, feedback = self.inputs.factor, self.inputs.feedback
        values = np.zeros((len(factor), rows.stop - rows.start), np.float32)
        values[: self.weight.shape[1]] = np.asarray(self.weight[rows]).T
        unit = np.abs(values).max()
        check_finite(unit, self.name)
        values *= inverse(unit)
        energy, error = _square(factor.T @ values), 0.0
        for block, start in enumerate(range(0, len(values), self.block_size)):
            own, later = slice(start, start + self.block_size), slice(start + self.block_size, None)
            tile, grid = self._fit(values[own], self.inputs.importance[own])
            codes, errors = _round_in_turn(values[own], tile.scales(grid), grid.zero, feedback[own, own], self.codes)
            values[later] -= feedback[own, later].T @ errors
            error += _square(errors)
            packing.put(rows, slice(block, block + 1), codes, tile.scales(grid, unit), grid.zero)
        return np.array([error, energy]) * float(unit) ** 2

    def _fit(self, values: Floats, importance: Floats) -> tuple[Tile, Grid]:
        weights = np.repeat((importance / importance.max())[:, None], values.shape[1], axis=1)
        tile = Tile(values.copy(), weights, self.codes)
        return tile, tile.fit("search")


def _round_in_turn(
    values: Floats, scale: Floats, zero: Floats, feedback: Floats, codes: CodeRange
) -> tuple[Floats, Floats]:
    """Codes of a block [block_size, outputs], whose values change on the way, and the errors to feed to later ones."""
    rounded, errors, inverse_scale = np.empty_like(values), np.empty_like(values), inverse(scale)
    for index, (value, code) in enumerate(zip(values, rounded, strict=True)):
        np.multiply(value, inverse_scale, out=code)
        code += zero
        codes.clip(np.rint(code, out=code))
        errors[index] = (value - (code - zero) * scale) / feedback[index, index]
        values[index + 1 :] -= feedback[index, index + 1 :, None] * errors[index]
    return rounded, errors


def _square(array: Floats) -> float:
    return float(np.vdot(array, array))
