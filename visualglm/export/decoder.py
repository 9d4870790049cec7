"""The graph `decoder`: one or more columns of embeddings behind those of a KV cache → logits, and the longer cache.

With an empty cache it is the recipe's full graph, with a filled one the incremental one. A runtime may bind the same
buffers as past and present: the attention operator then stores new keys and values in place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from visualglm.config import TextConfig
from visualglm.export.layers import Layers
from visualglm.export.onnx_graph import CONTRIB, OnnxGraph, Shape
from visualglm.memory import CacheType

# A key or value this much larger than any of the prompt's is still stored faithfully in an int8 cache.
_CACHE_MARGIN = 1.5
_INT8_MAX = 127.0


@dataclass(frozen=True)
class _Inputs:
    """Values that all layers read.

    is_prompt: whether nothing is cached yet; valid: [batch, sequence, 1], 1 for text and 0 for padding.
    """

    cos: str
    sin: str
    bias: str
    last_column: str
    columns: str
    is_prompt: str
    valid: str


def add_decoder(layers: Layers, config: TextConfig, cache: CacheType | None) -> None:
    """Without `cache` there are no past and present. Inputs, with `past` columns cached and total = past + sequence:

    inputs_embeds: float32 [batch, sequence, width]; position_ids: int64 [batch, 2, sequence];
    attention_bias: float32 [batch, 1, sequence, total], 0 where a column is seen and a very low number where it is not;
    logits_to_keep: int64 [1], how many of the last columns get logits;
    past_key_values.N.key and .value: [batch, heads, past, head_dim] (or longer buffers, used up to `past`);
    past_key_values.N.scales (int8 cache only): float32 [batch, 1, 4 * width], not read for a prompt, which sets them.
    Outputs: logits: float32 [batch, logits_to_keep, vocab], and present.N.key, .value and .scales.
    """
    graph = layers.graph
    x = graph.input("inputs_embeds", TensorProto.FLOAT, ["batch", "sequence", config.hidden_size])
    x = graph.cast(x, graph.float_type)
    inputs = _inputs(layers, config)
    keep = graph.input("logits_to_keep", TensorProto.INT64, [1])
    for index in range(config.num_hidden_layers):
        x = _layer(layers, config, index, x, _Attention(layers, config, index, inputs, cache))
    end = graph.constant("end", np.array([np.iinfo(np.int64).max]))
    kept = graph.node("Slice", x, graph.node("Neg", keep), end, graph.constant("axis_1", [1]))
    _add_logits(layers, config, kept, "logits_to_keep")


def add_decoder_layer(layers: Layers, config: TextConfig, index: int) -> None:
    """One layer alone, without a cache: its input as `inputs_embeds`, with the positions and the bias of `add_decoder`.

    Output: hidden_states: float32 [batch, sequence, width].
    """
    graph = layers.graph
    shape: Shape = ["batch", "sequence", config.hidden_size]
    x = graph.input("inputs_embeds", TensorProto.FLOAT, shape)
    x = _layer(layers, config, index, x, _Attention(layers, config, index, _inputs(layers, config), None))
    graph.output("hidden_states", x, TensorProto.FLOAT, shape)


def add_decoder_head(layers: Layers, config: TextConfig) -> None:
    """What comes behind the layers alone: their output as `inputs_embeds` → `logits`, of every column."""
    x = layers.graph.input("inputs_embeds", TensorProto.FLOAT, ["batch", "sequence", config.hidden_size])
    _add_logits(layers, config, x, "sequence")


def _add_logits(layers: Layers, config: TextConfig, x: str, columns: str) -> None:
    normed = layers.layer_norm(x, "text.norm", config.layer_norm_eps)
    logits = layers.graph.cast(layers.linear(normed, "text.lm_head", bias=False), TensorProto.FLOAT)
    layers.graph.output("logits", logits, TensorProto.FLOAT, ["batch", columns, config.vocab_size])


def _layer(layers: Layers, config: TextConfig, index: int, x: str, attention: _Attention) -> str:
    """A post-LN block whose residuals are the normalised tensors times alpha, sqrt(2 * layers).

    The norms give that at once, and the weights behind them undo it.
    """
    graph, name, alpha = layers.graph, f"text.layers.{index}", config.residual_scale
    x = layers.layer_norm(x, f"{name}.input_norm", config.layer_norm_eps, alpha)
    x = graph.node("Add", x, attention.add(x, alpha))
    x = layers.layer_norm(x, f"{name}.attention_norm", config.layer_norm_eps, alpha)
    return graph.node("Add", x, layers.mlp(x, f"{name}.mlp", "tanh", alpha))


def _inputs(layers: Layers, config: TextConfig) -> _Inputs:
    graph = layers.graph
    cos, sin = _rotary(graph, config)
    bias = graph.input("attention_bias", TensorProto.FLOAT, ["bias_batch", 1, "sequence", "total"])
    total, sequence = graph.node("Shape", bias, start=3, end=4), graph.node("Shape", bias, start=2, end=3)
    is_prompt = graph.node("Squeeze", graph.node("Equal", total, sequence))
    columns = graph.cast(graph.node("Squeeze", total), TensorProto.INT32)
    last = graph.node("Sub", columns, graph.constant("one", np.int32(1)))
    batch = graph.node("Shape", "inputs_embeds", start=0, end=1)
    return _Inputs(
        cos=cos,
        sin=sin,
        bias=graph.cast(bias, graph.float_type),
        last_column=graph.node("Expand", last, batch),
        columns=columns,
        is_prompt=is_prompt,
        valid=_valid(graph, bias),
    )


def _rotary(graph: OnnxGraph, config: TextConfig) -> tuple[str, str]:
    """Cosines and sines [batch, sequence, head_dim / 2]: a quarter of a head for each of the two positions."""
    position_ids = graph.input("position_ids", TensorProto.INT64, ["batch", 2, "sequence"])
    by_column = graph.node("Transpose", position_ids, perm=[0, 2, 1])
    flat = graph.constant("flat_positions", [0, 0, config.head_dim // 2])
    cos, sin = rotary_tables(config)
    return (
        graph.node("Reshape", graph.node("Gather", graph.floats("rotary_cos", cos), by_column), flat),
        graph.node("Reshape", graph.node("Gather", graph.floats("rotary_sin", sin), by_column), flat),
    )


def _valid(graph: OnnxGraph, bias: str) -> str:
    """[batch, columns, 1]: 1 for columns that the last column sees, which are all but the padding."""
    last_row = graph.node("Gather", bias, graph.constant("last", np.int64(-1)), axis=2)
    seen = graph.cast(graph.node("Greater", last_row, graph.constant("low", np.float32(-1))), graph.float_type)
    return graph.node("Transpose", seen, perm=[0, 2, 1])


class _Attention:
    """The self-attention of one layer."""

    def __init__(
        self, layers: Layers, config: TextConfig, index: int, inputs: _Inputs, cache: CacheType | None
    ) -> None:
        self._layers, self._graph, self._config = layers, layers.graph, config
        self._index, self._inputs, self._cache = index, inputs, cache

    def add(self, x: str, gain: float) -> str:
        """x: [batch, sequence, width], `gain` times too large → the same shape, behind the output projection."""
        name = f"text.layers.{self._index}.attention"
        qk, v = self._rotated(self._layers.linear(x, f"{name}.qkv", order=halves_apart(self._config), gain=gain))
        qkv = self._graph.node("Concat", qk, v, axis=-1)
        attended = self._attend_int8(qkv, qk, v) if self._cache == "int8" else self._attend(qkv)
        return self._layers.linear(attended, f"{name}.proj")

    def _rotated(self, qkv: str) -> tuple[str, str]:
        """q|k, turned by their positions, and v."""
        graph, width, heads = self._graph, self._config.hidden_size, self._config.num_attention_heads
        qk, v = graph.nodes("Split", qkv, graph.constant("qk_v", [2 * width, width]), outputs=2, axis=-1)
        return graph.node("RotaryEmbedding", qk, self._inputs.cos, self._inputs.sin, num_heads=2 * heads), v

    def _attend(self, qkv: str, unit_scale: str = "") -> str:
        graph, heads, inputs = self._graph, self._config.num_attention_heads, self._inputs
        states = [] if self._cache is None else [self._state(which) for which in ("key", "value")]
        past = [before for before, _ in states] or ["", ""]
        rounding = dict.fromkeys(("k_quant_type", "v_quant_type"), "PER_TENSOR") | {"kv_cache_bit_width": 8}
        attended = f"attended.{self._index}"
        # Not causal: the bias says what is seen, and a prompt sees all of its context.
        graph.add(
            "GroupQueryAttention",
            [
                qkv,
                "",
                "",
                *past,
                inputs.last_column,
                inputs.columns,
                "",
                "",
                "",
                inputs.bias,
                "",
                unit_scale,
                unit_scale,
            ],
            [attended, *(after for _, after in states)],
            domain=CONTRIB,
            num_heads=heads,
            kv_num_heads=heads,
            causal=0,
            **(rounding if unit_scale else {}),
        )
        return attended

    def _attend_int8(self, qkv: str, qk: str, v: str) -> str:
        """Attention over a cache of int8, in which every channel of a row has a scale of its own.

        The scale of a key is moved to the query, and that of a value behind the sum: (q s)·(k / s) = q·k, so that the
        operator itself needs none, and a row is what it is alone in any batch.
        """
        graph, width = self._graph, self._config.hidden_size
        past, present = self._state("scales")
        graph.choose(
            present, self._inputs.is_prompt, lambda: self._fresh_scales(qk, v), lambda: graph.node("Identity", past)
        )
        of_qkv, of_sum = graph.nodes("Split", present, graph.constant("scales", [3 * width, width]), outputs=2, axis=-1)
        unit_scale = graph.constant("unit_scale", np.ones(1, np.float32))
        return graph.node("Mul", self._attend(graph.node("Mul", qkv, of_qkv), unit_scale), of_sum)

    def _fresh_scales(self, qk: str, v: str) -> str:
        """Factors [batch, 1, 4 * width] of queries, keys, values and sums, from the largest of the prompt's columns."""
        graph = self._graph
        _, k = graph.nodes("Split", qk, outputs=2, axis=-1, num_outputs=2)
        columns = graph.constant("axis_1", [1])
        sizes = [graph.node("Mul", graph.node("Abs", x), self._inputs.valid) for x in (k, v)]
        largest = [graph.node("ReduceMax", size, columns, keepdims=1) for size in sizes]
        step = graph.floats("cache_step", _CACHE_MARGIN / _INT8_MAX)
        least = graph.floats("least_scale", 1e-6)
        of_key, of_value = (graph.node("Max", graph.node("Mul", size, step), least) for size in largest)
        reciprocals = [graph.node("Reciprocal", scale) for scale in (of_key, of_value)]
        return graph.node("Concat", of_key, *reciprocals, of_value, axis=-1)

    def _state(self, which: str) -> tuple[str, str]:
        """The names of a part of the cache, before and after."""
        graph, config = self._graph, self._config
        past, present = f"past_key_values.{self._index}.{which}", f"present.{self._index}.{which}"
        kind = TensorProto.INT8 if self._cache == "int8" and which != "scales" else graph.float_type
        for name, columns, declare in ((past, "past", graph.input), (present, "present", graph.declare_output)):
            shape: Shape = ["batch", config.num_attention_heads, columns, config.head_dim]
            if which == "scales":
                shape = ["batch", 1, 4 * config.hidden_size]
            declare(name, kind, shape)
        return past, present


def halves_apart(config: TextConfig) -> NDArray[np.int64]:
    """The order of a qkv's outputs in which one standard rotary turn does both halves of each head.

    A head is [a b | c d] in quarters, and the model turns a with b by the first position and c with d by the second.
    As [a c | b d] it is turned at once, with the cosines of both positions side by side. Queries and keys are
    reordered alike, which leaves their products as they are.
    """
    heads, quarter = config.num_attention_heads, config.head_dim // 4
    channels = np.arange(2 * config.hidden_size).reshape(2 * heads, 2, 2, quarter)
    turned = channels.transpose(0, 2, 1, 3).reshape(-1)
    return np.concatenate([turned, np.arange(2 * config.hidden_size, 3 * config.hidden_size)])


def rotary_tables(config: TextConfig) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines, float32 [max_sequence_length, head_dim / 4]."""
    dim = config.head_dim // 2
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    inv_freq = np.float32(1) / np.float32(config.rotary_base) ** exponents
    if config.rotary_inv_freq_dtype == "float16":
        inv_freq = inv_freq.astype(np.float16).astype(np.float32)
    angles = np.outer(np.arange(config.max_sequence_length, dtype=np.float32), inv_freq)
    return np.cos(angles), np.sin(angles)
