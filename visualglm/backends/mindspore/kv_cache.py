"""Keys and values of the tokens seen so far, in tensors made once for the longest answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mindspore import Tensor, ops
from numpy.typing import NDArray


class KVCache:
    """Two tensors a layer, [batch, heads, capacity, head_dim], of which the first `length` columns are filled.

    places: the row of the tensors that each row of the text has. In graph mode the tensors keep their shape, and with
    it those of rows that have ended, since a graph for fewer rows would have to be compiled first.
    """

    def __init__(self, tensors: Sequence[Tensor], length: int, rows: int, *, keeps_shape: bool) -> None:
        self.tensors = tensors
        self.length = length
        self.places: NDArray[np.int64] = np.arange(rows)
        self._keeps_shape = keeps_shape

    def append(self, present: Sequence[Tensor]) -> None:
        """One more column, [batch, heads, 1, head_dim] a tensor, which is written in its place."""
        for tensor, new in zip(self.tensors, present, strict=True):
            tensor[:, :, self.length : self.length + 1] = new
        self.length += 1

    @property
    def batch_size(self) -> int:
        """Rows of the tensors."""
        return int(self.tensors[0].shape[0])

    @property
    def capacity(self) -> int:
        return int(self.tensors[0].shape[2])

    def keep_rows(self, rows: NDArray[np.int64]) -> None:
        """Drop the finished rows: only `rows` (int64 [kept]) stay, in that order; one may also be kept twice."""
        places = self.places[rows]
        if self._keeps_shape and len(np.unique(places)) == len(places):
            self.places = places
            return
        indices = Tensor.from_numpy(places.astype(np.int32))
        self.tensors = [ops.gather(tensor, indices, 0) for tensor in self.tensors]
        self.places = np.arange(len(places))


def fitted(present: Sequence[Tensor], columns: int, capacity: int) -> list[Tensor]:
    """The last `columns` of the keys and values of a prompt, at the start of tensors of `capacity`."""
    batch, heads, length, head_dim = present[0].shape
    room = ops.zeros((batch, heads, capacity - columns, head_dim), present[0].dtype)
    return [ops.concat((tensor[:, :, length - columns :], room), axis=2) for tensor in present]
