"""From token ids to what a decoder needs beside them: padding, two-dimensional positions and what each row may see.

With `context_length` the number of columns before `<sop>` (pads not counted):
positions row 0 is 0 … context_length-1 and stays there from `<sop>` on; row 1 is 0 before `<sop>` and then 1, 2, 3 …
Columns before `<sop>` are visible to every column, the others to themselves and later ones, pads to none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index

import numpy as np
from numpy.typing import NDArray

from visualglm.errors import PromptError

NO_IMAGE = -1


@dataclass(frozen=True)
class Layout:
    """A left-padded batch. All arrays are int64.

    input_ids: [batch, seq]
    pad_lengths: [batch], columns of padding on the left of each row
    context_lengths: [batch], columns from the end of the padding up to `<sop>`
    image_starts: [batch], column of the first image slot, or -1 in a row without an image
    """

    input_ids: NDArray[np.int64]
    pad_lengths: NDArray[np.int64]
    context_lengths: NDArray[np.int64]
    image_starts: NDArray[np.int64]

    @property
    def batch_size(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def sequence_length(self) -> int:
        return int(self.input_ids.shape[1])

    def position_ids(self, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """Positions [batch, 2, stop - start] of the columns from `start` to `stop` (the end of the prompt)."""
        columns = np.arange(start, self.sequence_length if stop is None else stop)[None, :]
        from_text = np.maximum(columns - self.pad_lengths[:, None], 0)
        context = self.context_lengths[:, None]
        return np.stack([np.minimum(from_text, context - 1), np.maximum(from_text - context + 1, 0)], axis=1)

    def keep_rows(self, rows: NDArray[np.int64]) -> Layout:
        """The layout of some rows of the batch, padding unchanged."""
        return Layout(self.input_ids[rows], self.pad_lengths[rows], self.context_lengths[rows], self.image_starts[rows])

    def text_ids(self, row: int, image_length: int) -> NDArray[np.int64]:
        """The ids of a row that stand for text: neither padding nor image slots."""
        columns, start = np.arange(self.sequence_length), self.image_starts[row]
        is_slot = (columns >= start) & (columns < start + image_length) & (start != NO_IMAGE)
        ids: NDArray[np.int64] = self.input_ids[row][(columns >= self.pad_lengths[row]) & ~is_slot]
        return ids

    def attention_mask(self) -> NDArray[np.bool_]:
        """What each column of the prompt sees: [batch, seq, seq], True where visible.

        A pad sees only itself, so that no row of a softmax is empty.
        """
        columns = np.arange(self.sequence_length)
        end_of_context = (self.pad_lengths + self.context_lengths)[:, None, None]
        seen = (columns[None, None, :] < end_of_context) | (columns[None, None, :] <= columns[None, :, None])
        is_text = columns[None, :] >= self.pad_lengths[:, None]
        seen &= is_text[:, None, :] & is_text[:, :, None]
        return seen | np.eye(self.sequence_length, dtype=np.bool_)[None]


def layout_from_ids(
    input_ids: NDArray[np.int64],
    *,
    pad_token_id: int,
    bos_token_id: int,
    image_start: int | Sequence[int | None] | None = None,
) -> Layout:
    """Find the padding and the context of each row of `input_ids` [batch, seq].

    Leading pads are padding, except from the row's `image_start` on, where they may be image slots.
    Raises `PromptError` if a row has no `<sop>`, or `image_start` is not one column, or one for each row.
    """
    batch, length = input_ids.shape
    starts = _image_starts(image_start, batch)
    pads = np.zeros(batch, np.int64)
    contexts = np.zeros(batch, np.int64)
    for row, ids in enumerate(input_ids):
        text = np.flatnonzero(ids != pad_token_id)
        first = int(text[0]) if len(text) else length
        pads[row] = min(first, starts[row]) if starts[row] != NO_IMAGE else first
        answers = np.flatnonzero(ids == bos_token_id)
        if not len(answers) or answers[0] <= pads[row]:
            raise PromptError(
                f"Row {row} of input_ids has no <sop> (id {bos_token_id}) after its first token; "
                "end each prompt with [gMASK] <sop>."
            )
        contexts[row] = answers[0] - pads[row]
    return Layout(input_ids, pads, contexts, starts)


def pad_batch(
    rows: Sequence[Sequence[int]],
    image_starts: Sequence[int | None],
    *,
    pad_token_id: int,
    bos_token_id: int,
) -> Layout:
    """Left-pad rows of unequal length into one batch; `image_starts` count from the start of each unpadded row."""
    longest = max(len(row) for row in rows)
    input_ids = np.full((len(rows), longest), pad_token_id, np.int64)
    pads = np.array([longest - len(row) for row in rows], np.int64)
    for row, ids in enumerate(rows):
        input_ids[row, pads[row] :] = ids
    contexts = np.array([list(ids).index(bos_token_id) for ids in rows], np.int64)
    starts = np.array(
        [NO_IMAGE if start is None else start + pad for start, pad in zip(image_starts, pads, strict=True)], np.int64
    )
    return Layout(input_ids, pads, contexts, starts)


def _image_starts(image_start: int | Sequence[int | None] | None, batch: int) -> NDArray[np.int64]:
    given = np.array(image_start, dtype=object)  # integers of any library, and None
    if given.ndim == 0:
        given = np.repeat(given, batch)
    if given.shape != (batch,):
        raise PromptError(f"image_start names {len(given)} rows, but input_ids has {batch}; give one for each row.")
    try:
        return np.array([NO_IMAGE if start is None else max(index(start), NO_IMAGE) for start in given], np.int64)
    except (TypeError, OverflowError) as error:
        raise PromptError(
            f"image_start is {image_start!r}; give one column or one for each row, as integers, or None for no image."
        ) from error
