"""P-tuning: learned keys and values that every column of a layer sees, beside those of the text."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from visualglm.backends.torch.chatglm import ChatGLM, ChatGLMAttention


def prefix_name(layer: int) -> str:
    """The name of a layer's prefix, float [2, heads, prefix length, head_dim]: keys, then values."""
    return f"text.layers.{layer}.attention.prefix"


def set_prefixes(text: ChatGLM, prefixes: Mapping[str, Tensor] | None) -> None:
    """Give the layers their prefixes, by `prefix_name`, in place of those they have; None takes all of them away."""
    layers: list[ChatGLMAttention] = [layer.attention for layer in text.layers]  # type: ignore[misc]
    for index, attention in enumerate(layers):
        attention.prefix = None if prefixes is None else nn.Parameter(prefixes[prefix_name(index)])


def random_prefixes(text: ChatGLM, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Small random prefixes of `length` for every layer, float32 on the CPU, by `prefix_name`."""
    config = text.config
    shape = (2, config.num_attention_heads, length, config.head_dim)
    return {
        prefix_name(index): 0.01 * torch.randn(shape, generator=generator) for index in range(config.num_hidden_layers)
    }
