"""Scales and zero points of many blocks at once: round to nearest, or a search for the smallest squared error.

A tile holds blocks as columns, so that every step is one pass of numpy over rows that lie in the cache. Codes are
floats around zero here: code - 2**(bits - 1), from -8 to 7 with 4 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Literal, NamedTuple

import numpy as np

from visualglm.export.packed_weight import Bits, Floats

Method = Literal["rtn", "search"]

# Ranges to start from, as shares of the full one. With 4 bits nearly every block gains from clipping; with 8 nearly
# none does, and what is gained lies in how the codes fall.
_SHARES: dict[Bits, tuple[float, ...]] = {4: (1.0, 0.92, 0.84, 0.76), 8: (1.0, 0.985)}
# Smaller numbers have no inverse in float32; blocks of such weights become zeros.
_SMALLEST = np.finfo(np.float32).tiny
# The most that a code times a scale may come to: a little less than where rounding overflows.
_LARGEST = np.finfo(np.float32).max * np.float32(1 - 2**-20)


class Grid(NamedTuple):
    """`weight = scale * (code - zero)` for each block: float32 [blocks], and the squared error of it."""

    scale: Floats
    zero: Floats
    error: Floats


@dataclass(frozen=True)
class CodeRange:
    """Codes around zero of `bits` bits; where `symmetric`, every zero point is 0."""

    bits: Bits
    symmetric: bool

    @property
    def lowest(self) -> int:
        return -(1 << self.bits - 1)

    @property
    def highest(self) -> int:
        return (1 << self.bits - 1) - 1

    def clip(self, codes: Floats) -> Floats:
        """In place."""
        codes.clip(self.lowest, self.highest, out=codes)
        return codes


class Tile:
    """Blocks [block_size, blocks] and how much each value's squared error counts: of the same shape, or None for alike.

    The values are divided by their block's largest magnitude, in place; grids are for what results.
    """

    def __init__(self, values: Floats, importance: Floats | None, codes: CodeRange) -> None:
        low, high = values.min(axis=0), values.max(axis=0)
        self.peak = np.maximum(high, -low)
        unit = inverse(self.peak)
        self.values = np.multiply(values, unit, out=values)
        self._low, self._high = np.minimum(low, 0) * unit, np.maximum(high, 0) * unit
        self._range, self._importance = codes, importance
        self._codes, self._scratch = np.empty_like(values), np.empty_like(values)
        self._mass = np.float32(len(values)) if importance is None else importance.sum(axis=0)
        weighted = self._weighted(values)
        self._sum, self.energy = weighted.sum(axis=0), _dot(weighted, values)

    def fit(self, method: Method) -> Grid:
        """The grid of every block by `method`."""
        if method == "rtn":
            return self._start(1.0)
        best = reduce(_better, (self._solve(self._start(share)) for share in _SHARES[self._range.bits]))
        return _better(best, self._solve(best))

    def round(self, grid: Grid) -> Floats:
        """Codes of every value, [block_size, blocks], good until the next call."""
        codes = np.multiply(self.values, inverse(grid.scale), out=self._codes)
        codes += grid.zero
        return self._range.clip(np.rint(codes, out=codes))

    def squared_error(self, codes: Floats, grid: Grid) -> Floats:
        """What codes and grid cost each block, [blocks], in the units of `energy`."""
        difference = np.subtract(codes, grid.zero, out=self._scratch)
        difference *= grid.scale
        difference -= self.values
        if self._importance is None:
            return _dot(difference, difference)
        return _dot(np.square(difference, out=difference), self._importance)

    def scales(self, grid: Grid, unit: float | np.float32 = 1.0) -> Floats:
        """Scales for the values as they were given, times `unit`; no code times its scale overflows."""
        farthest = np.maximum(self._range.highest - grid.zero, grid.zero - self._range.lowest)
        limit = _LARGEST / farthest
        with np.errstate(over="ignore"):
            scales: Floats = grid.scale * self.peak * np.float32(unit)
        return scales.clip(-limit, limit)

    def _start(self, share: float) -> Grid:
        """Where rounding to nearest begins, with the range narrowed to `share` of it."""
        codes = self._range
        unknown = np.full_like(self.peak, np.inf)
        if codes.symmetric:
            # The largest magnitude goes to the lowest code, which has no counterpart.
            sign = np.where(self._high >= -self._low, np.float32(1), np.float32(-1))
            return Grid(sign * np.float32(share / codes.lowest), np.zeros_like(self.peak), unknown)
        scale = (self._high - self._low) * np.float32(share / (codes.highest - codes.lowest))
        middle = (self._high + self._low) * np.float32(0.5) * inverse(scale)
        zero = codes.clip(np.rint(np.float32(-0.5) - middle))
        return Grid(scale, zero, unknown)

    def _solve(self, grid: Grid) -> Grid:
        """Least squares: the best scale and the zero point next to the best for the codes of `grid`."""
        codes = self.round(grid)
        weighted = self._weighted(codes)
        first, second, cross = weighted.sum(axis=0), _dot(weighted, codes), _dot(weighted, self.values)
        if self._range.symmetric:
            return self._best_scale(grid.zero, first, second, cross)
        covariance = self._mass * cross - first * self._sum
        variance = self._mass * second - first * first
        optimum = (first - self._sum * variance * inverse(covariance)) / self._mass
        zero = self._range.clip(np.rint(np.where(covariance > 0, optimum, grid.zero)))
        return self._best_scale(zero, first, second, cross)

    def _best_scale(self, zero: Floats, first: Floats, second: Floats, cross: Floats) -> Grid:
        """Least squares for codes of which the weighted sums, squares and products with the values are known."""
        product = cross - zero * self._sum
        square = second - zero * (2 * first - zero * self._mass)
        scale = product * inverse(square)
        return Grid(scale, zero, self.energy - scale * product)

    def _weighted(self, array: Floats) -> Floats:
        """Times the importance; good until the next call."""
        return array if self._importance is None else np.multiply(array, self._importance, out=self._scratch)


def _better(one: Grid, other: Grid) -> Grid:
    keep = one.error <= other.error
    return Grid(*(np.where(keep, *pair) for pair in zip(one, other, strict=True)))


def _dot(a: Floats, b: Floats) -> Floats:
    """Sums of products down the columns."""
    products: Floats = np.einsum("kn,kn->n", a, b)
    return products


def inverse(array: Floats) -> Floats:
    """1 / array, and 0 where that is no number of float32."""
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(np.abs(array) >= _SMALLEST, np.float32(1) / array, np.float32(0))
