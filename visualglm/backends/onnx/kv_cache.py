"""Keys and values in buffers made once for the longest answer; the graph stores new ones in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from visualglm.backends.onnx.session import Device
from visualglm.config import TextConfig

_INT8 = "tensor(int8)"
_TYPES: dict[str, type[np.generic]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16, _INT8: np.int8}


class KVCache:
    """The state of each layer on the device, by names such as "0.key".

    Keys and values are [batch, heads, capacity, head_dim]; an int8 cache has scales float32 [batch, 1, 4 * width] too.
    """

    def __init__(
        self, config: TextConfig, pad_lengths: NDArray[np.int64], capacity: int, element_type: str, device: Device
    ) -> None:
        batch_size = len(pad_lengths)
        shape = (batch_size, config.num_attention_heads, capacity, config.head_dim)
        scales_shape = (batch_size, 1, 4 * config.hidden_size)
        self._device = device
        self.buffers = {}
        for layer in range(config.num_hidden_layers):
            for part in ("key", "value"):
                self.buffers[f"{layer}.{part}"] = self._place(np.empty(shape, _TYPES[element_type]))
            if element_type == _INT8:
                self.buffers[f"{layer}.scales"] = self._place(np.zeros(scales_shape, np.float32))
        self.has_pads = bool(pad_lengths.any())
        self.length = 0

    def keep_rows(self, rows: NDArray[np.int64]) -> None:
        """Drop the finished rows: only `rows` of the batch stay, in that order."""
        self.buffers = {name: self._place(buffer.numpy()[rows]) for name, buffer in self.buffers.items()}

    def _place(self, array: NDArray[Any]) -> ort.OrtValue:
        """On a CPU the array's own memory."""
        return ort.OrtValue.ortvalue_from_numpy(array, self._device.kind, self._device.index)


class GrowingPrompt:
    """What an export without a KV cache has in its place: all embeddings so far, to be run again at each step."""

    def __init__(self, embeds: NDArray[np.float32], token_ids: NDArray[np.int64]) -> None:
        self.embeds = embeds
        self.token_ids = token_ids

    @property
    def length(self) -> int:
        return int(self.embeds.shape[1])

    def append(self, embeds: NDArray[np.float32], token_ids: NDArray[np.int64]) -> None:
        """embeds: [batch, 1, width]; token_ids: [batch]."""
        self.embeds = np.concatenate([self.embeds, embeds], axis=1)
        self.token_ids = np.concatenate([self.token_ids, token_ids[:, None]], axis=1)

    def keep_rows(self, rows: NDArray[np.int64]) -> None:
        self.embeds, self.token_ids = self.embeds[rows], self.token_ids[rows]
