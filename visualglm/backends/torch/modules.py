"""The two blocks that all three parts of the model are built of."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from visualglm.backends.torch.linear import Linear


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[batch, seq, width] → [batch, heads, seq, width / heads]."""
    return x.view(*x.shape[:-1], num_heads, -1).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[batch, heads, seq, head_dim] → [batch, seq, width]."""
    return x.transpose(1, 2).flatten(2)


def run_layer(layer: nn.Module, *inputs: Any, recompute: bool) -> Tensor:
    """`layer(*inputs)`; with `recompute` activations are not kept for the backward pass but computed again in it."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False)  # type: ignore[no-any-return]
    return layer(*inputs)  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    """Full self-attention with a packed q|k|v projection, as in the ViT and the Q-Former."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj(merge_heads(functional.scaled_dot_product_attention(q, k, v)))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Two linear layers around a GELU: exact (`none`) in the ViT and the Q-Former, `tanh` in ChatGLM."""

    def __init__(self, width: int, intermediate: int, gelu: Literal["none", "tanh"]) -> None:
        super().__init__()
        self.gelu = gelu
        self.fc1 = Linear(width, intermediate)
        self.fc2 = Linear(intermediate, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x), approximate=self.gelu))  # type: ignore[no-any-return]
