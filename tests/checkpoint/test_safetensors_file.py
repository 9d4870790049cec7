import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from visualglm.checkpoint.safetensors_file import read_safetensors, safetensors_pieces
from visualglm.checkpoint.tensors import LazyTensor
from visualglm.errors import CheckpointError

RawBits = Callable[[torch.Tensor], NDArray[Any]]
LazyTensors = Callable[[Mapping[str, torch.Tensor]], dict[str, LazyTensor]]
TENSORS = {
    "half": torch.randn(3, 5).half(),
    "bfloat": torch.randn(7).bfloat16(),
    "float": torch.randn(2, 2, 2),
    "byte": torch.arange(5, dtype=torch.uint8),
}


def test_reads_what_the_library_writes(raw_bits: RawBits, tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors", metadata={"format": "pt"})
    found = read_safetensors(tmp_path / "a.safetensors")
    assert {name: f"torch.{tensor.dtype}" for name, tensor in found.items()} == {
        name: str(tensor.dtype) for name, tensor in TENSORS.items()
    }
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(found[name].array(), raw_bits(tensor))


def test_the_library_reads_what_is_written(lazy_tensors: LazyTensors, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"".join(safetensors_pieces(lazy_tensors(TENSORS))))
    loaded = load_file(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    stored = read_safetensors(path)
    assert all(tensor.offset % tensor.array().itemsize == 0 for tensor in stored.values())
    assert stored["float"].offset % 64 == 0


def header(entries: Any, data: bytes = b"\0" * 8) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged or is not a safetensors file"),
        (b"\x80\x02}q", "damaged or is not a safetensors file"),
        (b"\xff" * 64, "damaged or is not a safetensors file"),
        (header([1]), "damaged"),
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}), "damaged"),
        (header({"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}), "damaged"),
        (header({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}}), "damaged"),
        (header({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}), "damaged"),
        (header({"a": {"dtype": "F32", "shape": [2]}}), "damaged"),
        (b"[" * 100_000, "damaged"),
        (header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}), "cut short: it has 78 bytes of 86"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "git-lfs pointer"),
    ],
)
def test_damaged_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_safetensors(path)
