"""The model on MindSpore as a `Backend`: numpy in, numpy out, on a CPU or an Ascend processor."""

from __future__ import annotations

from collections.abc import Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from numpy.typing import NDArray

from visualglm.backends.base import ImageEmbeds
from visualglm.backends.mindspore.graphs import Calls
from visualglm.backends.mindspore.joined import VisualGLMModel
from visualglm.backends.mindspore.kv_cache import KVCache, fitted
from visualglm.backends.out_of_memory import tells_out_of_memory
from visualglm.config import DType, VisualGLMConfig
from visualglm.processing.layout import NO_IMAGE, Layout

# Images that go through the ViT at once: more would only grow its activations.
_IMAGES_AT_ONCE = 16


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error).lower())


_computes = tells_out_of_memory(_is_out_of_memory)


class MindSporeBackend:
    """A `VisualGLMModel` on the device of this process in one precision.

    compiled: whether prompts and steps run as graphs. Their inputs are then padded to few shapes, rows and columns of
    which nothing comes back. Images are always encoded operator by operator: their number varies, and for that little
    is gained by a graph.
    """

    def __init__(self, model: VisualGLMModel, *, device: str, dtype: DType, compiled: bool) -> None:
        self.model = model.set_train(False)
        self.device = device
        self.dtype = dtype
        self.calls = Calls(model, compiled=compiled)

    @property
    def config(self) -> VisualGLMConfig:
        return self.model.config

    @property
    def description(self) -> str:
        return f"mindspore on {self.device}, {self.dtype}, {'graph' if self.calls.compiled else 'eager'}"

    @property
    def threads(self) -> int:
        return int(ms.get_context("runtime_num_threads"))

    @property
    def compilations(self) -> int:
        """How many graphs have been compiled so far."""
        return self.calls.compilations

    @_computes
    def encode_images(self, pixels: NDArray[np.float32]) -> list[ImageEmbeds]:
        encoded = [
            ops.cast(self.model.encode_images(Tensor.from_numpy(chunk)), ms.float32).asnumpy()
            for chunk in np.split(pixels, range(_IMAGES_AT_ONCE, len(pixels), _IMAGES_AT_ONCE))
        ]
        return [ImageEmbeds(array) for array in np.concatenate(encoded)]

    @_computes
    def prefill(
        self, layout: Layout, image_embeds: Sequence[ImageEmbeds], capacity: int
    ) -> tuple[NDArray[np.float32], KVCache]:
        logits, present = self.calls.run("prefill", *self._prompt(layout, image_embeds))
        columns = layout.sequence_length
        tensors = fitted(present, columns, self.calls.columns(capacity, self.config.text.max_sequence_length))
        cache = KVCache(tensors, columns, layout.batch_size, keeps_shape=self.calls.compiled)
        return logits[: layout.batch_size], cache

    @_computes
    def step(self, token_ids: NDArray[np.int64], layout: Layout, cache: KVCache) -> NDArray[np.float32]:
        column, places, rows = cache.length, cache.places, cache.batch_size
        tokens, positions = np.zeros(rows, np.int32), np.zeros((rows, 2, 1), np.int32)
        visible = np.zeros((rows, 1, 1, cache.capacity), np.bool_)
        tokens[places], positions[places] = token_ids, layout.position_ids(column, column + 1)
        visible[places, 0, 0, :column] = np.arange(column) >= layout.pad_lengths[:, None]
        inputs = map(Tensor.from_numpy, (tokens, positions, visible))
        logits, present = self.calls.run("step", *inputs, *cache.tensors)
        cache.append(present)
        return logits[places]

    @_computes
    def logits(self, layout: Layout, image_embeds: Sequence[ImageEmbeds]) -> NDArray[np.float32]:
        logits, _ = self.calls.run("logits", *self._prompt(layout, image_embeds))
        return logits[: layout.batch_size, -layout.sequence_length :]

    def _prompt(self, layout: Layout, image_embeds: Sequence[ImageEmbeds]) -> list[Tensor]:
        """What a whole prompt is put to the model with, in a shape that there is a graph for."""
        columns = self.calls.columns(layout.sequence_length, self.config.text.max_sequence_length)
        padded = padded_layout(layout, self.calls.rows(layout.batch_size), columns, self.config.text.pad_token_id)
        shape = (padded.batch_size, self.config.qformer.num_query_tokens, self.config.text.hidden_size)
        images = np.zeros(shape, np.float32)
        for place, image in zip(images, image_embeds, strict=False):
            place[:] = image.array
        small = (padded.input_ids, padded.image_starts, padded.position_ids())
        ids, starts, positions = (Tensor.from_numpy(array.astype(np.int32)) for array in small)
        mask = Tensor.from_numpy(padded.attention_mask()[:, None])
        return [ids, Tensor.from_numpy(images), starts, positions, mask]


def padded_layout(layout: Layout, rows: int, columns: int, pad_token_id: int) -> Layout:
    """`layout` with more padding on its left, and with more rows, which are copies of its last without an image."""
    more_rows, more_columns = rows - layout.batch_size, columns - layout.sequence_length
    ids = np.pad(layout.input_ids, ((0, 0), (more_columns, 0)), constant_values=pad_token_id)
    starts = np.where(layout.image_starts == NO_IMAGE, NO_IMAGE, layout.image_starts + more_columns)
    return Layout(
        np.pad(ids, ((0, more_rows), (0, 0)), mode="edge"),
        np.pad(layout.pad_lengths + more_columns, (0, more_rows), mode="edge"),
        np.pad(layout.context_lengths, (0, more_rows), mode="edge"),
        np.pad(starts, (0, more_rows), constant_values=NO_IMAGE),
    )
