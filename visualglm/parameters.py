"""Names and shapes of every parameter of the model: the one list that backends and checkpoint formats share.

Weights of linear layers are `[out, in]`; packed projections are contiguous thirds `q|k|v` (halves `k|v`).
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from visualglm.config import QFormerConfig, TextConfig, VisionConfig, VisualGLMConfig

Shape = tuple[int, ...]


def parameter_shapes(config: VisualGLMConfig) -> dict[str, Shape]:
    """Every parameter's name and shape, in the order a model directory stores them."""
    return {
        **dict(_vision(config.vision)),
        **dict(_qformer(config.qformer, config.vision.hidden_size)),
        **dict(_linear("projection", config.qformer.hidden_size, config.text.hidden_size)),
        **dict(_text(config.text)),
    }


def parameter_count(config: VisualGLMConfig) -> int:
    return sum(prod(shape) for shape in parameter_shapes(config).values())


def prefix_name(layer: int) -> str:
    """The name of what P-tuning adds to a layer, [2, heads, prefix length, head_dim]: keys, then values."""
    return f"text.layers.{layer}.attention.prefix"


def _linear(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def _norm(name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _attention(name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield from _linear(f"{name}.qkv", width, 3 * width)
    yield from _linear(f"{name}.proj", width, width)


def _mlp(name: str, width: int, intermediate: int) -> Iterator[tuple[str, Shape]]:
    yield from _linear(f"{name}.fc1", width, intermediate)
    yield from _linear(f"{name}.fc2", intermediate, width)


def _vision(config: VisionConfig) -> Iterator[tuple[str, Shape]]:
    width = config.hidden_size
    yield "vision.patch_embed.weight", (width, config.in_channels, config.patch_size, config.patch_size)
    yield "vision.patch_embed.bias", (width,)
    yield "vision.class_token", (1, width)
    yield "vision.position_embeddings", (config.sequence_length, width)
    for index in range(config.num_hidden_layers):
        layer = f"vision.layers.{index}"
        yield from _norm(f"{layer}.norm1", width)
        yield from _attention(f"{layer}.attention", width)
        yield from _norm(f"{layer}.norm2", width)
        yield from _mlp(f"{layer}.mlp", width, config.intermediate_size)
    yield from _norm("vision.norm", width)


def _qformer(config: QFormerConfig, vision_width: int) -> Iterator[tuple[str, Shape]]:
    width = config.hidden_size
    yield "qformer.query_tokens", (config.num_query_tokens, width)
    for index in range(config.num_hidden_layers):
        layer = f"qformer.layers.{index}"
        yield from _norm(f"{layer}.input_norm", width)
        yield from _attention(f"{layer}.attention", width)
        yield from _norm(f"{layer}.attention_norm", width)
        if index in config.cross_attention_layers:
            yield from _linear(f"{layer}.cross_attention.q", width, width)
            yield from _linear(f"{layer}.cross_attention.kv", vision_width, 2 * width)
            yield from _linear(f"{layer}.cross_attention.proj", width, width)
            yield from _norm(f"{layer}.cross_attention_norm", width)
        yield from _mlp(f"{layer}.mlp", width, config.intermediate_size)
    yield from _norm("qformer.norm", width)


def _text(config: TextConfig) -> Iterator[tuple[str, Shape]]:
    width = config.hidden_size
    yield "text.word_embeddings.weight", (config.vocab_size, width)
    for index in range(config.num_hidden_layers):
        layer = f"text.layers.{index}"
        yield from _norm(f"{layer}.input_norm", width)
        yield from _attention(f"{layer}.attention", width)
        yield from _norm(f"{layer}.attention_norm", width)
        yield from _mlp(f"{layer}.mlp", width, config.intermediate_size)
    yield from _norm("text.norm", width)
    yield "text.lm_head.weight", (config.vocab_size, width)
