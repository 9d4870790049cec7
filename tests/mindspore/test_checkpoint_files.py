"""Files that MindSpore wrote, read without it, and the other way round: every bit, slices and checksums too."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from numpy.typing import NDArray

from visualglm.checkpoint import mindspore_ckpt
from visualglm.checkpoint.convert import convert
from visualglm.checkpoint.files import write_file
from visualglm.checkpoint.mindspore_ckpt import mindspore_pieces, read_mindspore
from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.checkpoint.tensors import JoinedTensor, LazyTensor
from visualglm.errors import CheckpointError

FILES = ("visualglm_vit.ckpt", "visualglm_qformer.ckpt", "glm_6b.ckpt", "glm_6b_for_lite.ckpt")
RANDOM = np.random.default_rng(0)
ARRAYS: dict[str, NDArray[Any]] = {
    "f32": RANDOM.normal(size=(3, 4)).astype(np.float32),
    "f16": RANDOM.normal(size=(1, 1, 5)).astype(np.float16),
    "f64": RANDOM.normal(size=(2,)),
    "i64": np.arange(6).reshape(2, 3),
    "i32": np.arange(3, dtype=np.int32),
    "u8": np.arange(3, dtype=np.uint8),
    "bool": np.array([True, False]),
    "scalar": np.array(3.5, np.float32),
}


def parameters(arrays: Mapping[str, NDArray[Any]]) -> list[dict[str, Any]]:
    return [{"name": name, "data": Tensor(array)} for name, array in arrays.items()]


def assert_bits(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """That `mindspore.load_checkpoint` reads just these."""
    loaded = ms.load_checkpoint(str(path))
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        found = loaded[name]
        if found.dtype == ms.bfloat16:
            found = Tensor(found).float()
            array = (array.astype(np.uint32) << 16).view(np.float32)
        assert (found.shape, found.asnumpy().dtype) == (array.shape, array.dtype)
        assert found.asnumpy().tobytes() == array.tobytes(), name


@pytest.mark.parametrize("options", [{}, {"crc_check": True}, {"async_save": "thread"}])
def test_what_mindspore_saves_is_read(options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    bf16 = [{"name": "bf16", "data": Tensor(ARRAYS["f32"]).astype(ms.bfloat16)}]
    beside = {"epoch_num": 3, "note": "a text", "lr": 0.1}
    ms.save_checkpoint(parameters(ARRAYS) + bf16, str(path), append_dict=beside, **options)
    if "async_save" in options:
        from mindspore.train.serialization import async_ckpt_thread_status

        while async_ckpt_thread_status():
            pass
    found = read_mindspore(path)
    assert found.keys() == {*ARRAYS, "bf16", "epoch_num", "lr"}
    assert found["epoch_num"].array() == 3
    for name, array in ARRAYS.items():
        assert (found[name].array().dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].array().tobytes() == array.tobytes()
    rounded = Tensor(ARRAYS["f32"]).astype(ms.bfloat16).float().asnumpy()
    np.testing.assert_array_equal((found["bf16"].array().astype(np.uint32) << 16).view(np.float32), rounded)


def test_a_changed_file_does_not_match_its_checksum(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    ms.save_checkpoint(parameters(ARRAYS), str(path), crc_check=True)
    content = bytearray(path.read_bytes())
    content[content.index(ARRAYS["f32"].tobytes())] ^= 1
    (tmp_path / "b.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match="its checksum differs"):
        read_mindspore(tmp_path / "b.ckpt")


def test_slices_that_mindspore_cuts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mindspore.train import serialization

    monkeypatch.setattr(serialization, "SLICE_SIZE", 1)  # KiB
    array = np.arange(3000, dtype=np.float32).reshape(50, 60)
    ms.save_checkpoint(parameters({"a": array, "b": ARRAYS["f32"]}), str(tmp_path / "a.ckpt"))
    found = read_mindspore(tmp_path / "a.ckpt")
    assert isinstance(found["a"], JoinedTensor) and len(found["a"].parts) == 12
    np.testing.assert_array_equal(found["a"].array(), array)
    np.testing.assert_array_equal(found["b"].array(), ARRAYS["f32"])


@pytest.mark.parametrize("slice_bytes", [mindspore_ckpt.SLICE_BYTES, 16])
def test_mindspore_reads_what_is_written(slice_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mindspore_ckpt, "SLICE_BYTES", slice_bytes)
    bits = (ARRAYS["f32"].view(np.uint32) >> 16).astype(np.uint16)
    lazy = {
        name: LazyTensor(array.dtype.name, array.shape, lambda array=array: array)  # type: ignore[misc]
        for name, array in ARRAYS.items()
    }
    write_file(tmp_path / "a.ckpt", mindspore_pieces(lazy | {"bf16": LazyTensor("bfloat16", (3, 4), lambda: bits)}))
    assert_bits(tmp_path / "a.ckpt", ARRAYS | {"bf16": bits})


@pytest.mark.parametrize("name", ["a_image_b1", "c_text_only"])
def test_a_model_goes_through_mindspore_and_back(name: str, load_golden: Callable[[str], Any], tmp_path: Path) -> None:
    """Converted, loaded and saved again by MindSpore with its checksum, and converted back: the same model."""
    directory = load_golden(name).directory
    ours = convert(directory.path, tmp_path / "ours", to="mindformers").output
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for file in FILES:
        loaded = ms.load_checkpoint(str(ours / file))
        ms.save_checkpoint(
            [{"name": key, "data": value} for key, value in loaded.items()], str(theirs / file), crc_check=True
        )
    (theirs / "visualglm_config.json").write_bytes((ours / "visualglm_config.json").read_bytes())
    convert(theirs, tmp_path / "again")
    assert open_model_directory(tmp_path / "again").fingerprint == directory.fingerprint
