import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from visualglm.checkpoint.pickle_reader import read_torch_archive
from visualglm.checkpoint.pickle_writer import write_torch_archive
from visualglm.checkpoint.progress import ByteProgress
from visualglm.checkpoint.tensors import LazyTensor

LazyTensors = Callable[[Mapping[str, torch.Tensor]], dict[str, LazyTensor]]
STATE = {
    "half": torch.randn(3, 5).half(),
    "bfloat": torch.randn(7).bfloat16(),
    "single": torch.randn(4, 2, 3),
    "größe": torch.tensor(2.5),
    **{f"many.{index}": torch.randn(index + 1) for index in range(300)},
}


@pytest.mark.parametrize("inside", [None, "module"])
@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_what_is_written(inside: str | None, mmap: bool, lazy_tensors: LazyTensors, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    write_torch_archive(path, lazy_tensors(STATE), ByteProgress(1), inside)
    loaded = torch.load(path, weights_only=True, mmap=mmap)
    loaded = loaded[inside] if inside else loaded
    assert list(loaded) == list(STATE)
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in STATE.items()
    )


def test_entries_are_aligned_and_whole(lazy_tensors: LazyTensors, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    lazy = lazy_tensors({f"a{size}": torch.ones(size) for size in range(1, 9)})
    write_torch_archive(path, lazy, ByteProgress(1))
    assert {tensor.offset % 64 for tensor in read_torch_archive(path).values()} == {0}
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_two_writings_are_the_same_file(lazy_tensors: LazyTensors, tmp_path: Path) -> None:
    lazy = lazy_tensors({"a": torch.ones(2)})
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_torch_archive(tmp_path / folder / "w.pt", lazy, ByteProgress(1))
    assert (tmp_path / "one" / "w.pt").read_bytes() == (tmp_path / "two" / "w.pt").read_bytes()
