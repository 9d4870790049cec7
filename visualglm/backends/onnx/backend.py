"""An exported model on ONNX Runtime as a `Backend`: numpy in, numpy out, and no torch anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from visualglm.backends.base import ImageEmbeds
from visualglm.backends.onnx.kv_cache import GrowingPrompt, KVCache
from visualglm.backends.onnx.session import Device, computes
from visualglm.config import VisualGLMConfig
from visualglm.processing.layout import Layout

# Images that go through the ViT at once: more would only grow its activations.
_IMAGES_AT_ONCE = 16
# What is added to the score of a column that is not seen; exp of it is 0.
_HIDDEN = np.finfo(np.float32).min
_CACHED = "past_key_values.0.key"


class OnnxBackend:
    """The three graphs of a lite directory on one device."""

    def __init__(
        self, config: VisualGLMConfig, sessions: Mapping[str, ort.InferenceSession], device: Device, precision: str
    ) -> None:
        self.device = device
        self._config = config
        self._precision = precision
        self._vision_encoder = sessions["vision_encoder"]
        self._embed_tokens = sessions["embed_tokens"]
        self._decoder = sessions["decoder"]
        self._input_types = {value.name: value.type for value in self._decoder.get_inputs()}

    @property
    def config(self) -> VisualGLMConfig:
        return self._config

    @property
    def description(self) -> str:
        return f"onnx on {self.device}, {self._precision}"

    @property
    def threads(self) -> int:
        return int(self._decoder.get_session_options().intra_op_num_threads)

    @property
    def has_cache(self) -> bool:
        """Whether the export has an incremental graph; without one each step runs the whole prompt again."""
        return _CACHED in self._input_types

    @computes
    def encode_images(self, pixels: NDArray[np.float32]) -> list[ImageEmbeds]:
        chunks = np.split(pixels, range(_IMAGES_AT_ONCE, len(pixels), _IMAGES_AT_ONCE))
        return [
            ImageEmbeds(array) for chunk in chunks for array in self._vision_encoder.run(None, {"pixels": chunk})[0]
        ]

    @computes
    def prefill(
        self, layout: Layout, image_embeds: Sequence[ImageEmbeds], capacity: int
    ) -> tuple[NDArray[np.float32], KVCache | GrowingPrompt]:
        embeds = self._embed(layout, image_embeds)
        if not self.has_cache:
            return self._run_all(layout, embeds, keep=1)[:, -1], GrowingPrompt(embeds, layout.input_ids)
        kind = self._input_types[_CACHED]
        cache = KVCache(self.config.text, layout.pad_lengths, capacity, kind, self.device)
        return self._run_cached(embeds, layout.position_ids(), attention_bias(layout.attention_mask()), cache), cache

    @computes
    def step(self, token_ids: NDArray[np.int64], layout: Layout, cache: KVCache | GrowingPrompt) -> NDArray[np.float32]:
        embeds = self._lookup(token_ids[:, None])
        if isinstance(cache, GrowingPrompt):
            cache.append(embeds, token_ids)
            longer = Layout(cache.token_ids, layout.pad_lengths, layout.context_lengths, layout.image_starts)
            return self._run_all(longer, cache.embeds, keep=1)[:, -1]
        column = cache.length
        visible = np.ones((1, 1, column + 1), np.bool_)
        if cache.has_pads:
            visible = np.arange(column + 1) >= layout.pad_lengths[:, None, None]
        return self._run_cached(embeds, layout.position_ids(column, column + 1), attention_bias(visible), cache)

    @computes
    def logits(self, layout: Layout, image_embeds: Sequence[ImageEmbeds]) -> NDArray[np.float32]:
        return self._run_all(layout, self._embed(layout, image_embeds), keep=layout.sequence_length)

    def _embed(self, layout: Layout, image_embeds: Sequence[ImageEmbeds]) -> NDArray[np.float32]:
        """[batch, sequence, width], with each image in its row's slots."""
        embeds = self._lookup(layout.input_ids)
        fill_slots(embeds, layout, image_embeds)
        return embeds

    def _lookup(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        embeds: NDArray[np.float32] = self._embed_tokens.run(None, {"input_ids": token_ids})[0]
        return embeds

    def _run_all(self, layout: Layout, embeds: NDArray[np.float32], *, keep: int) -> NDArray[np.float32]:
        """Logits [batch, keep, vocab] of the last columns of a whole prompt; nothing is cached."""
        inputs = _inputs(embeds, layout.position_ids(), attention_bias(layout.attention_mask()), keep)
        if self.has_cache:
            empty = KVCache(self.config.text, layout.pad_lengths, 0, self._input_types[_CACHED], self.device)
            inputs |= {f"past_key_values.{name}": buffer.numpy() for name, buffer in empty.buffers.items()}
        logits: NDArray[np.float32] = self._decoder.run(["logits"], inputs)[0]
        return logits

    def _run_cached(
        self,
        embeds: NDArray[np.float32],
        position_ids: NDArray[np.int64],
        bias: NDArray[np.float32],
        cache: KVCache,
    ) -> NDArray[np.float32]:
        """Logits [batch, vocab] of the last column; keys and values are stored behind those of the cache."""
        binding = self._decoder.io_binding()
        for name, array in _inputs(embeds, position_ids, bias, 1).items():
            binding.bind_cpu_input(name, array)
        for name, buffer in cache.buffers.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", buffer)
            binding.bind_ortvalue_output(f"present.{name}", buffer)
        binding.bind_output("logits")
        self._decoder.run_with_iobinding(binding)
        cache.length += embeds.shape[1]
        logits: NDArray[np.float32] = binding.get_outputs()[-1].numpy()
        return logits[:, -1]


def _inputs(
    embeds: NDArray[np.float32], position_ids: NDArray[np.int64], bias: NDArray[np.float32], keep: int
) -> dict[str, NDArray[Any]]:
    return {
        "inputs_embeds": embeds,
        "position_ids": position_ids,
        "attention_bias": bias,
        "logits_to_keep": np.array([keep]),
    }


def fill_slots(embeds: NDArray[np.float32], layout: Layout, image_embeds: Sequence[ImageEmbeds]) -> None:
    """Put the images of the rows that have one into their slots of `embeds` [batch, sequence, width]."""
    for row, image in zip(np.flatnonzero(layout.image_starts >= 0), image_embeds, strict=True):
        start = layout.image_starts[row]
        embeds[row, start : start + len(image.array)] = image.array


def attention_bias(visible: NDArray[np.bool_]) -> NDArray[np.float32]:
    """[batch, columns, total] of what is seen → what is added to the scores, [batch, 1, columns, total]."""
    return np.where(visible, np.float32(0), _HIDDEN)[:, None]
