"""Checkpoints of the original code, in the three formats."""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.typing import NDArray

from visualglm.checkpoint.convert import convert
from visualglm.checkpoint.tensors import LazyTensor

GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.fixture(scope="session")
def goldens() -> Path:
    return GOLDENS


@pytest.fixture
def sat_archive(tmp_path: Path) -> Path:
    """A SAT archive to spoil."""
    return _copy(GOLDENS / "a_image_b1", tmp_path / "sat", "model_config.json", "latest", "1")


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    """A Hugging Face checkpoint to spoil."""
    return _copy(GOLDENS / "a_hf_layout", tmp_path / "hf", "config.json", "pytorch_model.bin")


@pytest.fixture
def model_dir(sat_archive: Path, tmp_path: Path) -> Path:
    """A model directory to spoil, converted from `sat_archive`."""
    return convert(sat_archive, tmp_path / "model").output


@pytest.fixture
def entries() -> Callable[[Path], list[str]]:
    """The sorted names in a folder, hidden ones too."""
    return lambda folder: sorted(path.name for path in folder.iterdir())


@pytest.fixture
def raw_bits() -> Callable[[torch.Tensor], NDArray[Any]]:
    """numpy's array of a torch tensor, bfloat16 as uint16."""
    return _raw_bits


@pytest.fixture
def lazy_tensors() -> Callable[[Mapping[str, torch.Tensor]], dict[str, LazyTensor]]:
    """torch tensors, to be written."""
    return lambda state: {
        name: LazyTensor(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), partial(_raw_bits, tensor))
        for name, tensor in state.items()
    }


def _raw_bits(tensor: torch.Tensor) -> NDArray[Any]:
    bits: NDArray[Any] = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return bits


def _copy(source: Path, target: Path, *names: str) -> Path:
    target.mkdir()
    for name in names:
        copy = shutil.copytree if (source / name).is_dir() else shutil.copy
        copy(source / name, target / name)
    return target
