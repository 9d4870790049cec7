"""Linear layers in the three forms that an export may have: as stored, in blocks for decoding, in rows for images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from visualglm.checkpoint.tensors import Tensor
from visualglm.errors import CheckpointError
from visualglm.export.onnx_graph import CONTRIB, OnnxGraph
from visualglm.export.rounding import Rounding
from visualglm.parameters import Shape

Floats = NDArray[np.float32]

# Elements of a weight that are copied at once.
_PIECE = 1 << 26
# MatMulNBits rounds its input to int8 by the same blocks: what makes it fast on a CPU.
_INT8_ACTIVATIONS = 4
# All ones in a number that is infinite or none at all.
_BFLOAT16_EXPONENT = np.uint16(0x7F80)
_STORED_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


@dataclass(frozen=True)
class Rows:
    """A stored tensor whose rows come as float32 when they are asked for; row i is row order[i] of what is stored.

    Raises `CheckpointError`, when they are read, for values that are not finite: rounded to whole numbers they would
    look like any others.
    """

    name: str
    stored: Tensor
    order: NDArray[np.int64] | None = None

    @property
    def shape(self) -> Shape:
        return self.stored.shape

    def __getitem__(self, rows: slice, /) -> Floats:
        picked = self._array[rows if self.order is None else self.order[rows]]
        return as_float32(self._finite(picked), self.stored.dtype)

    def stored_pieces(self) -> Iterator[NDArray[Any]]:
        """The rows as they are stored."""
        step = max(1, _PIECE // self.shape[1])
        return (self._finite(self._array[start : start + step]) for start in range(0, self.shape[0], step))

    def stored_columns(self) -> Iterator[NDArray[Any]]:
        """The transposed matrix as it is stored, some of its rows at a time."""
        array = self._array if self.order is None else self._array[self.order]
        step = max(1, _PIECE // self.shape[0])
        return (self._finite(array[:, start : start + step]).T for start in range(0, self.shape[1], step))

    @property
    def onnx_type(self) -> int:
        """Of what is stored."""
        return int(_STORED_TYPES[self.stored.dtype])

    def _finite(self, array: NDArray[Any]) -> NDArray[Any]:
        is_bits = self.stored.dtype == "bfloat16"
        if not ((array & _BFLOAT16_EXPONENT) != _BFLOAT16_EXPONENT if is_bits else np.isfinite(array)).all():
            raise CheckpointError(
                f"The tensor {self.name} holds values that are not finite numbers, which cannot be exported; "
                "get or convert the checkpoint again."
            )
        return array

    @cached_property
    def _array(self) -> NDArray[Any]:
        return self.stored.array()


@dataclass(frozen=True)
class LayerError:
    """What rounding did to a layer: ||W - W'||² / ||W||², or of its outputs, ||(W - W') X||² / ||W X||²."""

    name: str
    bits: int
    symmetric: bool
    relative_error: float
    of: Literal["weights", "outputs"] = "weights"


class Linear(Protocol):
    """Adds `x @ weight.T + bias` to a graph. `gain`: x comes this much too large, which the weights undo."""

    def add(self, graph: OnnxGraph, x: str, name: str, weight: Rows, bias: str, gain: float) -> str: ...

    def error_of(self, name: str) -> LayerError | None:
        """What rounding did to the layer of that name."""
        ...


class StoredLinear:
    """Weights as they are stored; the runtime widens them when it loads the graph."""

    def add(self, graph: OnnxGraph, x: str, name: str, weight: Rows, bias: str, gain: float) -> str:
        if gain != 1:
            x = graph.node("Div", x, graph.floats("gain", gain))
        columns = graph.weight(f"{name}.weight", weight.onnx_type, weight.shape[::-1], weight.stored_columns())
        if weight.onnx_type != graph.float_type:
            columns = graph.cast(columns, graph.float_type)
        product = graph.node("MatMul", x, columns)
        return graph.node("Add", product, bias) if bias else product

    def error_of(self, name: str) -> None:
        return None


class TappedLinear(StoredLinear):
    """As stored; what each layer is given becomes an output of the graph, under the layer's name."""

    def add(self, graph: OnnxGraph, x: str, name: str, weight: Rows, bias: str, gain: float) -> str:
        graph.output(name, x, graph.float_type, ["batch", "sequence", weight.shape[1]])
        return super().add(graph, x, name, weight, bias, gain)


class BlockLinear:
    """Blocks of 8 or 4 bits along the inputs, each with a scale: read at the speed of the memory, a token at a time."""

    def __init__(self, rounding: Rounding) -> None:
        self._rounding = rounding
        self._errors: dict[str, LayerError] = {}

    def add(self, graph: OnnxGraph, x: str, name: str, weight: Rows, bias: str, gain: float) -> str:
        codes = self._rounding.quantize(weight, name)
        symmetric = codes.zero_points is None
        self._errors[name] = LayerError(name, codes.bits, symmetric, codes.error, self._rounding.measure)
        arrays = {"weight": codes.data, "scales": codes.scales / np.float32(gain), "zero_points": codes.zero_points}
        inputs = {"zero_points": ""}
        for part, array in arrays.items():
            if array is not None:
                kind = TensorProto.FLOAT if part == "scales" else TensorProto.UINT8
                inputs[part] = graph.weight(f"{name}.{part}", kind, array.shape, [array])
        return graph.node(
            "MatMulNBits",
            *(x, inputs["weight"], inputs["scales"], inputs["zero_points"], "", bias),
            domain=CONTRIB,
            K=weight.shape[1],
            N=weight.shape[0],
            bits=codes.bits,
            block_size=codes.block_size,
            accuracy_level=_INT8_ACTIVATIONS,
        )

    def error_of(self, name: str) -> LayerError:
        return self._errors[name]


class RowLinear:
    """int8 with a scale for each output, times inputs that are rounded to int8 with a scale for each row.

    On hundreds of rows two to three times as fast as blocks are. A row is rounded by itself, so that an image is what
    it is alone in any batch.
    """

    def __init__(self) -> None:
        self._errors: dict[str, LayerError] = {}

    def add(self, graph: OnnxGraph, x: str, name: str, weight: Rows, bias: str, gain: float) -> str:
        outputs, inputs = weight.shape
        codes, scales = self._rounded(weight, name)
        data = graph.weight(f"{name}.weight", TensorProto.INT8, (inputs, outputs), [codes.T])
        rows = graph.node("Reshape", x, graph.constant(f"rows_of_{inputs}", [-1, inputs]))
        quantized, row_scales, middle = _quantized_rows(graph, rows)
        product = graph.node(
            "MatMulIntegerToFloat",
            *(quantized, data, graph.floats("unit", 1.0), graph.floats(f"{name}.scales", scales / gain), middle),
            domain=CONTRIB,
        )
        product = graph.node("Add", graph.node("Mul", product, row_scales), bias)
        leading = graph.node("Shape", x, start=0, end=-1)
        shape = graph.node("Concat", leading, graph.constant(f"width_{outputs}", [outputs]), axis=0)
        return graph.node("Reshape", product, shape)

    def error_of(self, name: str) -> LayerError:
        return self._errors[name]

    def _rounded(self, weight: Rows, name: str) -> tuple[NDArray[np.int8], Floats]:
        """Codes [out, in] and scales [out]."""
        values = weight[:]
        scales = np.maximum(np.abs(values).max(axis=1) / np.float32(127), np.finfo(np.float32).tiny)
        codes = np.rint(values / scales[:, None]).astype(np.int8)
        lost, energy = np.square(values - codes * scales[:, None]).sum(), np.square(values).sum()
        self._errors[name] = LayerError(name, 8, True, float(lost / energy) if energy else 0.0)
        return codes, scales


def _quantized_rows(graph: OnnxGraph, rows: str) -> tuple[str, str, str]:
    """uint8 codes of `rows` around 128, the scale of each row [rows, 1], and the 128 as a tensor."""
    last, step = graph.constant("axis_last", [-1]), graph.floats("int8_step", 1 / 127)
    largest = graph.node("ReduceMax", graph.node("Abs", rows), last, keepdims=1)
    scales = graph.node("Max", graph.node("Mul", largest, step), graph.floats("least_step", 1e-12))
    by_row = graph.node("Squeeze", scales, last)
    middle = graph.constant("middle", np.uint8(128))
    middles = graph.node("Expand", middle, graph.node("Shape", by_row))
    return graph.node("QuantizeLinear", rows, by_row, middles, axis=0), scales, middle


def as_float32(array: NDArray[Any], dtype: str) -> Floats:
    """An array as `Tensor.array` gives it, as numbers: bfloat16 comes as bits."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)
