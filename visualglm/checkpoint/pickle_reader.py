"""Torch checkpoints (`.pt`, `.bin`): a zip file with a pickle and one stored entry for each storage.

They are read without torch, and without running what they contain (see `pickle_machine`).
"""

from __future__ import annotations

import struct
from math import prod
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from visualglm.checkpoint.files import readable, require_file
from visualglm.checkpoint.pickle_machine import PickledStorage, PickledTensor, PickleRefusedError, read_pickle
from visualglm.checkpoint.tensors import NUMPY_DTYPES, StoredTensor
from visualglm.errors import CheckpointError

_MAX_PICKLE_BYTES = 16 << 20
# A protocol-2 pickle of the number that begins the format torch used before 1.6.
_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_RESAVE = "torch.save(torch.load('{0}', weights_only=True), '{0}')"
_ENCRYPTED = 1
_LOCAL_HEADER = struct.Struct("<4s22xHH")


def read_torch_archive(path: Path, inside: str | None = None) -> dict[str, StoredTensor]:
    """The tensors of a state dict, none of them read.

    `inside` names the entry of the saved dictionary that is the state dict; None: it is one itself. Raises
    `CheckpointError` if the file is missing, damaged, of the format before torch 1.6, holds anything but tensors there,
    or refers to code.
    """
    require_file(path)
    try:
        with ZipFile(path) as archive:
            return _Archive(path, archive).state_dict(inside)
    except PickleRefusedError as fault:
        raise CheckpointError(
            f"{path} {fault}; nothing of it was run or loaded. If you trust its origin, save its tensors alone again "
            "with torch."
        ) from fault
    except (BadZipFile, struct.error, EOFError, NotImplementedError, ValueError, OverflowError) as error:
        raise CheckpointError(_not_a_zip(path)) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from error


class _Archive:
    def __init__(self, path: Path, archive: ZipFile) -> None:
        self._path = path
        self._archive = archive
        self._size = path.stat().st_size
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(f"{path} is a zip file, but not one of torch.save; give the checkpoint itself.")
        prefix = pickles[0].removesuffix("data.pkl")
        self._entries = {name.removeprefix(prefix): archive.getinfo(name) for name in names}

    def state_dict(self, inside: str | None) -> dict[str, StoredTensor]:
        if "byteorder" in self._entries and self._read("byteorder") != b"little":
            raise PickleRefusedError("was written on a big-endian machine, which is not supported")
        values = read_pickle(self._read("data.pkl"))
        if inside is not None:
            values = values.get(inside) if isinstance(values, dict) else None
        if not isinstance(values, dict):
            what = f"has no dictionary {inside!r}" if inside else "holds no dictionary"
            raise CheckpointError(f"{self._path} {what} of tensors; give a checkpoint of weights.")
        if not all(isinstance(name, str) for name in values):
            raise CheckpointError(f"{self._path} holds tensors without a name; give a checkpoint of weights.")
        return {name: self._tensor(name, value) for name, value in values.items()}

    def _entry(self, name: str) -> ZipInfo:
        info = self._entries.get(name)
        if info is None:
            raise CheckpointError(f"{self._path} is damaged: it lacks the entry {readable(name)}; get it again.")
        if info.compress_type != ZIP_STORED or info.flag_bits & _ENCRYPTED:
            raise CheckpointError(f"{self._path} is a packed or encrypted zip file; save it again with torch.save.")
        return info

    def _read(self, name: str) -> bytes:
        info = self._entry(name)
        if info.file_size > _MAX_PICKLE_BYTES:
            raise PickleRefusedError(f"describes its tensors in {info.file_size:,} bytes, far more than that takes")
        return self._archive.read(info)

    def _tensor(self, name: str, value: Any) -> StoredTensor:
        if not isinstance(value, PickledTensor):
            raise CheckpointError(
                f"{self._path} holds {readable(name)}, which is no tensor; give a checkpoint of weights."
            )
        last = value.offset + sum((size - 1) * step for size, step in zip(value.shape, value.strides, strict=True))
        count = prod(value.shape)
        # Comparing the counts refuses broadcast views, which would grow without bound when written out.
        if count and (last >= value.storage.count or count > value.storage.count):
            raise CheckpointError(
                f"{self._path} is damaged: {readable(name)} reaches beyond its storage; get it again."
            )
        start = self._storage_start(value.storage)
        offset = start + value.offset * NUMPY_DTYPES[value.storage.dtype].itemsize
        return StoredTensor(self._path, value.storage.dtype, value.shape, offset, value.shape, value.strides)

    def _storage_start(self, storage: PickledStorage) -> int:
        """Where the bytes of a storage begin in the file."""
        info = self._entry(f"data/{storage.key}")
        needed = storage.count * NUMPY_DTYPES[storage.dtype].itemsize
        start = self._data_start(info)
        if info.file_size < needed or start + needed > self._size:
            raise CheckpointError(
                f"{self._path} is damaged: the storage {readable(storage.key)} has {info.file_size:,} bytes, "
                f"and {needed:,} are needed; get it again."
            )
        return start

    def _data_start(self, info: ZipInfo) -> int:
        with open(self._path, "rb") as file:
            file.seek(info.header_offset)
            magic, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        if magic != b"PK\x03\x04":
            raise BadZipFile
        return info.header_offset + _LOCAL_HEADER.size + int(name_length) + int(extra_length)


def _not_a_zip(path: Path) -> str:
    with open(path, "rb") as file:
        start = file.read(len(_LEGACY_START))
    if start == _LEGACY_START:
        return f"{path} has the format of torch before 1.6; save it again with a newer torch: {_RESAVE.format(path)}."
    if start[:2] == b"PK":
        return f"{path} is cut short or damaged; get it again."
    return f"{path} is no torch checkpoint; get it again."
