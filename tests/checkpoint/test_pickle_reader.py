import io
import os
import pickle
import pickletools
import struct
import subprocess
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from visualglm.checkpoint.pickle_reader import read_torch_archive
from visualglm.errors import CheckpointError

STATE = OrderedDict(
    half=torch.randn(3, 5).half(),
    bfloat=torch.randn(7).bfloat16(),
    single=torch.randn(4, 2),
    transposed=torch.randn(4, 2).T,
    part=torch.randn(10)[3:7],
    long=torch.arange(6),
    scalar=torch.tensor(2.5),
)


@pytest.mark.parametrize("protocol", [2, 4])
def test_reads_what_torch_saves(
    protocol: int, raw_bits: Callable[[torch.Tensor], NDArray[Any]], tmp_path: Path
) -> None:
    path = tmp_path / "a.pt"
    torch.save({"module": STATE, "iteration": 3, "notes": [None, 1.5, (True,)]}, path, pickle_protocol=protocol)
    found = read_torch_archive(path, inside="module")
    assert list(found) == list(STATE)
    for name, tensor in STATE.items():
        assert found[name].dtype == str(tensor.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(found[name].array(), raw_bits(tensor))
        assert b"".join(found[name].pieces()) == raw_bits(tensor).tobytes()


def test_reads_parameters_and_the_state_dict_of_a_module(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    torch.save(module.state_dict(), tmp_path / "state.pt")
    torch.save(dict(module.named_parameters()), tmp_path / "parameters.pt")
    for name in ("state.pt", "parameters.pt"):
        found = read_torch_archive(tmp_path / name)
        np.testing.assert_array_equal(found["weight"].array(), module.weight.detach().numpy())


class Hostile:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduction = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.reduction


@pytest.mark.parametrize(
    ("function", "argument", "name"),
    [
        # Protocol 2 spells modules as Python 2 did.
        (os.system, "touch {}", r"posix.system"),
        (subprocess.check_output, ["touch", "{}"], r"(subprocess|commands).check_output"),
        (eval, "open('{}', 'w')", r"(builtins|__builtin__).eval"),
        (open, "{}", r"io.open"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_code_is_refused_by_name_and_not_run(
    function: Callable[..., Any], argument: Any, name: str, protocol: int, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    filled = [part.format(trace) for part in argument] if isinstance(argument, list) else argument.format(trace)
    torch.save({"module": {"a": Hostile(function, filled)}}, tmp_path / "a.pt", pickle_protocol=protocol)
    with pytest.raises(CheckpointError, match=f"refers to '{name}'") as caught:
        read_torch_archive(tmp_path / "a.pt", inside="module")
    assert "nothing of it was run" in str(caught.value)
    assert not trace.exists()


def archive(path: Path, pickled: bytes, storages: dict[str, bytes] | None = None, **options: Any) -> Path:
    with zipfile.ZipFile(path, "w", **options) as file:
        file.writestr("a/data.pkl", pickled)
        for key, data in (storages or {}).items():
            file.writestr(f"a/data/{key}", data)
    return path


def tensor_pickle(shape: tuple[int, ...], strides: tuple[int, ...], *, offset: int = 0, count: int = 4) -> bytes:
    """A dictionary with a float32 tensor `w` in the storage `0`, as given."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            if isinstance(value, Storage):
                return "storage", torch.FloatStorage, "0", "cpu", count
            return None

    buffer = io.BytesIO()
    rebuild = Hostile(torch._utils._rebuild_tensor_v2, Storage(), offset, shape, strides, False, OrderedDict())
    Pickler(buffer, 2).dump({"w": rebuild})
    return buffer.getvalue()


def test_the_pickle_made_here_is_read(tmp_path: Path) -> None:
    values = np.arange(4, dtype=np.float32)
    path = archive(tmp_path / "a.pt", tensor_pickle((2, 2), (2, 1)), {"0": values.tobytes()})
    np.testing.assert_array_equal(read_torch_archive(path)["w"].array(), values.reshape(2, 2))


@pytest.mark.parametrize(
    ("pickled", "storage", "message"),
    [
        (tensor_pickle((2, 2), (2, 1), offset=1), b"\0" * 16, "w reaches beyond its storage"),
        (tensor_pickle((2, 2), (3, 1)), b"\0" * 16, "w reaches beyond its storage"),
        (tensor_pickle((1 << 40,), (0,)), b"\0" * 16, "w reaches beyond its storage"),
        (tensor_pickle((4, 2), (1, 0)), b"\0" * 16, "w reaches beyond its storage"),
        (tensor_pickle((2, 2), (2, 1)), b"\0" * 12, "storage 0 has 12 bytes, and 16 are needed"),
        (tensor_pickle((2, 2), (2, 1), count=1 << 40), b"\0" * 16, "are needed"),
        (tensor_pickle((2, 2), (-2, 1)), b"\0" * 16, "damaged pickle"),
        (tensor_pickle((2, 2), (1,)), b"\0" * 16, "damaged pickle"),
        (tensor_pickle((2, 2), (2, 1), offset=-1), b"\0" * 16, "damaged pickle"),
        (tensor_pickle((2, 2), (2, 1)), None, "lacks the entry data/0"),
    ],
)
def test_tensors_that_do_not_fit_their_storage(
    pickled: bytes, storage: bytes | None, message: str, tmp_path: Path
) -> None:
    path = archive(tmp_path / "a.pt", pickled, {} if storage is None else {"0": storage})
    with pytest.raises(CheckpointError, match=message):
        read_torch_archive(path)


# A storage whose size is a tuple of two of the same, 60 times over: 2**60 of them if it were spelled out.
EXPONENTIAL = (
    b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu)"
    + b"".join(b"q\x00h\x00\x86" for _ in range(60))
    + b"tQ."
)
NESTED = b"\x80\x02})" + b"\x85" * 200_000 + b"Ns."


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"", "damaged pickle"),
        (b"\x80\x02}", "damaged pickle"),
        (b"\x80\x02.", "damaged pickle"),
        (b"\x80\x02]q\x00(h\x00e.", "holds no dictionary"),
        (b"\x80\x02K\x01.", "holds no dictionary"),
        (b"\x80\x02}X\x01\x00\x00\x00aK\x01s.", "holds a, which is no tensor"),
        (NESTED, "damaged pickle"),
        (EXPONENTIAL, "damaged pickle"),
        (b"\x80\x02)" + b"\x85" * 300_000 + b".", "more than 250,000 instructions"),
        (b"\x80\x02}K\x07K\x01s.", "holds tensors without a name"),
        (b"\x80\x02}r\xff\xff\xff\xff.", "^"),
        (b"\x80\x02(cos\nsystem\no.", "refers to 'os.system'"),
        (b"\x80\x02(X\x02\x00\x00\x00lsios\nsystem\n.", "instruction INST"),
        (b"\x80\x02\x82\x01.", "instruction EXT1"),
        (b"\x80\x02c__main__\nx\n)\x81.", "refers to '__main__.x'"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "instruction NEWOBJ"),
        (b"\x80\x02ccollections\nOrderedDict\n}b.", "damaged pickle"),
        (b"\x80\x02ctorch\nload\n)R.", "refers to 'torch.load'"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "damaged pickle"),
        (b"\x80\x02U\x01x.", "instruction SHORT_BINSTRING"),
    ],
)
def test_pickles_by_hand(pickled: bytes, message: str, tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pt", pickled)
    if message == "^":
        assert read_torch_archive(path) == {}
        return
    with pytest.raises(CheckpointError, match=message):
        read_torch_archive(path)


def test_attributes_of_a_dictionary_are_passed_over(tmp_path: Path) -> None:
    pickled = b"\x80\x02ccollections\nOrderedDict\n)R}X\x09\x00\x00\x00_metadataNsb."
    assert any(opcode.name == "BUILD" for opcode, _, _ in pickletools.genops(pickled))
    assert read_torch_archive(archive(tmp_path / "a.pt", pickled)) == {}


def test_a_pickle_of_absurd_size_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", bytes((16 << 20) + 1))
    with pytest.raises(CheckpointError, match="far more than that takes"):
        read_torch_archive(path)


def test_a_packed_archive_is_refused(tmp_path: Path) -> None:
    pickled = tensor_pickle((2, 2), (2, 1))
    path = archive(tmp_path / "a.pt", pickled, {"0": b"\0" * 16}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="packed or encrypted"):
        read_torch_archive(path)


def test_a_big_endian_archive_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pt", tensor_pickle((2, 2), (2, 1)), {"0": b"\0" * 16})
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("a/byteorder", "big")
    with pytest.raises(CheckpointError, match="big-endian"):
        read_torch_archive(path)


def test_the_old_format_of_torch_is_named_with_its_remedy(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before 1\.6; save it again .*weights_only=True"):
        read_torch_archive(path)
    torch.save(torch.load(path, weights_only=True), path)
    assert list(read_torch_archive(path)) == ["a"]


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_a_truncated_archive(keep: float, goldens: Path, tmp_path: Path) -> None:
    data = (goldens / "a_hf_layout" / "pytorch_model.bin").read_bytes()
    path = tmp_path / "a.bin"
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        read_torch_archive(path)


def test_every_byte_of_the_directory_may_be_wrong(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pt", tensor_pickle((2, 2), (2, 1)), {"0": b"\0" * 16})
    data = path.read_bytes()
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :])
        try:
            for tensor in read_torch_archive(path).values():
                tensor.array()
        except CheckpointError:
            continue


def test_other_files_are_no_checkpoints(tmp_path: Path) -> None:
    for name, content, message in (
        ("empty", b"", "no torch checkpoint"),
        ("html", b"<html>404</html>", "no torch checkpoint"),
        ("pointer", b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read_torch_archive(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "zip", "w") as file:
        file.writestr("readme", struct.pack("<I", 1))
    with pytest.raises(CheckpointError, match=r"not one of torch\.save"):
        read_torch_archive(tmp_path / "zip")
    with pytest.raises(CheckpointError, match="is missing"):
        read_torch_archive(tmp_path / "nothing")
