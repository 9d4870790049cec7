"""From a batch to what the loss takes: arrays in MindSpore's types, and for graphs all of one shape."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from visualglm.backends.mindspore.backend import padded_layout
from visualglm.training.batches import Batch
from visualglm.training.examples import IGNORED_LABEL


@dataclass(frozen=True)
class Shape:
    """Of the largest batch: rows, columns, and labels that count."""

    rows: int
    columns: int
    labels: int


@dataclass(frozen=True)
class LossInputs:
    """int32, but for the mask.

    input_ids: [batch, seq]; image_starts: [batch]; position_ids: [batch, 2, seq]; mask: bool [batch, 1, seq, seq]
    places, targets: [labels], the column from which each is predicted, counted through all rows, and its id
    count: how many of them count; those after them only fill up the shape
    """

    input_ids: NDArray[np.int32]
    image_starts: NDArray[np.int32]
    position_ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    places: NDArray[np.int32]
    targets: NDArray[np.int32]
    count: int


def loss_inputs(batch: Batch, shape: Shape | None, pad_token_id: int) -> LossInputs:
    """Of `batch`, filled up to `shape`, if one is given, with pads that nothing sees."""
    layout, labels = batch.layout, batch.labels
    if shape is not None:
        rows, columns = shape.rows - layout.batch_size, shape.columns - layout.sequence_length
        layout = padded_layout(layout, shape.rows, shape.columns, pad_token_id)
        labels = np.pad(labels, ((0, rows), (columns, 0)), constant_values=IGNORED_LABEL)
    row, column = np.nonzero(labels[:, 1:] != IGNORED_LABEL)
    count = len(row)
    # Not even a batch of which nothing counts is without a place: it still takes part in what processes exchange.
    fill = (shape.labels if shape else max(1, count)) - count
    return LossInputs(
        layout.input_ids.astype(np.int32),
        layout.image_starts.astype(np.int32),
        layout.position_ids().astype(np.int32),
        layout.attention_mask()[:, None],
        np.pad(row * layout.sequence_length + column, (0, fill)).astype(np.int32),
        np.pad(labels[row, column + 1], (0, fill)).astype(np.int32),
        count,
    )
