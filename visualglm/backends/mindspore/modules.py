"""The blocks that all three parts of the model are built of.

What is between the parameters is the same in eager and in graph mode: shapes and types decide, never values.
"""

from __future__ import annotations

from typing import Literal

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

_BY_KEYS = ops.BatchMatMul(transpose_b=True)


def new_parameter(*shape: int) -> Parameter:
    """A parameter that gets its values later; inside `no_init_parameters` no memory is taken for it until then."""
    return Parameter(initializer("zeros", shape, ms.float32))


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[batch, seq, width] → [batch, heads, seq, width / heads]."""
    batch, length, width = x.shape
    return ops.transpose(ops.reshape(x, (batch, length, num_heads, width // num_heads)), (0, 2, 1, 3))


def merge_heads(x: Tensor) -> Tensor:
    """[batch, heads, seq, head_dim] → [batch, seq, width]."""
    batch, heads, length, head_dim = x.shape
    return ops.reshape(ops.transpose(x, (0, 2, 1, 3)), (batch, length, heads * head_dim))


def scores(q: Tensor, k: Tensor) -> Tensor:
    """How much each query heeds each key before the softmax, float32 [batch, heads, queries, keys]."""
    # Not a transposed copy of k: of a long cache it takes longer than the product.
    return ops.cast(_BY_KEYS(q * (q.shape[-1] ** -0.5), k), ms.float32)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Attention to keys and values, [batch, heads, queries, head_dim]; the softmax is taken in float32.

    bias: float32, broadcast over the scores [batch, heads, queries, keys].
    """
    return ops.matmul(ops.cast(ops.softmax(scores(q, k) + bias, axis=-1), v.dtype), v)


def attend_beside(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, bias: Tensor) -> Tensor:
    """Attention of one column to itself and to a past, which is only read: copied at every step, a cache of thousands
    of columns would take longer than all else.

    past_k, past_v: [batch, heads, columns, head_dim]; bias: float32, broadcast over [batch, heads, 1, columns].
    """
    both = ops.concat((scores(q, past_k) + bias, scores(q, k)), axis=-1)
    heeded, own = ops.split(ops.cast(ops.softmax(both, axis=-1), v.dtype), (past_k.shape[2], 1), axis=-1)
    return ops.matmul(heeded, past_v) + own * v


class LayerNorm(nn.Cell):
    """Over the last axis, in float32 whatever the input is; the parameters are called as everywhere else."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = new_parameter(width)
        self.bias = new_parameter(width)
        self.normalize = ops.LayerNorm(begin_norm_axis=-1, begin_params_axis=-1, epsilon=eps)

    def construct(self, x: Tensor) -> Tensor:
        weight, bias = ops.cast(self.weight, ms.float32), ops.cast(self.bias, ms.float32)
        return ops.cast(self.normalize(ops.cast(x, ms.float32), weight, bias)[0], x.dtype)


class Embedding(nn.Cell):
    """Ids of any shape → their rows of `weight` [vocabulary, width]."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight = new_parameter(vocab_size, width)

    def construct(self, ids: Tensor) -> Tensor:
        return ops.gather(self.weight, ids, 0)


class SelfAttention(nn.Cell):
    """Full self-attention with a packed q|k|v projection, as in the ViT and the Q-Former."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Dense(width, 3 * width)
        self.proj = nn.Dense(width, width)

    def construct(self, x: Tensor) -> Tensor:
        q, k, v = ops.split(split_heads(self.qkv(x), 3 * self.num_heads), self.num_heads, axis=1)
        return self.proj(merge_heads(attend(q, k, v)))


class MLP(nn.Cell):
    """Two linear layers around a GELU: exact (`none`) in the ViT and the Q-Former, `tanh` in ChatGLM."""

    def __init__(self, width: int, intermediate: int, gelu: Literal["none", "tanh"]) -> None:
        super().__init__()
        self.gelu = gelu
        self.fc1 = nn.Dense(width, intermediate)
        self.fc2 = nn.Dense(intermediate, width)

    def construct(self, x: Tensor) -> Tensor:
        return self.fc2(ops.gelu(self.fc1(x), approximate=self.gelu))
