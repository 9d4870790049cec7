"""Files as MindSpore writes them, spelled out byte by byte; `tests/mindspore` reads and writes them with MindSpore."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from visualglm.checkpoint import mindspore_ckpt
from visualglm.checkpoint.files import write_file
from visualglm.checkpoint.mindspore_ckpt import mindspore_pieces, read_mindspore
from visualglm.checkpoint.tensors import JoinedTensor, LazyTensor
from visualglm.errors import CheckpointError
from visualglm.protobuf import head, varint


def field(number: int, content: bytes) -> bytes:
    return head(number, len(content)) + content


def tensor(dims: list[int], kind: str, content: bytes) -> bytes:
    dimensions = b"".join(b"\x08" + varint(length) for length in dims)
    return dimensions + field(2, kind.encode()) + field(3, content)


def value(name: str, dims: list[int], kind: str, content: bytes) -> bytes:
    return field(1, field(1, name.encode()) + field(2, tensor(dims, kind, content)))


def lazy(array: NDArray[Any]) -> LazyTensor:
    return LazyTensor(array.dtype.name, array.shape, lambda: array)


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


ONES = np.ones((2, 3), np.float32)
GOOD = value("a", [2, 3], "Float32", ONES.tobytes())


def test_reads_what_mindspore_writes(tmp_path: Path) -> None:
    text = "step".encode("utf-32-le")
    path = written(
        tmp_path / "a.ckpt",
        GOOD
        + value("epoch_num", [], "Int64", struct.pack("<q", 3))
        + value("old_scalar", [0], "Float32", struct.pack("<f", 1.5))
        + value("note", [0], "str", text)
        + value("bits", [2], "BFloat16", b"\x80\x3f\x00\x40"),
    )
    found = read_mindspore(path)
    assert {name: (each.dtype, each.shape) for name, each in found.items()} == {
        "a": ("float32", (2, 3)),
        "epoch_num": ("int64", ()),
        "old_scalar": ("float32", ()),
        "bits": ("bfloat16", (2,)),
    }
    assert found["epoch_num"].array() == 3
    assert found["old_scalar"].array() == 1.5
    assert found["bits"].array().tolist() == [0x3F80, 0x4000]
    np.testing.assert_array_equal(found["a"].array(), ONES)


def test_dimensions_may_be_packed(tmp_path: Path) -> None:
    inner = field(1, varint(2) + varint(3)) + field(2, b"Float32") + field(3, ONES.tobytes())
    path = written(tmp_path / "a.ckpt", field(1, field(1, b"a") + field(2, inner)))
    assert read_mindspore(path)["a"].shape == (2, 3)


def test_slices_are_one_tensor(tmp_path: Path) -> None:
    array = np.arange(30, dtype=np.float16).reshape(5, 6)
    content = array.tobytes()
    slices = [content[:24], content[24:40], content[40:]]
    path = written(
        tmp_path / "a.ckpt",
        GOOD.replace(b"\x01a", b"\x01z") + b"".join(value("a", [5, 6], "Float16", part) for part in slices),
    )
    found = read_mindspore(path)
    assert list(found) == ["z", "a"]
    joined = found["a"]
    assert isinstance(joined, JoinedTensor) and joined.shape == (5, 6)
    np.testing.assert_array_equal(joined.array(), array)
    assert b"".join(joined.pieces()) == content
    np.testing.assert_array_equal(
        joined.regrouped((1, 5), (1, 0)).array(), array.reshape(1, 5, 6).transpose(1, 0, 2).reshape(5, 6)
    )


def test_what_is_written_is_what_mindspore_would_write(tmp_path: Path) -> None:
    scalar = np.array(2.5, np.float32)
    write_file(tmp_path / "a.ckpt", mindspore_pieces({"a": lazy(ONES), "b": lazy(scalar)}))
    assert (tmp_path / "a.ckpt").read_bytes() == GOOD + value("b", [], "Float32", scalar.tobytes())


@pytest.mark.parametrize("piece", [7, 8, 100])
def test_large_tensors_are_written_in_slices(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mindspore_ckpt, "SLICE_BYTES", 16)
    monkeypatch.setattr("visualglm.checkpoint.tensors.PIECE_BYTES", piece)
    array = np.arange(9, dtype=np.float32).reshape(3, 3)
    write_file(tmp_path / "a.ckpt", mindspore_pieces({"a": lazy(array), "b": lazy(ONES)}))
    cuts = [array.tobytes()[start : start + 16] for start in (0, 16, 32)]
    expected = b"".join(value("a", [3, 3], "Float32", cut) for cut in cuts)
    rest = [ONES.tobytes()[start : start + 16] for start in (0, 16)]
    expected += b"".join(value("b", [2, 3], "Float32", cut) for cut in rest)
    assert (tmp_path / "a.ckpt").read_bytes() == expected
    found = read_mindspore(tmp_path / "a.ckpt")
    np.testing.assert_array_equal(found["a"].array(), array)


def test_a_checksum_is_checked(tmp_path: Path) -> None:
    checksum = b"crc_num" + zlib.crc32(GOOD).to_bytes(10, "big")
    assert list(read_mindspore(written(tmp_path / "a.ckpt", GOOD + checksum))) == ["a"]
    changed = GOOD[:-1] + b"\x01" + checksum
    with pytest.raises(CheckpointError, match="has changed since it was written: its checksum differs"):
        read_mindspore(written(tmp_path / "b.ckpt", changed))


DAMAGED = "no checkpoint of MindSpore that can be read"
HOSTILE = {
    "empty": (b"", "cannot mmap an empty file"),
    "text": (b"hello, world, this is no checkpoint", DAMAGED),
    "cut short": (GOOD[:-1], DAMAGED),
    "cut in a name": (GOOD[:4], DAMAGED),
    "a huge length": (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f" + GOOD, DAMAGED),
    "a length without end": (b"\x0a" + b"\xff" * 20, DAMAGED),
    "another field": (GOOD + field(2, b"x"), "no value at byte"),
    "a table of MindSpore": (field(1, field(1, b"a") + field(3, b"")), "something else than a tensor"),
    "no name": (field(1, field(2, tensor([1], "Int8", b"x"))), "no complete tensor"),
    "an empty name": (value("", [1], "Int8", b"x"), "no name"),
    "an endless name": (value("n" * 1001, [1], "Int8", b"x"), "no name"),
    "a name that is no text": (field(1, field(1, b"\xff\xfe") + field(2, tensor([1], "Int8", b"x"))), DAMAGED),
    "no tensor": (field(1, field(1, b"a")), "no complete tensor"),
    "two tensors": (
        field(1, field(1, b"a") + field(2, tensor([1], "Int8", b"x")) * 2),
        "something else than a tensor",
    ),
    "no content": (field(1, field(1, b"a") + field(2, b"\x08\x01" + field(2, b"Int8"))), "no complete tensor"),
    "many dimensions": (value("a", [1] * 9, "Int8", b"x"), "impossible dimensions of a"),
    "a negative dimension": (value("a", [2**64 - 1], "Int8", b"x"), "impossible dimensions of a"),
    "packed dimensions without end": (
        field(1, field(1, b"a") + field(2, field(1, b"\x01" * 5000) + field(2, b"Int8") + field(3, b"x"))),
        "impossible dimensions of a",
    ),
    "wrong dimensions": (value("a", [2, 4], "Float32", ONES.tobytes()), r"a is Float32 \[2, 4\] and has 24 bytes"),
    "half an element": (
        value("a", [3], "Float16", b"xxx") + value("a", [3], "Float16", b"xxx"),
        r"a is Float16 \[3\] and has 6 bytes",
    ),
    "the same again": (GOOD + GOOD, r"a is Float32 \[2, 3\] and has 48 bytes"),
    "the same later": (GOOD + value("b", [1], "Int8", b"x") + GOOD, "holds the tensor a twice"),
    "slices of two types": (
        value("a", [2], "Int8", b"x") + value("a", [2], "UInt8", b"x"),
        "the slices of a differ in type or shape",
    ),
    "slices of two shapes": (
        value("a", [2], "Int8", b"x") + value("a", [1, 2], "Int8", b"x"),
        "the slices of a differ in type or shape",
    ),
    "an unknown type": (value("a", [1], "Float8", b"x"), "a of the type Float8, which is not read here"),
    "an endless type": (value("a", [1], "F" * 21, b"x"), "no name"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_one_sentence(case: str, tmp_path: Path) -> None:
    content, message = HOSTILE[case]
    path = written(tmp_path / "a.ckpt", content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_mindspore(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_files_cut_anywhere_and_changed_anywhere_never_crash(tmp_path: Path) -> None:
    content = value("a", [2, 3], "Float32", ONES.tobytes()) + value("b", [2], "Int8", b"xy")
    for position in range(1, len(content)):
        for spoilt in (content[:position], content[:position] + b"\xff" + content[position + 1 :]):
            try:
                found = read_mindspore(written(tmp_path / "a.ckpt", spoilt))
            except CheckpointError:
                continue
            for each in found.values():
                each.array()


def test_too_many_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mindspore_ckpt, "_MOST_VALUES", 2)
    path = written(tmp_path / "a.ckpt", b"".join(value(name, [1], "Int8", b"x") for name in "abc"))
    with pytest.raises(CheckpointError, match="holds more than 2 tensors"):
        read_mindspore(path)


def test_missing_files_and_pointers(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is missing"):
        read_mindspore(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="git-lfs pointer"):
        read_mindspore(written(tmp_path / "b.ckpt", b"version https://git-lfs.github.com/spec/v1\noid"))
