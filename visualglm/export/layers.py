"""The layers that the graphs are made of, by the names of the parameters they take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from visualglm.checkpoint.tensors import Tensor
from visualglm.export.linear import LayerError, Linear, Rows
from visualglm.export.onnx_graph import CONTRIB, OnnxGraph


class Layers:
    """Adds layers to a graph; weights are looked up under the names of `visualglm.parameters`."""

    def __init__(self, graph: OnnxGraph, tensors: Mapping[str, Tensor], linear: Linear) -> None:
        self.graph = graph
        self.errors: list[LayerError] = []
        self._tensors = tensors
        self._linear = linear

    def linear(
        self, x: str, name: str, *, bias: bool = True, order: NDArray[np.int64] | None = None, gain: float = 1.0
    ) -> str:
        """x: [..., in] → [..., out].

        order: output i is what was output order[i]. gain: x comes this much too large, which the weights undo.
        """
        weight, bias_name = self.rows(f"{name}.weight", order), ""
        if bias:
            bias_name = self.graph.floats(f"{name}.bias", self.rows(f"{name}.bias", order)[:])
        result = self._linear.add(self.graph, x, name, weight, bias_name, gain)
        error = self._linear.error_of(name)
        self.errors += [error] if error else []
        return result

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

    def rows(self, name: str, order: NDArray[np.int64] | None = None) -> Rows:
        return Rows(name, self._tensors[name], order)


def write_graph(
    path: Path,
    tensors: Mapping[str, Tensor],
    linear: Linear,
    add: Callable[[Layers], None],
    *,
    float_type: int = TensorProto.FLOAT,
    description: str = "",
    wrote: Callable[[int], None] = lambda count: None,
) -> list[LayerError]:
    """Write the graph that `add` makes to `path`, and its weights beside it; returns what rounding did to its layers.

    float_type: in which it computes. `wrote` is told the bytes of weights as they are written.
    """
    with closing(OnnxGraph(path.stem, path.with_name(f"{path.name}.data"), float_type, wrote)) as graph:
        layers = Layers(graph, tensors, linear)
        add(layers)
        graph.save(path, description)
    return layers.errors
