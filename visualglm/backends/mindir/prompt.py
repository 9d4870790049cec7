"""Prompts in the shape of a MindIR export: as many rows and columns as it has, padded on the right and below."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visualglm.backends.base import ImageEmbeds
from visualglm.checkpoint.mindir_dir import MindirForm
from visualglm.config import VisualGLMConfig
from visualglm.processing.layout import NO_IMAGE, Layout


@dataclass(frozen=True)
class FixedPrompt:
    """A batch and its images, in the order of the rows that have one, for an export of `form`."""

    layout: Layout
    images: tuple[ImageEmbeds, ...]
    config: VisualGLMConfig
    form: MindirForm

    @cached_property
    def arrays(self) -> list[NDArray[Any]]:
        """What the full graph takes but for the column: ids, images, their starts, positions, and what is seen."""
        filled, columns = self._filled(), self.layout.sequence_length
        rows, length = self.form.batch_size, self.form.seq_length
        ids = np.full((rows, length), self.config.text.pad_token_id)
        ids[:, :columns] = filled.input_ids
        embeds = np.zeros((rows, self.config.qformer.num_query_tokens, self.config.text.hidden_size), np.float32)
        for place, image in zip(embeds, self.images, strict=False):
            place[:] = image.array
        # Columns behind the text are as padding: each sees itself alone.
        mask = np.repeat(np.eye(length, dtype=np.bool_)[None, None], rows, axis=0)
        mask[:, 0, :columns, :columns] = filled.attention_mask()
        ids, starts, positions = (
            array.astype(np.int32) for array in (ids, filled.image_starts, filled.position_ids(0, length))
        )
        return [ids, embeds, starts, positions, mask]

    def append(self, token_ids: NDArray[np.int64]) -> FixedPrompt:
        """With one more token a row, int64 [batch]."""
        ids = np.concatenate([self.layout.input_ids, token_ids[:, None]], axis=1)
        return replace(self, layout=replace(self.layout, input_ids=ids))

    def keep_rows(self, rows: NDArray[np.int64]) -> FixedPrompt:
        """Some rows of the batch, with their images."""
        has_image = self.layout.image_starts != NO_IMAGE
        numbers = np.cumsum(has_image) - 1
        images = tuple(self.images[numbers[row]] for row in rows if has_image[row])
        return replace(self, layout=self.layout.keep_rows(rows), images=images)

    def _filled(self) -> Layout:
        """The layout with as many rows as the export has: copies of the last, without an image."""
        rows = np.arange(self.form.batch_size)
        filled = self.layout.keep_rows(np.minimum(rows, self.layout.batch_size - 1))
        return replace(filled, image_starts=np.where(rows < self.layout.batch_size, filled.image_starts, NO_IMAGE))
