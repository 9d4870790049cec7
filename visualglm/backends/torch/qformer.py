"""The Q-Former: learned queries that gather what the ViT saw."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from visualglm.backends.torch.linear import Linear
from visualglm.backends.torch.modules import MLP, SelfAttention, merge_heads, run_layer, split_heads
from visualglm.config import QFormerConfig


class CrossAttention(nn.Module):
    """Queries from the Q-Former, packed k|v from the ViT."""

    def __init__(self, width: int, num_heads: int, vision_width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(width, width)
        self.kv = Linear(vision_width, 2 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, vision: Tensor) -> Tensor:
        q = split_heads(self.q(x), self.num_heads)
        k, v = (split_heads(part, self.num_heads) for part in self.kv(vision).chunk(2, dim=-1))
        return self.proj(merge_heads(functional.scaled_dot_product_attention(q, k, v)))  # type: ignore[no-any-return]


class QFormerLayer(nn.Module):
    """A post-LN block; `input_norm` stands before it, where the layer below would have its output norm."""

    def __init__(self, config: QFormerConfig, vision_width: int, has_cross_attention: bool) -> None:
        super().__init__()
        width, heads, eps = config.hidden_size, config.num_attention_heads, config.layer_norm_eps
        self.input_norm = nn.LayerNorm(width, eps)
        self.attention = SelfAttention(width, heads)
        self.attention_norm = nn.LayerNorm(width, eps)
        self.cross_attention = CrossAttention(width, heads, vision_width) if has_cross_attention else None
        self.cross_attention_norm = nn.LayerNorm(width, eps) if has_cross_attention else None
        self.mlp = MLP(width, config.intermediate_size, gelu="none")

    def forward(self, x: Tensor, vision: Tensor) -> Tensor:
        x = self.input_norm(x)
        x = self.attention_norm(x + self.attention(x))
        if self.cross_attention is not None and self.cross_attention_norm is not None:
            x = self.cross_attention_norm(x + self.cross_attention(x, vision))
        return x + self.mlp(x)  # type: ignore[no-any-return]


class QFormer(nn.Module):
    """ViT embeddings [batch, patches, vision width] → [batch, queries, width]."""

    def __init__(self, config: QFormerConfig, vision_width: int) -> None:
        super().__init__()
        self.recompute_activations = False
        self.query_tokens = nn.Parameter(torch.empty(config.num_query_tokens, config.hidden_size))
        self.layers = nn.ModuleList(
            QFormerLayer(config, vision_width, index in config.cross_attention_layers)
            for index in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, vision: Tensor) -> Tensor:
        x = self.query_tokens.expand(len(vision), -1, -1)
        for layer in self.layers:
            x = run_layer(layer, x, vision, recompute=self.recompute_activations)
        return self.norm(x)  # type: ignore[no-any-return]
