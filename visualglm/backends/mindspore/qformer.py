"""The Q-Former: learned queries that gather what the ViT saw."""

from __future__ import annotations

from mindspore import Tensor, nn, ops

from visualglm.backends.mindspore.modules import (
    MLP,
    LayerNorm,
    SelfAttention,
    attend,
    merge_heads,
    new_parameter,
    split_heads,
)
from visualglm.config import QFormerConfig


class CrossAttention(nn.Cell):
    """Queries from the Q-Former, packed k|v from the ViT."""

    def __init__(self, width: int, num_heads: int, vision_width: int) -> None:
        super().__init__()
        self.width = width
        self.num_heads = num_heads
        self.q = nn.Dense(width, width)
        self.kv = nn.Dense(vision_width, 2 * width)
        self.proj = nn.Dense(width, width)

    def construct(self, x: Tensor, vision: Tensor) -> Tensor:
        k, v = ops.split(self.kv(vision), self.width, axis=-1)
        heads = self.num_heads
        attended = attend(split_heads(self.q(x), heads), split_heads(k, heads), split_heads(v, heads))
        return self.proj(merge_heads(attended))


class QFormerLayer(nn.Cell):
    """A post-LN block; `input_norm` stands before it, where the layer below would have its output norm."""

    def __init__(self, config: QFormerConfig, vision_width: int, has_cross_attention: bool) -> None:
        super().__init__()
        width, heads, eps = config.hidden_size, config.num_attention_heads, config.layer_norm_eps
        self.has_cross_attention = has_cross_attention
        self.input_norm = LayerNorm(width, eps)
        self.attention = SelfAttention(width, heads)
        self.attention_norm = LayerNorm(width, eps)
        if has_cross_attention:
            self.cross_attention = CrossAttention(width, heads, vision_width)
            self.cross_attention_norm = LayerNorm(width, eps)
        self.mlp = MLP(width, config.intermediate_size, gelu="none")

    def construct(self, x: Tensor, vision: Tensor) -> Tensor:
        x = self.input_norm(x)
        x = self.attention_norm(x + self.attention(x))
        if self.has_cross_attention:
            x = self.cross_attention_norm(x + self.cross_attention(x, vision))
        return x + self.mlp(x)


class QFormer(nn.Cell):
    """ViT embeddings [batch, patches, vision width] → [batch, queries, width]."""

    def __init__(self, config: QFormerConfig, vision_width: int) -> None:
        super().__init__()
        self.query_tokens = new_parameter(config.num_query_tokens, config.hidden_size)
        self.layers = nn.CellList(
            [
                QFormerLayer(config, vision_width, index in config.cross_attention_layers)
                for index in range(config.num_hidden_layers)
            ]
        )
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def construct(self, vision: Tensor) -> Tensor:
        x = ops.broadcast_to(self.query_tokens, (vision.shape[0], *self.query_tokens.shape))
        for layer in self.layers:
            x = layer(x, vision)
        return self.norm(x)
