"""The layers that the graphs are made of, with their weights in the precision that was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from visualglm.checkpoint.tensors import StoredTensor
from visualglm.export.onnx_graph import CONTRIB, OnnxGraph
from visualglm.export.quantize import Bits, Method, quantize_blocks
from visualglm.parameters import Shape

# Elements of a weight that are copied at once.
_PIECE = 1 << 26
# MatMulNBits rounds its input to int8 by the same blocks: what makes it fast on a CPU.
_INT8_ACTIVATIONS = 4
_STORED_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}


@dataclass(frozen=True)
class LinearFormat:
    """How the weights of linear layers are stored: as they are, or in blocks of whole numbers of 8 or 4 bits."""

    bits: Bits | None = None
    block_size: int = 128
    method: Method = "search"


@dataclass(frozen=True)
class LayerError:
    """What rounding did to a layer: ||W - W'||² / ||W||²."""

    name: str
    bits: int
    symmetric: bool
    relative_error: float


class Layers:
    """Adds layers to a graph; weights are looked up under the names of `visualglm.parameters`."""

    def __init__(self, graph: OnnxGraph, tensors: Mapping[str, StoredTensor], format: LinearFormat) -> None:
        self.graph = graph
        self.errors: list[LayerError] = []
        self._tensors = tensors
        self._format = format

    def linear(
        self, x: str, name: str, *, bias: bool = True, order: NDArray[np.int64] | None = None, gain: float = 1.0
    ) -> str:
        """x: [..., in] → [..., out].

        order: output i is what was output order[i]. gain: x comes this much too large, which the weights undo.
        """
        bias_name = self.graph.floats(f"{name}.bias", Rows(self._tensors[f"{name}.bias"], order)[:]) if bias else ""
        if self._format.bits is not None:
            return self._quantized_linear(x, name, bias_name, order, self._format.bits, gain)
        if gain != 1:
            x = self.graph.node("Div", x, self.graph.floats("gain", gain))
        product = self.graph.node("MatMul", x, self._transposed_weight(f"{name}.weight", order))
        return self.graph.node("Add", product, bias_name) if bias else product

    def layer_norm(self, x: str, name: str, epsilon: float, gain: float = 1.0) -> str:
        """The norm of x, times `gain`."""
        scale, bias = (
            self.graph.floats(f"{name}.{part}", self.rows(f"{name}.{part}")[:] * np.float32(gain))
            for part in ("weight", "bias")
        )
        return self.graph.node("LayerNormalization", x, scale, bias, epsilon=epsilon)

    def mlp(self, x: str, name: str, gelu: Literal["none", "tanh"], gain: float = 1.0) -> str:
        """Two linear layers around a GELU."""
        hidden = self.graph.node("Gelu", self.linear(x, f"{name}.fc1", gain=gain), approximate=gelu)
        return self.linear(hidden, f"{name}.fc2")

    def attention(self, q: str, k: str, v: str, name: str, num_heads: int) -> str:
        """Full attention of [batch, seq, width] tensors, and the projection behind it."""
        attended = self.graph.node("MultiHeadAttention", q, k, v, domain=CONTRIB, num_heads=num_heads)
        return self.linear(attended, f"{name}.proj")

    def self_attention(self, x: str, name: str, num_heads: int) -> str:
        """Full self-attention with packed thirds q|k|v."""
        q, k, v = self.graph.nodes("Split", self.linear(x, f"{name}.qkv"), outputs=3, axis=-1, num_outputs=3)
        return self.attention(q, k, v, name, num_heads)

    def parameter(self, name: str) -> str:
        """A small parameter, in the type that the graph computes in."""
        return self.graph.floats(name, self.rows(name)[:])

    def rows(self, name: str) -> Rows:
        return Rows(self._tensors[name])

    def stored_weight(self, name: str) -> str:
        """A parameter in the type that it is stored in, row by row, for a graph to widen what it takes of it."""
        stored = self._tensors[name]
        array = stored.array()
        step = max(1, _PIECE // array.shape[1])
        pieces = (array[start : start + step] for start in range(0, len(array), step))
        return self.graph.weight(name, _STORED_TYPES[stored.dtype], stored.shape, pieces)

    def _transposed_weight(self, name: str, order: NDArray[np.int64] | None) -> str:
        """[in, out] in the type that the graph computes in, stored as it came: the runtime widens it when it loads."""
        stored = self._tensors[name]
        array = stored.array() if order is None else stored.array()[order]
        columns = max(1, _PIECE // len(array))
        pieces = (array[:, start : start + columns].T for start in range(0, array.shape[1], columns))
        kind = _STORED_TYPES[stored.dtype]
        weight = self.graph.weight(name, kind, stored.shape[::-1], pieces)
        return weight if kind == self.graph.float_type else self.graph.cast(weight, self.graph.float_type)

    def _quantized_linear(
        self, x: str, name: str, bias: str, order: NDArray[np.int64] | None, bits: Bits, gain: float
    ) -> str:
        weight = quantize_blocks(
            Rows(self._tensors[f"{name}.weight"], order),
            bits,
            self._format.block_size,
            self._format.method,
            name=f"{name}.weight",
        )
        self.errors.append(LayerError(name, bits, weight.zero_points is None, weight.error))
        graph, (outputs, inputs) = self.graph, weight.shape
        data = graph.weight(f"{name}.weight", TensorProto.UINT8, weight.data.shape, [weight.data])
        scales = graph.weight(
            f"{name}.scales", TensorProto.FLOAT, weight.scales.shape, [weight.scales / np.float32(gain)]
        )
        zero_points = ""
        if weight.zero_points is not None:
            zeros = weight.zero_points
            zero_points = graph.weight(f"{name}.zero_points", TensorProto.UINT8, zeros.shape, [zeros])
        return graph.node(
            "MatMulNBits",
            *(x, data, scales, zero_points, "", bias),
            domain=CONTRIB,
            K=inputs,
            N=outputs,
            bits=bits,
            block_size=self._format.block_size,
            accuracy_level=_INT8_ACTIVATIONS,
        )


@dataclass(frozen=True)
class Rows:
    """A stored matrix whose rows come as float32 when they are asked for; row i is row order[i] of what is stored."""

    stored: StoredTensor
    order: NDArray[np.int64] | None = None

    @property
    def shape(self) -> Shape:
        return self.stored.shape

    @cached_property
    def _array(self) -> NDArray[Any]:
        return self.stored.array()

    def __getitem__(self, rows: slice, /) -> NDArray[np.float32]:
        return as_float32(self._array[rows if self.order is None else self.order[rows]], self.stored.dtype)


def as_float32(array: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """An array as `StoredTensor.array` gives it, as numbers: bfloat16 comes as bits."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)
