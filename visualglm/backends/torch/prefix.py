"""P-tuning: learned keys and values that every column of a layer sees, beside those of the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from visualglm.parameters import prefix_name

if TYPE_CHECKING:
    from visualglm.backends.torch.chatglm import ChatGLM


def with_prefix(
    prefix: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and mask with those of a prefix [2, heads, length, head_dim] appended, visible to all columns.

    keys, values: [batch, heads, columns, head_dim]; mask: bool [batch, 1, seq, columns], or None where all is visible.
    A prefix has no position: it is not rotated.
    """
    own = prefix.to(keys.dtype).unsqueeze(1).expand(-1, len(keys), -1, -1, -1)
    keys, values = (torch.cat([there, added], dim=2) for there, added in zip((keys, values), own, strict=True))
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones(*mask.shape[:-1], prefix.shape[2])], dim=-1)
    return keys, values, mask


def set_prefixes(text: ChatGLM, prefixes: Mapping[str, Tensor] | None) -> None:
    """Give the layers their prefixes, by `prefix_name`, in place of those they have; None takes all of them away."""
    device = text.norm.weight.device
    for index, layer in enumerate(text.layers):
        own = None if prefixes is None else nn.Parameter(prefixes[prefix_name(index)].to(device))
        layer.attention.prefix = own  # type: ignore[union-attr]


def random_prefixes(text: ChatGLM, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Small random prefixes of `length` for every layer, float32 on the CPU, by `prefix_name`."""
    config = text.config
    shape = (2, config.num_attention_heads, length, config.head_dim)
    return {
        prefix_name(index): 0.01 * torch.randn(shape, generator=generator) for index in range(config.num_hidden_layers)
    }
