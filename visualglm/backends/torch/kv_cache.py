"""Keys and values of the tokens seen so far, in buffers made once for the longest answer."""

from __future__ import annotations

import torch
from torch import Tensor

from visualglm.config import TextConfig


class KVCache:
    """Preallocated buffers [batch, heads, capacity, head_dim] per layer; the first `length` columns are filled."""

    def __init__(
        self, config: TextConfig, batch_size: int, capacity: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (batch_size, config.num_attention_heads, capacity, config.head_dim)
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.capacity = capacity
        self.length = 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new columns [batch, heads, new, head_dim] behind `length`; all columns of the layer come back.

        `length` itself moves in `advance`, once all layers have stored theirs.
        """
        end = self.length + key.shape[2]
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, columns: int) -> None:
        self.length += columns

    def keep_rows(self, rows: Tensor) -> None:
        """Drop the finished rows: only `rows` (int64 [kept]) of the batch stay, in that order."""
        self.keys = [key[rows] for key in self.keys]
        self.values = [value[rows] for value in self.values]
