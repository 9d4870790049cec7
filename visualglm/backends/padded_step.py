"""What one more token of a batch is computed from, for graphs whose rows and columns are more than the text has."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from visualglm.processing.layout import Layout


def padded_step(
    token_ids: NDArray[np.int64],
    layout: Layout,
    column: int,
    places: NDArray[np.int64],
    shape: tuple[int, int],
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.bool_]]:
    """Token ids, int32 [rows], positions, int32 [rows, 2, 1], and what is seen of the past, bool [rows, 1, 1, columns].

    column: the one in which the token stands. places: the row of each row of the text; in others nothing is seen.
    shape: rows and columns.
    """
    rows, columns = shape
    tokens, positions = np.zeros(rows, np.int32), np.zeros((rows, 2, 1), np.int32)
    visible = np.zeros((rows, 1, 1, columns), np.bool_)
    tokens[places], positions[places] = token_ids, layout.position_ids(column, column + 1)
    visible[places, 0, 0, :column] = np.arange(column) >= layout.pad_lengths[:, None]
    return tokens, positions, visible
