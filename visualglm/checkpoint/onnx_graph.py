"""What an ONNX graph takes, gives and computes with, read without running anything of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from visualglm.checkpoint.onnx_file import BoundedReader, reading_graph
from visualglm.protobuf import LENGTH_DELIMITED, VARINT, read_varint

# The numbers of the fields that are read, by the messages of ONNX that have them.
FIELDS: Mapping[str, Mapping[str, int]] = {
    "ModelProto": {"graph": 7},
    "GraphProto": {"node": 1, "initializer": 5, "input": 11, "output": 12},
    "NodeProto": {"op_type": 4, "attribute": 5},
    "AttributeProto": {"name": 1, "i": 3},
    "TensorProto": {"data_type": 2, "name": 8},
    "ValueInfoProto": {"name": 1, "type": 2},
    "TypeProto": {"tensor_type": 1},
    "Tensor": {"elem_type": 1, "shape": 2},
    "TensorShapeProto": {"dim": 1},
    "Dimension": {"dim_value": 1},
}
ELEMENT_TYPES = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 16: "bfloat16"}
_BLOCK_OPERATOR = b"MatMulNBits"

Span = tuple[int, int]
Parts = Mapping[str, Sequence[Span]]
"""Where the fields of a message lie, by their names."""


@dataclass(frozen=True)
class Value:
    """The type of an input or output and its sizes, None where a size is free."""

    element: str
    sizes: tuple[int | None, ...]

    def __str__(self) -> str:
        return f"{self.element} [{', '.join('any' if size is None else str(size) for size in self.sizes)}]"


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a graph, by their names."""

    inputs: Mapping[str, Value]
    outputs: Mapping[str, Value]


@dataclass(frozen=True)
class Weights:
    """What a graph computes with.

    blocks: bits and block size of each kind of quantised weight. constants: the type of each tensor by its name.
    """

    blocks: frozenset[tuple[int, int]]
    constants: Mapping[str, str]


def read_signature(path: Path, model: bytes) -> Signature:
    """What the graph `model`, read from `path`, takes and gives; raises `CheckpointError` if it is malformed."""
    with reading_graph(path):
        reader = _GraphReader(model)
        inputs, outputs = (dict(map(reader.value, reader.graph_parts(name))) for name in ("input", "output"))
        return Signature(inputs, outputs)


def read_weights(path: Path, model: bytes) -> Weights:
    """The weights of the graph `model`, read from `path`; raises `CheckpointError` if it is malformed."""
    with reading_graph(path):
        reader = _GraphReader(model)
        blocks = frozenset(block for node in reader.graph_parts("node") for block in reader.blocks(node))
        return Weights(blocks, dict(map(reader.constant, reader.graph_parts("initializer"))))


class _GraphReader(BoundedReader):
    def graph_parts(self, name: str) -> Iterator[Span]:
        """Where the parts of that name lie in the graph, which may be given in pieces."""
        for graph in self._parts("ModelProto", (0, len(self.message))).get("graph", ()):
            yield from self._parts("GraphProto", graph).get(name, ())

    def value(self, span: Span) -> tuple[str, Value]:
        value = self._parts("ValueInfoProto", span)
        kind = self._inner("TypeProto", value, "type")
        tensor = self._inner("Tensor", kind, "tensor_type")
        shape = self._inner("TensorShapeProto", tensor, "shape")
        dimensions = [self._parts("Dimension", each) for each in shape.get("dim", ())]
        sizes = tuple(self._integer(each, "dim_value") if each else None for each in dimensions)
        return self._text(value, "name"), Value(_element(self._integer(tensor, "elem_type")), sizes)

    def blocks(self, span: Span) -> Iterator[tuple[int, int]]:
        node = self._parts("NodeProto", span)
        if self._bytes(node, "op_type") == _BLOCK_OPERATOR:
            attributes = [self._parts("AttributeProto", each) for each in node.get("attribute", ())]
            named = {self._text(each, "name"): self._integer(each, "i") for each in attributes}
            yield named.get("bits", 0), named.get("block_size", 0)

    def constant(self, span: Span) -> tuple[str, str]:
        tensor = self._parts("TensorProto", span)
        return self._text(tensor, "name"), _element(self._integer(tensor, "data_type"))

    def _parts(self, kind: str, span: Span) -> Parts:
        names = {number: name for name, number in FIELDS[kind].items()}
        parts: dict[str, list[Span]] = defaultdict(list)
        for number, wire_type, start, end in self.fields(*span):
            if number in names and wire_type in (LENGTH_DELIMITED, VARINT):
                parts[names[number]].append((start, end))
        return parts

    def _inner(self, kind: str, parts: Parts, name: str) -> Parts:
        return self._parts(kind, parts[name][-1]) if name in parts else {}

    def _integer(self, parts: Parts, name: str) -> int:
        return read_varint(self.message, *parts[name][-1])[0] if name in parts else 0

    def _bytes(self, parts: Parts, name: str) -> bytes:
        return self.message[slice(*parts[name][-1])] if name in parts else b""

    def _text(self, parts: Parts, name: str) -> str:
        return self._bytes(parts, name).decode("utf-8", "backslashreplace")


def _element(number: int) -> str:
    return ELEMENT_TYPES.get(number, f"type {number}")
