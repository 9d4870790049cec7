"""Writes a model of the sizes of ours, with random weights, for llama.cpp.

Its architecture `gptneox` has the same matrices: packed query, key and value, an MLP that is not gated, biases and
LayerNorm throughout, and an output layer of its own. Layout of the file: header, metadata, list of tensors, data.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ggml_weights import RandomPieces, Weight, WeightType, linear, norm, total_bytes
from visualglm.config import TextConfig

_ALIGNMENT = 32
_UINT32, _FLOAT32, _BOOL, _STRING = 4, 6, 7, 8
Value = bool | int | float | str


def gguf_weights(config: TextConfig, kind: WeightType) -> list[Weight]:
    """All tensors, in the order of the file; matrices are of the type `kind`."""
    width = config.hidden_size
    return [
        Weight("token_embd.weight", (config.vocab_size, width), kind),
        *(weight for index in range(config.num_hidden_layers) for weight in _layer(config, index, kind)),
        *norm("output_norm", width),
        Weight("output.weight", (config.vocab_size, width), kind),
    ]


def gguf_step_bytes(config: TextConfig, kind: WeightType) -> int:
    """Bytes of weights that decoding a token reads: all but the embeddings."""
    return total_bytes(gguf_weights(config, kind)[1:])


def write_gguf(path: Path, config: TextConfig, kind: WeightType) -> None:
    """Write the file, never holding more than a few megabytes."""
    weights, metadata, pieces = gguf_weights(config, kind), _metadata(config), RandomPieces()
    with path.open("wb") as file:
        file.write(struct.pack("<4sIQQ", b"GGUF", 3, len(weights), len(metadata)))
        for key, value in metadata.items():
            file.write(_string(key) + _value(value))
        offset = 0
        for weight in weights:
            file.write(_tensor_info(weight, offset))
            offset += _aligned(weight.size)
        for weight in weights:
            _pad(file)
            weight.write(file, pieces)
        _pad(file)


def _layer(config: TextConfig, index: int, kind: WeightType) -> Iterator[Weight]:
    width, inner, layer = config.hidden_size, config.intermediate_size, f"blk.{index}"
    yield from norm(f"{layer}.attn_norm", width)
    yield from linear(f"{layer}.attn_qkv", 3 * width, width, kind)
    yield from linear(f"{layer}.attn_output", width, width, kind)
    yield from norm(f"{layer}.ffn_norm", width)
    yield from linear(f"{layer}.ffn_up", inner, width, kind)
    yield from linear(f"{layer}.ffn_down", width, inner, kind)


def _metadata(config: TextConfig) -> dict[str, Value]:
    return {
        "general.architecture": "gptneox",
        "general.alignment": _ALIGNMENT,
        "gptneox.vocab_size": config.vocab_size,
        "gptneox.context_length": config.max_sequence_length,
        "gptneox.embedding_length": config.hidden_size,
        "gptneox.block_count": config.num_hidden_layers,
        "gptneox.feed_forward_length": config.intermediate_size,
        "gptneox.rope.dimension_count": config.hidden_size // config.num_attention_heads,
        "gptneox.attention.head_count": config.num_attention_heads,
        "gptneox.attention.layer_norm_epsilon": config.layer_norm_eps,
        "gptneox.use_parallel_residual": False,
        "tokenizer.ggml.model": "no_vocab",
    }


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    return struct.pack("<I", _STRING) + _string(value)


def _tensor_info(weight: Weight, offset: int) -> bytes:
    """Dimensions are listed from the innermost one outwards."""
    dimensions = weight.shape[::-1]
    form = f"<I{len(dimensions)}QIQ"
    return _string(weight.name) + struct.pack(form, len(dimensions), *dimensions, weight.type_code, offset)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _pad(file: BinaryIO) -> None:
    position = file.tell()
    file.write(bytes(_aligned(position) - position))
