"""ChatGLM: the decoder, with two-dimensional rotary positions and scaled post-LN residuals.

Keys and values of a text under way come in as plain tensors of a fixed capacity, two a layer, and those of the new
column go out: who calls keeps them. A graph of the cells thus has the same inputs at every step, and copies none.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from numpy.typing import NDArray

from visualglm.backends.mindspore.modules import (
    MLP,
    Embedding,
    LayerNorm,
    attend,
    attend_beside,
    merge_heads,
    split_heads,
)
from visualglm.config import TextConfig

# What is added to the score of a column that is not seen; exp of it is 0.
HIDDEN = float(np.finfo(np.float32).min)


def rotary_table(config: TextConfig) -> NDArray[np.float32]:
    """Cosines and sines, [2, max_sequence_length, head_dim / 2], for one half of a head.

    `rotary_inv_freq_dtype` float16 rounds the frequencies first.
    """
    dim = config.head_dim // 2
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    # A power in float32 differs from library to library.
    inv_freq = np.float32(1) / np.power(config.rotary_base, exponents.astype(np.float64)).astype(np.float32)
    if config.rotary_inv_freq_dtype == "float16":
        inv_freq = inv_freq.astype(np.float16).astype(np.float32)
    angles = np.tile(np.outer(np.arange(config.max_sequence_length, dtype=np.float32), inv_freq), 2)
    return np.stack([np.cos(angles), np.sin(angles)])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn both halves of each head by their own position row.

    x: [batch, heads, seq, head_dim]; cos, sin: float32 [batch, 1, seq, 2, head_dim / 2].
    Each half is rotate-half, not interleaved. The turn is computed in float32.
    """
    batch, heads, length, head_dim = x.shape
    halves = ops.cast(ops.reshape(x, (batch, heads, length, 2, head_dim // 2)), ms.float32)
    left, right = ops.split(halves, head_dim // 4, axis=-1)
    turned = halves * cos + ops.concat((-right, left), axis=-1) * sin
    return ops.cast(ops.reshape(turned, x.shape), x.dtype)


class ChatGLMAttention(nn.Cell):
    """Attention between the columns of a prompt, or of one new column to those of a cache."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Dense(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Dense(config.hidden_size, config.hidden_size)

    def construct(
        self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, past: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """past: nothing, or the cached keys and values, to which `bias` belongs then. Keys and values of x go out."""
        heads = self.num_heads
        turning, v = ops.split(split_heads(self.qkv(x), 3 * heads), (2 * heads, heads), axis=1)
        q, k = ops.split(rotate(turning, cos, sin), heads, axis=1)
        attended = attend_beside(q, k, v, past[0], past[1], bias) if past else attend(q, k, v, bias)
        return self.proj(merge_heads(attended)), k, v


class ChatGLMLayer(nn.Cell):
    """A post-LN block whose residuals are the normalised tensors times sqrt(2 * layers)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.residual_scale = config.residual_scale
        self.input_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = ChatGLMAttention(config)
        self.attention_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, gelu="tanh")

    def construct(
        self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, past: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `ChatGLMAttention`."""
        x = self.input_norm(x)
        attended, k, v = self.attention(x, cos, sin, bias, past)
        x = self.attention_norm(x * self.residual_scale + attended)
        return x * self.residual_scale + self.mlp(x), k, v


class ChatGLM(nn.Cell):
    """Token embeddings [batch, seq, width] → hidden states of the same shape, after the final norm."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.CellList([ChatGLMLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.lm_head = nn.Dense(config.hidden_size, config.vocab_size, has_bias=False)
        self.rotary = Tensor(rotary_table(config))

    def construct(self, inputs_embeds: Tensor, position_ids: Tensor, mask: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Hidden states, then the keys and values of these columns, [batch, heads, seq, head_dim], layer by layer.

        position_ids: int32 [batch, 2, seq]. A whole prompt has a mask, bool [batch, 1, seq, seq]. One more column has
        what came before it as `past`, keys and values layer by layer, [batch, heads, columns, head_dim], and a mask of
        them, bool [batch, 1, 1, columns].
        """
        turns = ops.expand_dims(ops.gather(self.rotary, ops.transpose(position_ids, (0, 2, 1)), 1), 2)
        bias = ops.cast(ops.logical_not(mask), ms.float32) * HIDDEN
        x = inputs_embeds
        present: tuple[Tensor, ...] = ()
        for index, layer in enumerate(self.layers):
            x, k, v = layer(x, turns[0], turns[1], bias, past[2 * index : 2 * index + 2])
            present += (k, v)
        return self.norm(x), *present
