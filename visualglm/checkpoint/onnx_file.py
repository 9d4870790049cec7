"""ONNX graphs as files: where they say that their weights lie, read without running anything of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from visualglm.checkpoint.files import readable
from visualglm.errors import CheckpointError
from visualglm.protobuf import LENGTH_DELIMITED, Field, fields

DATA_SUFFIX = ".data"

# The messages of ONNX that hold tensors, however deep: under which numbers, and what kind of message each is.
HOLDERS: Mapping[str, Mapping[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
}
EXTERNAL_DATA = 13
ENTRY_KEY, ENTRY_VALUE = 1, 2

# Eight times what the graphs of the released sizes have; more would only keep the machine busy.
_MOST_FIELDS = 200_000
# As deep as protobuf itself goes.
_DEEPEST = 100
_LONGEST_ENTRY = 1000
_PLACE_KEYS = (b"location", b"offset", b"length")
_OFFSET = re.compile(rb"\d{1,18}")
_LENGTH = re.compile(rb"[1-9]\d{0,17}")


@dataclass(frozen=True)
class ExternalData:
    """Where the bytes of one tensor lie outside its graph."""

    location: str
    offset: int
    length: int


def check_external_data(path: Path, model: bytes, data_bytes: int | None) -> None:
    """Whether all the weights of the graph `model`, read from `path`, lie within the data file beside it.

    data_bytes: size of that file, None if there is none. Raises `CheckpointError` if the graph asks for another file
    or for more than there is, or is malformed.
    """
    data = path.name + DATA_SUFFIX
    with reading_graph(path):
        for tensor in external_data(model):
            fault = _place_fault(tensor, data, data_bytes)
            if fault:
                raise CheckpointError(f"{path} {fault}.")


@contextmanager
def reading_graph(path: Path) -> Iterator[None]:
    """A `ValueError` inside becomes the `CheckpointError` of a graph that is malformed."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{path} is no ONNX graph that can be used ({error}); export the model again.") from error


def _place_fault(tensor: ExternalData, data: str, data_bytes: int | None) -> str | None:
    if tensor.location != data:
        return f"asks for weights in {readable(tensor.location)}, and may only in {data}; do not use it"
    if data_bytes is None:
        return f"has its weights in {data}, which is not listed; export the model again"
    if tensor.offset + tensor.length > data_bytes:
        return f"asks for weights beyond the end of {data}; export the model again"
    return None


def external_data(model: bytes) -> Iterator[ExternalData]:
    """What lies outside of every tensor anywhere in `model`, a serialized ModelProto.

    Raises `ValueError` where it is malformed, endless or ambiguous.
    """
    reader = _TensorReader(model)
    for start, end in reader.tensors("ModelProto", 0, len(model)):
        place = reader.place(start, end)
        if place:
            yield _checked(place)


class BoundedReader:
    """Walks through a message, and not forever."""

    def __init__(self, message: bytes) -> None:
        self.message = message
        self._left = _MOST_FIELDS

    def fields(self, start: int, end: int) -> Iterator[Field]:
        """Every field of a message inside; raises `ValueError` where it is malformed, and after too many in all."""
        for field in fields(self.message, start, end):
            self._left -= 1
            if self._left < 0:
                raise ValueError(f"more than {_MOST_FIELDS:,} fields")
            yield field


class _TensorReader(BoundedReader):
    def tensors(self, kind: str, start: int, end: int, depth: int = 1) -> Iterator[tuple[int, int]]:
        """Where each TensorProto lies in a message of this kind."""
        if depth > _DEEPEST:
            raise ValueError(f"nested more than {_DEEPEST} deep")
        held = HOLDERS[kind]
        for number, wire_type, first, last in self.fields(start, end):
            inner = held.get(number) if wire_type == LENGTH_DELIMITED else None
            if inner == "TensorProto":
                yield first, last
            elif inner:
                yield from self.tensors(inner, first, last, depth + 1)

    def place(self, start: int, end: int) -> dict[bytes, bytes]:
        """What a TensorProto says about data outside: keys and values, none if it holds its own."""
        place: dict[bytes, bytes] = {}
        for number, wire_type, first, last in self.fields(start, end):
            if (number, wire_type) == (EXTERNAL_DATA, LENGTH_DELIMITED):
                key, value = self._entry(first, last)
                # Readers differ in which of two they take, and some follow keys of their own.
                if key in place or key not in _PLACE_KEYS:
                    raise ValueError("the place of a tensor is not told as one location, offset and length")
                place[key] = value
        return place

    def _entry(self, start: int, end: int) -> tuple[bytes, bytes]:
        if end - start > _LONGEST_ENTRY:
            raise ValueError("the place of a tensor is endless")
        texts = {
            number: self.message[first:last]
            for number, wire_type, first, last in self.fields(start, end)
            if wire_type == LENGTH_DELIMITED
        }
        return texts.get(ENTRY_KEY, b""), texts.get(ENTRY_VALUE, b"")


def _checked(place: Mapping[bytes, bytes]) -> ExternalData:
    # None has a default: a message given twice is merged, and would take the missing one from its other half.
    location, offset, length = (place.get(key, b"") for key in _PLACE_KEYS)
    if not location or not _OFFSET.fullmatch(offset) or not _LENGTH.fullmatch(length):
        raise ValueError("the place of a tensor lacks its location, offset or length, or is no number")
    return ExternalData(location.decode("utf-8", "backslashreplace"), int(offset), int(length))
