"""Tensors that stay where they are stored until someone asks for their bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from visualglm.errors import CheckpointError
from visualglm.parameters import Shape

# numpy has no bfloat16: such tensors are handed over as their raw 16 bits.
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "float64": np.dtype("<f8"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("?"),
}
WEIGHT_DTYPES = ("float32", "float16", "bfloat16")

# Large enough to keep a disk busy, small enough to be hashed and written from the processor's cache.
PIECE_BYTES = 4 << 20
Piece = bytes | memoryview
# Of what is computed a few rows at a time.
_BLOCK_ELEMENTS = 1 << 22


class Tensor(Protocol):
    """What writers need of a tensor: its type and shape, and its bytes in row-major order, a piece at a time."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> Shape: ...

    def array(self) -> NDArray[Any]:
        """The whole tensor in numpy's type for it (`NUMPY_DTYPES`; bfloat16 as uint16 bits)."""

    def pieces(self) -> Iterator[Piece]:
        """Its little-endian bytes in row-major order."""

    def regrouped(self, groups: Shape, axes: Shape) -> Tensor:
        """The same shape, with the first axis split into `groups` and these reordered by `axes`."""


def tensor_bytes(tensor: Tensor) -> int:
    """Size of a tensor in bytes."""
    return prod(tensor.shape) * NUMPY_DTYPES[tensor.dtype].itemsize


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file, `offset` bytes from its start.

    `layout` and `strides` (in elements) say how its elements lie there; read in row-major order of `layout` they
    make up `shape`. The two differ only where a packed axis is reordered on the way.
    """

    path: Path
    dtype: str
    shape: Shape
    offset: int
    layout: Shape
    strides: Shape

    @classmethod
    def contiguous(cls, path: Path, dtype: str, shape: Shape, offset: int) -> Self:
        """A tensor stored in row-major order."""
        return cls(path, dtype, shape, offset, shape, row_major_strides(shape))

    def array(self) -> NDArray[Any]:
        """Memory-mapped (a private mapping: writing to it changes no file), or a copy where elements are reordered."""
        return self._mapped().reshape(self.shape)

    def pieces(self) -> Iterator[Piece]:
        """Bytes in row-major order; raises `CheckpointError` if the file cannot be read or has become shorter."""
        if self.strides == row_major_strides(self.layout):
            yield from self._read_pieces()
            return
        mapped = self._mapped()
        rows = max(1, PIECE_BYTES * self.layout[0] // max(1, mapped.nbytes))
        for start in range(0, self.layout[0], rows):
            yield mapped[start : start + rows].tobytes()

    def regrouped(self, groups: Shape, axes: Shape) -> StoredTensor:
        """See `Tensor`; nothing is read."""
        layout, strides = self.layout, self.strides
        if layout[: len(groups)] != groups:
            layout = groups + layout[1:]
            strides = tuple(strides[0] * step for step in row_major_strides(groups)) + strides[1:]
        order = axes + tuple(range(len(axes), len(layout)))
        return replace(
            self, layout=tuple(layout[axis] for axis in order), strides=tuple(strides[axis] for axis in order)
        )

    def _read_pieces(self) -> Iterator[bytes]:
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.offset)
                remaining = tensor_bytes(self)
                while remaining:
                    piece = file.read(min(PIECE_BYTES, remaining))
                    if not piece:
                        raise CheckpointError(f"{self.path} has become shorter while it was read; get it again.")
                    remaining -= len(piece)
                    yield piece
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read ({error.strerror}).") from error

    def _mapped(self) -> NDArray[Any]:
        dtype = NUMPY_DTYPES[self.dtype]
        if not prod(self.layout):
            return np.empty(self.layout, dtype)
        last = sum((size - 1) * stride for size, stride in zip(self.layout, self.strides, strict=True))
        try:
            flat = np.memmap(self.path, dtype, "c", self.offset, shape=(last + 1,))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path} cannot be mapped into memory ({error}).") from error
        return as_strided(flat, self.layout, tuple(stride * dtype.itemsize for stride in self.strides))


@dataclass(frozen=True, slots=True)
class JoinedTensor:
    """Tensors of one type after one another: where a tensor is stored in pieces, or packed here and not there."""

    parts: tuple[Tensor, ...]
    shape: Shape

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    def array(self) -> NDArray[Any]:
        """A copy; see `Tensor`."""
        return np.concatenate([part.array().reshape(-1) for part in self.parts]).reshape(self.shape)

    def pieces(self) -> Iterator[Piece]:
        """See `Tensor`."""
        for part in self.parts:
            yield from part.pieces()

    def regrouped(self, groups: Shape, axes: Shape) -> LazyTensor:
        """See `Tensor`."""
        return LazyTensor(self.dtype, self.shape, self.array).regrouped(groups, axes)


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor that is computed when it is asked for, such as one merged weight after another."""

    dtype: str
    shape: Shape
    compute: Callable[[], NDArray[Any]]

    def array(self) -> NDArray[Any]:
        """What `compute` gives; raises `CheckpointError` if that is not of the announced type and shape."""
        array = self.compute()
        if array.shape != self.shape or array.dtype != NUMPY_DTYPES[self.dtype]:
            raise CheckpointError(
                f"A tensor announced as {self.dtype} {list(self.shape)} was computed as {array.dtype} "
                f"{list(array.shape)}; this is a fault in the program."
            )
        return array

    def pieces(self) -> Iterator[Piece]:
        """Its bytes in row-major order; the whole array is in memory meanwhile."""
        data = np.ascontiguousarray(self.array()).reshape(-1).view(np.uint8).data
        for start in range(0, len(data), PIECE_BYTES):
            yield data[start : start + PIECE_BYTES]

    def regrouped(self, groups: Shape, axes: Shape) -> LazyTensor:
        """See `Tensor`."""

        def compute() -> NDArray[Any]:
            order = axes + tuple(range(len(axes), len(groups) + len(self.shape) - 1))
            return self.array().reshape(groups + self.shape[1:]).transpose(order).reshape(self.shape)

        return replace(self, compute=compute)


@dataclass(frozen=True, slots=True)
class RowTensor:
    """A tensor whose rows are computed when they are asked for, so that no more than some are in memory.

    `rows` gives those of a slice, in numpy's type for `dtype`.
    """

    dtype: str
    shape: Shape
    rows: Callable[[slice], NDArray[Any]]

    def array(self) -> NDArray[Any]:
        """See `Tensor`."""
        result = np.empty(self.shape, NUMPY_DTYPES[self.dtype])
        for rows in row_blocks(self.shape):
            result[rows] = self.rows(rows)
        return result

    def pieces(self) -> Iterator[Piece]:
        """See `Tensor`."""
        for rows in row_blocks(self.shape):
            yield np.ascontiguousarray(self.rows(rows)).reshape(-1).view(np.uint8).data

    def regrouped(self, groups: Shape, axes: Shape) -> LazyTensor:
        """See `Tensor`."""
        return LazyTensor(self.dtype, self.shape, self.array).regrouped(groups, axes)


def as_float32(array: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """An array as `Tensor.array` gives it, as numbers: bfloat16 comes as bits."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


def rounded(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Numbers as `Tensor.array` has them in `dtype`, rounded to the nearest, ties to even."""
    if dtype != "bfloat16":
        return values.astype(NUMPY_DTYPES[dtype], copy=False)
    bits = np.ascontiguousarray(values).view(np.uint32)
    halves = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    # Adding to the bits of a number that is none might carry into infinity, or zero.
    halves[np.isnan(values)] = 0x7FC0
    return halves


def row_blocks(shape: Shape) -> Iterator[slice]:
    """The rows of an array of `shape`, some at a time."""
    step = max(1, _BLOCK_ELEMENTS // max(1, prod(shape[1:])))
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def row_major_strides(shape: Shape) -> Shape:
    """Steps, in elements, of a row-major array of `shape`."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
