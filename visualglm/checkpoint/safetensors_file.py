"""The safetensors format: a JSON header with the place of every tensor, then their bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from visualglm.checkpoint.files import require_file
from visualglm.checkpoint.tensors import NUMPY_DTYPES, Piece, StoredTensor, Tensor, tensor_bytes
from visualglm.errors import CheckpointError

_CODES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float64": "F64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_MAX_HEADER_BYTES = 100_000_000
# Tensors start at multiples of it, which every instruction set can load from a memory map.
_ALIGNMENT = 64


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, none of them read; raises `CheckpointError` if it is missing, cut short or malformed."""
    require_file(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            (header_bytes,) = struct.unpack("<Q", start) if len(start) == 8 else (_MAX_HEADER_BYTES + 1,)
            header = file.read(header_bytes) if header_bytes <= _MAX_HEADER_BYTES else b""
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from error
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = {name: _stored(path, 8 + len(header), entry) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or is not a safetensors file; get it again.") from error
    _check_extent(path, size, 8 + header_bytes, tensors)
    return tensors


def safetensors_pieces(tensors: Mapping[str, Tensor]) -> Iterator[Piece]:
    """The bytes of a safetensors file of `tensors`; the widest types come first, so that each is aligned."""
    ordered = sorted(tensors.items(), key=lambda item: -NUMPY_DTYPES[item[1].dtype].itemsize)
    yield _header({name: tensor for name, tensor in ordered})
    for _, tensor in ordered:
        yield from tensor.pieces()


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    entries, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor_bytes(tensor)
        entries[name] = {"dtype": _CODES[tensor.dtype], "shape": tensor.shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _stored(path: Path, data_start: int, entry: dict[str, Any]) -> StoredTensor:
    dtype, shape, (start, end) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(value) is int and value >= 0 for value in (*shape, start, end)):
        raise ValueError("sizes and offsets must be whole numbers")
    if end - start != prod(shape) * NUMPY_DTYPES[dtype].itemsize:
        raise ValueError("the size of a tensor does not fit its shape")
    return StoredTensor.contiguous(path, dtype, shape, data_start + start)


def _check_extent(path: Path, size: int, data_start: int, tensors: Mapping[str, StoredTensor]) -> None:
    end = max((tensor.offset + tensor_bytes(tensor) for tensor in tensors.values()), default=data_start)
    if end > size:
        raise CheckpointError(f"{path} is cut short: it has {size:,} bytes of {end:,}; get it again.")
