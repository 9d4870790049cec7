from pathlib import Path

import numpy as np
import pytest

from visualglm.checkpoint import tensors
from visualglm.checkpoint.tensors import LazyTensor, StoredTensor, Tensor
from visualglm.errors import CheckpointError

VALUES = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(24, 5)
PER_HEAD = VALUES.reshape(2, 3, 4, 5).transpose(1, 0, 2, 3).reshape(24, 5)


@pytest.fixture(params=["stored", "lazy"])
def tensor(request: pytest.FixtureRequest, tmp_path: Path) -> Tensor:
    if request.param == "lazy":
        return LazyTensor("float32", VALUES.shape, lambda: VALUES)
    path = tmp_path / "weights"
    path.write_bytes(b"head" + VALUES.tobytes() + b"tail")
    return StoredTensor.contiguous(path, "float32", VALUES.shape, 4)


@pytest.fixture(params=[4 << 20, 40, 7])
def piece_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "PIECE_BYTES", request.param)


def check(tensor: Tensor, expected: np.ndarray) -> None:
    assert tensor.shape == expected.shape
    np.testing.assert_array_equal(tensor.array(), expected)
    assert b"".join(tensor.pieces()) == expected.tobytes()


@pytest.mark.usefixtures("piece_bytes")
def test_regrouping_reorders_the_first_axis_and_back(tensor: Tensor) -> None:
    check(tensor, VALUES)
    regrouped = tensor.regrouped((2, 3, 4), (1, 0, 2))
    check(regrouped, PER_HEAD)
    check(regrouped.regrouped((3, 2, 4), (1, 0, 2)), VALUES)


@pytest.mark.usefixtures("piece_bytes")
def test_a_transposed_tensor_is_read_in_row_major_order(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(VALUES.tobytes())
    check(StoredTensor(path, "float32", (5, 24), 0, (5, 24), (1, 5)), VALUES.T)


def test_writing_to_a_mapped_array_changes_no_file(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(VALUES.tobytes())
    StoredTensor.contiguous(path, "float32", VALUES.shape, 0).array()[:] = 0
    assert path.read_bytes() == VALUES.tobytes()


def test_a_scalar_and_an_empty_tensor(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(VALUES.tobytes())
    check(StoredTensor.contiguous(path, "float32", (), 4), np.array(1, np.float32))
    check(StoredTensor.contiguous(path, "float32", (0, 3), 0), np.empty((0, 3), np.float32))


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"\0" * 100)
    stored = StoredTensor.contiguous(path, "float32", (30,), 0)
    with pytest.raises(CheckpointError, match="shorter while it was read"):
        list(stored.pieces())
    with pytest.raises(CheckpointError, match="cannot be mapped"):
        stored.array()


def test_a_computed_tensor_must_be_as_announced() -> None:
    with pytest.raises(CheckpointError, match=r"announced as float16 \[24, 5\] was computed as float32"):
        LazyTensor("float16", VALUES.shape, lambda: VALUES).array()
