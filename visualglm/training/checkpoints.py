"""Training checkpoints: a folder a step, written beside and renamed, so that one with its final name is whole."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from visualglm.errors import CheckpointError

_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class TrainingState:
    """What a run needs to go on as if it had never stopped: named groups of tensors, and plain values."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    values: Mapping[str, Any]


def save_checkpoint(folder: Path, state: TrainingState, *, keep: int = 2) -> Path:
    """Write `folder/step-NNNNNNNN`, remove all but the newest `keep`; `CheckpointError` if the disk is full."""
    final = folder / f"step-{state.step:08d}"
    beside = folder / f".{final.name}.part"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        for group, tensors in state.tensors.items():
            save_file(
                {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
                beside / f"{group}.safetensors",
            )
        (beside / "state.json").write_text(json.dumps({"step": state.step, **state.values}), "utf-8")
        for path in beside.iterdir():
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(beside, final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise CheckpointError(
            f"The checkpoint {final} could not be written ({error}); free some space and resume from the one before it."
        ) from error
    for old in checkpoint_folders(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoint_folders(folder: Path) -> list[Path]:
    """All whole checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def load_checkpoint(path: Path) -> TrainingState:
    """Read one checkpoint. Raises `CheckpointError` if a file is damaged."""
    try:
        values = json.loads((path / "state.json").read_text("utf-8"))
        tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
        return TrainingState(int(values.pop("step")), tensors, values)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"The checkpoint {path} is damaged ({error}); remove it to resume from an older one."
        ) from error


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's per-parameter tensors under flat names, `index.name`."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, slots in state.items() for name, value in slots.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `flatten_optimizer` took."""
    slots: dict[int, dict[str, Tensor]] = {}
    for flat, value in tensors.items():
        index, name = flat.split(".", 1)
        slots.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
