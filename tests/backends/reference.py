"""VisualGLM once more, in float64 and as plainly as it can be said: one row, no batch, no padding, no cache.

Written from the facts about the model, apart from the package, so that the two can be held against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import erf, sqrt

import numpy as np
from numpy.typing import NDArray

from visualglm.config import QFormerConfig, TextConfig, VisionConfig, VisualGLMConfig

Array = NDArray[np.float64]


class Weights:
    """The parameters below one name."""

    def __init__(self, tensors: Mapping[str, Array], prefix: str = "") -> None:
        self._tensors = tensors
        self._prefix = prefix

    def __call__(self, name: str) -> Array:
        return self._tensors[self._prefix + name]

    def below(self, name: str) -> Weights:
        return Weights(self._tensors, f"{self._prefix}{name}.")

    def linear(self, name: str, x: Array) -> Array:
        return x @ self(f"{name}.weight").T + self(f"{name}.bias")

    def norm(self, name: str, x: Array, eps: float) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * self(f"{name}.weight") + self(
            f"{name}.bias"
        )

    def mlp(self, x: Array, gelu: Callable[[Array], Array]) -> Array:
        return self.linear("mlp.fc2", gelu(self.linear("mlp.fc1", x)))


def reference_logits(
    config: VisualGLMConfig,
    tensors: Mapping[str, Array],
    ids: NDArray[np.int64],
    pixels: Array | None = None,
    image_start: int | None = None,
) -> Array:
    """Logits [seq, vocab] of one row of ids; pixels: [3, S, S], shown in the slots from `image_start` on."""
    weights = Weights(tensors)
    embeds = weights("text.word_embeddings.weight")[ids]
    if pixels is not None and image_start is not None:
        seen = _vit(config.vision, weights.below("vision"), pixels)
        image = weights.linear("projection", _qformer(config.qformer, weights.below("qformer"), seen))
        embeds[image_start : image_start + len(image)] = image
    context = ids.tolist().index(config.text.bos_token_id)
    hidden = _chatglm(config.text, weights.below("text"), embeds, context)
    return hidden @ weights("text.lm_head.weight").T


def exact_gelu(x: Array) -> Array:
    return x * 0.5 * (1 + np.vectorize(erf)(x / sqrt(2)))


def tanh_gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _attend(q: Array, k: Array, v: Array, heads: int, visible: NDArray[np.bool_] | None = None) -> Array:
    width = q.shape[1] // heads
    out = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = q[:, part] @ k[:, part].T / sqrt(width)
        if visible is not None:
            scores[~visible] = -np.inf
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        out.append(shares / shares.sum(-1, keepdims=True) @ v[:, part])
    return np.concatenate(out, axis=1)


def _self_attention(weights: Weights, x: Array, heads: int) -> Array:
    return weights.linear("attention.proj", _attend(*np.split(weights.linear("attention.qkv", x), 3, axis=1), heads))


def _vit(config: VisionConfig, weights: Weights, pixels: Array) -> Array:
    edge = config.patch_size
    kernel, bias = weights("patch_embed.weight"), weights("patch_embed.bias")
    corners = [(y, x) for y in range(0, config.image_size, edge) for x in range(0, config.image_size, edge)]
    patches = [np.einsum("wcyx,cyx->w", kernel, pixels[:, y : y + edge, x : x + edge]) + bias for y, x in corners]
    x = np.stack([weights("class_token")[0], *patches]) + weights("position_embeddings")
    for index in range(config.num_hidden_layers):
        layer = weights.below(f"layers.{index}")
        x = x + _self_attention(layer, layer.norm("norm1", x, config.layer_norm_eps), config.num_attention_heads)
        x = x + layer.mlp(layer.norm("norm2", x, config.layer_norm_eps), exact_gelu)
    return weights.norm("norm", x, config.final_layer_norm_eps)


def _qformer(config: QFormerConfig, weights: Weights, seen: Array) -> Array:
    x, heads, eps = weights("query_tokens"), config.num_attention_heads, config.layer_norm_eps
    for index in range(config.num_hidden_layers):
        layer = weights.below(f"layers.{index}")
        a = layer.norm("input_norm", x, eps)
        m = layer.norm("attention_norm", a + _self_attention(layer, a, heads), eps)
        if index in config.cross_attention_layers:
            k, v = np.split(layer.linear("cross_attention.kv", seen), 2, axis=1)
            crossed = _attend(layer.linear("cross_attention.q", m), k, v, heads)
            m = layer.norm("cross_attention_norm", m + layer.linear("cross_attention.proj", crossed), eps)
        x = m + layer.mlp(m, exact_gelu)
    return weights.norm("norm", x, eps)


def _chatglm(config: TextConfig, weights: Weights, x: Array, context: int) -> Array:
    columns = np.arange(len(x))
    positions = np.minimum(columns, context - 1), np.maximum(columns - context + 1, 0)
    visible = (columns < context) | (columns <= columns[:, None])
    alpha, eps, heads = sqrt(2 * config.num_hidden_layers), config.layer_norm_eps, config.num_attention_heads
    for index in range(config.num_hidden_layers):
        layer = weights.below(f"layers.{index}")
        a = layer.norm("input_norm", x, eps)
        q, k, v = np.split(layer.linear("attention.qkv", a), 3, axis=1)
        q, k = (_turn(part, positions, heads, config.rotary_base) for part in (q, k))
        attended = layer.linear("attention.proj", _attend(q, k, v, heads, visible))
        m = layer.norm("attention_norm", a * alpha + attended, eps)
        x = m * alpha + layer.mlp(m, tanh_gelu)
    return weights.norm("norm", x, eps)


def _turn(x: Array, positions: tuple[Array, Array], heads: int, base: float) -> Array:
    """Each half of a head is a row of complex numbers, real parts first, which a position turns."""
    halves = x.reshape(len(x), heads, 2, 2, -1)
    numbers = halves[:, :, :, 0] + 1j * halves[:, :, :, 1]
    speeds = base ** -(np.arange(numbers.shape[-1]) / numbers.shape[-1])
    angles = np.stack(positions, axis=1)[:, None, :, None] * speeds
    turned = numbers * np.exp(1j * angles)
    return np.stack([turned.real, turned.imag], axis=3).reshape(x.shape)
