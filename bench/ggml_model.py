"""Writes a model of the sizes of ours, with random weights, for chatglm.cpp: ChatGLM-6B in its own kind of ggml file.

Its output layer and its embeddings are one matrix. Layout of the file: header, sizes, tokenizer, tensors.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ggml_weights import RandomPieces, Weight, WeightType, linear, norm, total_bytes
from visualglm.config import TextConfig
from visualglm.loading import builtin_path

_ALIGNMENT = 16
_CHATGLM, _VERSION = 1, 2


def ggml_weights(config: TextConfig, kind: WeightType) -> list[Weight]:
    """All tensors, in the order of the file; matrices are of the type `kind`."""
    width = config.hidden_size
    return [
        Weight("transformer.word_embeddings.weight", (config.vocab_size, width), kind),
        *(weight for index in range(config.num_hidden_layers) for weight in _layer(config, index, kind)),
        *norm("transformer.final_layernorm", width),
    ]


def ggml_step_bytes(config: TextConfig, kind: WeightType) -> int:
    """Bytes of weights that decoding a token reads: all, since the embeddings are the output layer too."""
    return total_bytes(ggml_weights(config, kind))


def write_ggml(path: Path, config: TextConfig, kind: WeightType) -> None:
    """Write the file, never holding more than a few megabytes; the tokenizer is the built-in model's, unused."""
    weights, pieces = ggml_weights(config, kind), RandomPieces()
    tokenizer = (builtin_path() / "tokenizer.model").read_bytes()
    with path.open("wb") as file:
        file.write(struct.pack("<4sii", b"ggml", _CHATGLM, _VERSION))
        file.write(_sizes(config, weights[0].type_code))
        file.write(struct.pack("<i", len(tokenizer)) + tokenizer)
        for weight in weights:
            _write_tensor(file, weight, pieces)


def _layer(config: TextConfig, index: int, kind: WeightType) -> Iterator[Weight]:
    width, inner, layer = config.hidden_size, config.intermediate_size, f"transformer.layers.{index}"
    yield from norm(f"{layer}.input_layernorm", width)
    yield from linear(f"{layer}.attention.query_key_value", 3 * width, width, kind)
    yield from linear(f"{layer}.attention.dense", width, width, kind)
    yield from norm(f"{layer}.post_attention_layernorm", width)
    yield from linear(f"{layer}.mlp.dense_h_to_4h", inner, width, kind)
    yield from linear(f"{layer}.mlp.dense_4h_to_h", width, inner, kind)


def _sizes(config: TextConfig, type_code: int) -> bytes:
    heads, no_prefix, rotary_base = config.num_attention_heads, 0, 10000.0
    return struct.pack(
        "<7ififiii",
        *(type_code, config.vocab_size, config.hidden_size, heads, heads),
        *(config.num_hidden_layers, config.intermediate_size, config.layer_norm_eps),
        *(no_prefix, rotary_base, config.max_sequence_length, config.eos_token_id, config.pad_token_id),
    )


def _write_tensor(file: BinaryIO, weight: Weight, pieces: RandomPieces) -> None:
    name, dimensions = weight.name.encode(), len(weight.shape)
    file.write(struct.pack("<i", len(name)) + name)
    file.write(struct.pack(f"<{2 + dimensions}i", dimensions, *weight.shape, weight.type_code))
    file.write(bytes(-file.tell() % _ALIGNMENT))
    weight.write(file, pieces)
