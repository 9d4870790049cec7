"""Writes checkpoints that torch.load(weights_only=True) reads, without torch and one tensor at a time."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from zipfile import ZIP64_LIMIT, ZipFile, ZipInfo

from visualglm.checkpoint.progress import ByteProgress
from visualglm.checkpoint.tensors import Tensor, row_major_strides, tensor_bytes

_STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}
_ALIGNMENT = 64
_FIXED_HEADER_BYTES = 30
_ZIP64_FIELD_BYTES = 20

# Pickle instructions (protocol 2); see `pickletools` of the standard library.
_PROTOCOL, _STOP, _MARK = b"\x80\x02", b".", b"("
_EMPTY_DICT, _EMPTY_TUPLE, _TUPLE, _FALSE = b"}", b")", b"t", b"\x89"
_SET_ITEMS, _PERSISTENT, _REDUCE = b"u", b"Q", b"R"
_ORDERED_DICT = b"ccollections\nOrderedDict\n"
_REBUILD_TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"


def write_torch_archive(
    path: Path, tensors: Mapping[str, Tensor], progress: ByteProgress, inside: str | None = None
) -> None:
    """Write a state dict of float tensors, or a dictionary with one under the key `inside`; `OSError` if that fails."""
    pickled = b"".join(_state_dict(tensors))
    if inside is not None:
        pickled = _EMPTY_DICT + _MARK + _text(inside) + pickled + _SET_ITEMS
    with open(path, "xb") as file:
        with ZipFile(file, "w") as archive:
            archive.writestr(f"{path.stem}/data.pkl", _PROTOCOL + pickled + _STOP)
            archive.writestr(f"{path.stem}/byteorder", b"little")
            for index, tensor in enumerate(tensors.values()):
                info = _aligned_entry(f"{path.stem}/data/{index}", tensor_bytes(tensor), file.tell())
                with archive.open(info, "w") as entry:
                    for piece in progress.track(tensor.pieces()):
                        entry.write(piece)
            archive.writestr(f"{path.stem}/version", b"3\n")
        file.flush()
        os.fsync(file.fileno())


def _aligned_entry(name: str, size: int, position: int) -> ZipInfo:
    """An entry at `position` whose data begin at a multiple of 64 bytes, by way of a padding field as torch has it."""
    info = ZipInfo(name)
    info.file_size = size
    # zipfile adds the field of large sizes to the header where it takes an entry to need it.
    large = _ZIP64_FIELD_BYTES if size * 1.05 > ZIP64_LIMIT else 0
    start = position + _FIXED_HEADER_BYTES + len(name.encode()) + 4 + large
    padding = -start % _ALIGNMENT
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    return info


def _state_dict(tensors: Mapping[str, Tensor]) -> Iterator[bytes]:
    yield _EMPTY_DICT + _MARK
    for index, (name, tensor) in enumerate(tensors.items()):
        yield _text(name) + _tensor(str(index), tensor)
    yield _SET_ITEMS


def _tensor(key: str, tensor: Tensor) -> bytes:
    count = prod(tensor.shape)
    storage_type = f"ctorch\n{_STORAGES[tensor.dtype]}\n".encode()
    arguments = _tuple(
        _tuple(_text("storage"), storage_type, _text(key), _text("cpu"), _number(count)) + _PERSISTENT,
        _number(0),
        _tuple(*map(_number, tensor.shape)),
        _tuple(*map(_number, row_major_strides(tensor.shape))),
        _FALSE,
        _ORDERED_DICT + _EMPTY_TUPLE + _REDUCE,
    )
    return _REBUILD_TENSOR + arguments + _REDUCE


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _number(value: int) -> bytes:
    """A natural number: four bytes where they hold it, else as many as it takes."""
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little")
    return b"\x8a" + bytes([len(data)]) + data


def _tuple(*items: bytes) -> bytes:
    return _MARK + b"".join(items) + _TUPLE
