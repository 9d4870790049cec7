"""Checkpoints of MindSpore (`.ckpt`): protocol buffers, one for each tensor or slice of one, read without MindSpore.

    Checkpoint {1: Value}    Value {1: name, 2: Tensor}    Tensor {1: each dimension, 2: type, 3: bytes}

Tensors above 512 MiB are cut into slices of the same name and dimensions. Texts have the type "str". A checksum of all
may follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from math import prod
from mmap import ACCESS_READ, mmap
from pathlib import Path
from zlib import crc32

from visualglm.checkpoint.files import readable, require_file
from visualglm.checkpoint.tensors import (
    NUMPY_DTYPES,
    PIECE_BYTES,
    JoinedTensor,
    Piece,
    StoredTensor,
    Tensor,
    tensor_bytes,
)
from visualglm.errors import CheckpointError
from visualglm.parameters import Shape
from visualglm.protobuf import LENGTH_DELIMITED, VARINT, Field, Message, fields, head, read_varint, varint

_VALUE = 1
_NAME, _TENSOR = 1, 2
_DIMENSION, _TYPE, _CONTENT = 1, 2, 3
_DTYPES = {
    "Float32": "float32",
    "Float16": "float16",
    "BFloat16": "bfloat16",
    "Float64": "float64",
    "Int64": "int64",
    "Int32": "int32",
    "Int16": "int16",
    "Int8": "int8",
    "UInt8": "uint8",
    "Bool": "bool",
}
_TYPES = {dtype: kind for kind, dtype in _DTYPES.items()}
_TEXT = "str"

# MindSpore's own; parsers of protocol buffers refuse messages of 2 GiB.
SLICE_BYTES = 512 << 20
# A model of MAX_LAYERS and its optimizer have fewer; more would only keep the machine busy.
_MOST_VALUES = 200_000
_LONGEST_NAME, _LONGEST_TYPE, _MOST_DIMENSIONS, _LARGEST_DIMENSION = 1000, 20, 8, 2**40
_CHECKSUM, _CHECKSUM_BYTES = b"crc_num", 10


def read_mindspore(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, none of them read; texts that training keeps beside them are left out.

    Raises `CheckpointError` if the file is missing, cut short, changed since its checksum was taken, malformed, or
    holds anything but tensors and texts.
    """
    require_file(path)
    with _mapped(path) as message:
        values = _values(message, _end(path, message))
        slices = list(islice(values, _MOST_VALUES + 1))
    if len(slices) > _MOST_VALUES:
        raise CheckpointError(f"{path} holds more than {_MOST_VALUES:,} tensors, as no checkpoint does; get it again.")
    tensors: dict[str, Tensor] = {}
    for name, group in groupby(slices, lambda each: each.name):
        if name in tensors:
            raise CheckpointError(f"{path} holds the tensor {readable(name)} twice; get it again.")
        whole = list(group)
        if whole[0].kind != _TEXT:
            tensors[name] = _tensor(path, whole)
    return tensors


def mindspore_pieces(tensors: Mapping[str, Tensor]) -> Iterator[Piece]:
    """The bytes of a file of `tensors`, none of which may be empty, as `mindspore.load_checkpoint` reads it."""
    for name, tensor in tensors.items():
        left, room = tensor_bytes(tensor), 0
        for piece in tensor.pieces():
            rest = memoryview(piece)
            while rest:
                if not room:
                    room = min(left, SLICE_BYTES)
                    yield _slice_head(name, tensor, room)
                part, rest = rest[:room], rest[room:]
                yield part
                room -= len(part)
                left -= len(part)


_Parts = dict[int, tuple[int, int]]
"""Where the content of fields begins and ends, by their numbers."""


@dataclass(frozen=True, slots=True)
class _Slice:
    name: str
    kind: str
    shape: Shape
    offset: int
    size: int


def _slice_head(name: str, tensor: Tensor, size: int) -> bytes:
    dimensions = b"".join(varint(_DIMENSION << 3 | VARINT) + varint(length) for length in tensor.shape)
    kind, tag = _TYPES[tensor.dtype].encode(), name.encode()
    inner = dimensions + head(_TYPE, len(kind)) + kind + head(_CONTENT, size)
    value = head(_NAME, len(tag)) + tag + head(_TENSOR, len(inner) + size) + inner
    return head(_VALUE, len(value) + size) + value


@contextmanager
def _mapped(path: Path) -> Iterator[mmap]:
    """The file as bytes; a `ValueError` inside becomes the `CheckpointError` of one that is malformed."""
    try:
        with open(path, "rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as message:
            yield message
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise CheckpointError(
            f"{path} is no checkpoint of MindSpore that can be read ({error}): damaged, cut short or encrypted; "
            "get it again."
        ) from error


def _end(path: Path, message: mmap) -> int:
    """Where the values end, behind which MindSpore writes a checksum of them when it is asked to."""
    end = len(message) - len(_CHECKSUM) - _CHECKSUM_BYTES
    if end < 0 or message[end : end + len(_CHECKSUM)] != _CHECKSUM:
        return len(message)
    found = 0
    for start in range(0, end, PIECE_BYTES):
        found = crc32(message[start : min(start + PIECE_BYTES, end)], found)
    if found != int.from_bytes(message[-_CHECKSUM_BYTES:], "big"):
        raise CheckpointError(f"{path} has changed since it was written: its checksum differs; get it again.")
    return end


def _values(message: Message, end: int) -> Iterator[_Slice]:
    for number, wire_type, start, stop in fields(message, 0, end):
        if (number, wire_type) != (_VALUE, LENGTH_DELIMITED):
            raise ValueError(f"no value at byte {start}")
        parts: _Parts = {}
        for field in fields(message, start, stop):
            _keep(field, parts, (_NAME, _TENSOR))
        name = _text(message, _part(parts, _NAME, start), _LONGEST_NAME)
        yield _slice(message, name, *_part(parts, _TENSOR, start))


def _slice(message: Message, name: str, start: int, end: int) -> _Slice:
    parts: _Parts = {}
    shape: list[int] = []
    for field in fields(message, start, end):
        if field[0] != _DIMENSION:
            _keep(field, parts, (_TYPE, _CONTENT))
            continue
        shape.extend(islice(_lengths(message, field), _MOST_DIMENSIONS + 1))
        if len(shape) > _MOST_DIMENSIONS or any(length > _LARGEST_DIMENSION for length in shape):
            raise ValueError(f"impossible dimensions of {readable(name)}")
    kind = _text(message, _part(parts, _TYPE, start), _LONGEST_TYPE)
    first, last = _part(parts, _CONTENT, start)
    return _Slice(name, kind, tuple(shape), first, last - first)


def _keep(field: Field, parts: _Parts, wanted: tuple[int, int]) -> None:
    number, wire_type, start, end = field
    if number not in wanted or wire_type != LENGTH_DELIMITED or number in parts:
        raise ValueError(f"something else than a tensor at byte {start}")
    parts[number] = start, end


def _part(parts: _Parts, number: int, start: int) -> tuple[int, int]:
    if number not in parts:
        raise ValueError(f"no complete tensor at byte {start}")
    return parts[number]


def _lengths(message: Message, field: Field) -> Iterator[int]:
    """One dimension, or all of them packed into one field; negative ones come out huge."""
    _, wire_type, position, end = field
    if wire_type not in (VARINT, LENGTH_DELIMITED):
        raise ValueError(f"no dimensions at byte {position}")
    while position < end:
        length, position = read_varint(message, position, end)
        yield length


def _text(message: Message, place: tuple[int, int], longest: int) -> str:
    start, end = place
    if not 0 < end - start <= longest:
        raise ValueError(f"no name at byte {start}")
    return message[start:end].decode("utf-8")


def _tensor(path: Path, slices: list[_Slice]) -> Tensor:
    first = slices[0]
    name, dtype, size = readable(first.name), _DTYPES.get(first.kind), sum(each.size for each in slices)
    if dtype is None:
        raise CheckpointError(f"{path} holds {name} of the type {readable(first.kind)}, which is not read here.")
    if any((each.kind, each.shape) != (first.kind, first.shape) for each in slices):
        raise CheckpointError(f"{path} is damaged: the slices of {name} differ in type or shape; get it again.")
    item = NUMPY_DTYPES[dtype].itemsize
    # As some versions write a number by itself.
    shape = () if first.shape == (0,) and size == item else first.shape
    if size != prod(shape) * item or any(each.size % item for each in slices):
        raise CheckpointError(
            f"{path} is damaged: {name} is {first.kind} {list(shape)} and has {size:,} bytes; get it again."
        )
    if len(slices) == 1:
        return StoredTensor.contiguous(path, dtype, shape, first.offset)
    return JoinedTensor(
        tuple(StoredTensor.contiguous(path, dtype, (each.size // item,), each.offset) for each in slices), shape
    )
