"""MindIR graphs as files: what they would compute with and where their weights lie, looked at before MindSpore does.

MindSpore knows operators that run Python or load libraries, and reads weights from whatever file a graph names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from mmap import ACCESS_READ, mmap
from pathlib import Path

from visualglm.checkpoint.files import readable
from visualglm.errors import CheckpointError
from visualglm.protobuf import LENGTH_DELIMITED, VARINT, Message, fields, read_varint

# Numbers of fields in ModelProto, GraphProto, NodeProto, PrimitiveProto, TensorProto and ExternalDataProto.
_GRAPHS, _PREPROCESSOR, _PRIMITIVES = (7, 8), 9, 12
_NODE, _PARAMETER, _MAP_PARAMETER = 1, 3, 10
_NODE_OPERATOR = 4
_PRIMITIVE_NAME, _PRIMITIVE_OPERATOR = 1, 2
_EXTERNAL_DATA = 12
_LOCATION, _OFFSET, _LENGTH = 1, 2, 3

_CONSTANT, _REFERENCE = "Constant", "REF::"
# Those of all graphs that `visualglm.export.mindir` makes; none does anything but arithmetic.
_OPERATORS = {
    *("Add", "BatchMatMul", "BiasAdd", "BroadcastTo", "Cast", "Concat", "Conv2D", "CumSum", "Depend", "Div", "Erf"),
    *("ExpandDims", "Gather", "GeLU", "GreaterEqual", "LayerNorm", "LessScalar", "Load", "LogicalAnd"),
    *("LogicalNot", "MakeTuple", "MatMul", "MatMulExt", "Mul", "Muls", "Neg", "Reshape", "Select", "Softmax"),
    *("Split", "StridedSlice", "Sub", "TensorScatterElements", "TensorScatterUpdate", "Transpose", "TupleGetItem"),
    "UpdateState",
}

Part = tuple[int, int]
"""Where the content of a message starts and ends."""


def check_graph(path: Path, data: Mapping[str, int]) -> None:
    """Whether the graph at `path` is made of known operators, and its weights lie within itself or `data`.

    data: sizes in bytes of the files that may hold them, by their places beside the graph. Raises `CheckpointError`.
    """
    try:
        with open(path, "rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as model:
            fault = _fault(model, data)
    except ValueError as error:
        raise CheckpointError(
            f"{path} is no MindIR graph that can be used ({error}); export the model again."
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from error
    if fault:
        raise CheckpointError(f"{path} {fault}; do not use it, or export the model again.")


def _fault(model: Message, data: Mapping[str, int]) -> str | None:
    whole = (0, len(model))
    if _parts(model, whole, _PREPROCESSOR):
        return "has a preprocessor, which no export of ours has"
    names = set()
    for primitive in _parts(model, whole, _PRIMITIVES):
        operator = _text(model, primitive, _PRIMITIVE_OPERATOR)
        if operator not in _OPERATORS:
            return f"has the operator {readable(operator)}, which no export of ours has"
        names.add(_REFERENCE + _text(model, primitive, _PRIMITIVE_NAME))
    graphs = [graph for number in _GRAPHS for graph in _parts(model, whole, number)]
    return next(filter(None, (_graph_fault(model, graph, names, data) for graph in graphs)), None)


def _graph_fault(model: Message, graph: Part, names: Collection[str], data: Mapping[str, int]) -> str | None:
    if _parts(model, graph, _MAP_PARAMETER):
        return "has parameters of a kind that no export of ours has"
    for node in _parts(model, graph, _NODE):
        operator = _text(model, node, _NODE_OPERATOR)
        if operator != _CONSTANT and operator not in names:
            return f"has the operator {readable(operator)}, which no export of ours has"
    for parameter in _parts(model, graph, _PARAMETER):
        for place in _parts(model, parameter, _EXTERNAL_DATA):
            location = _text(model, place, _LOCATION)
            if location not in data:
                return f"asks for weights in {readable(location)}, which is no file of the export"
            if _number(model, place, _OFFSET) + _number(model, place, _LENGTH) > data[location]:
                return f"asks for weights beyond the end of {readable(location)}"
    return None


def _parts(model: Message, part: Part, number: int) -> list[Part]:
    """The messages or texts of that number in a message."""
    return [
        (start, end)
        for found, wire_type, start, end in fields(model, *part)
        if found == number and wire_type == LENGTH_DELIMITED
    ]


def _text(model: Message, part: Part, number: int) -> str:
    """The last text of that number in a message; "" without one."""
    found = _parts(model, part, number)
    return model[slice(*found[-1])].decode("utf-8", "replace") if found else ""


def _number(model: Message, part: Part, number: int) -> int:
    numbers = [start for found, kind, start, _ in fields(model, *part) if found == number and kind == VARINT]
    return read_varint(model, numbers[-1], part[1])[0] if numbers else 0
