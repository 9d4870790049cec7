"""Training checkpoints: a folder a step, written beside and renamed, so that one with its final name is whole."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from visualglm.checkpoint.files import file_pieces, hash_pieces
from visualglm.errors import CheckpointError

_NAME = re.compile(r"step-(\d{8})")
_OWN = re.compile(r"(.+)-of-rank-(\d+)")
_STATE = "state.json"

Groups = Mapping[str, Mapping[str, NDArray[Any]]]
"""Named groups of named arrays, each group a file."""


@dataclass(frozen=True)
class TrainingState:
    """What a run needs to go on as if it had never stopped.

    tensors: what all processes have alike, or the first one alone. own: what each process has for itself.
    values: whatever JSON can hold.
    """

    step: int
    tensors: Groups
    values: Mapping[str, Any]
    own: Groups = field(default_factory=dict)


def save_checkpoint(
    folder: Path, state: TrainingState, *, keep: int = 2, rank: int = 0, wait: Callable[[], None] = lambda: None
) -> Path:
    """Write `folder/step-NNNNNNNN`, remove all but the newest `keep`; `CheckpointError` if the disk is full.

    All processes of a run call it with their `rank` and a `wait` that returns when all are there.
    """
    final = folder / f"step-{state.step:08d}"
    beside = folder / f".{final.name}.part"
    try:
        if rank == 0:
            _clear_hidden(folder)
            beside.mkdir(parents=True)
        wait()
        own = {f"{group}-of-rank-{rank}": tensors for group, tensors in state.own.items()}
        for group, tensors in ({**state.tensors, **own} if rank == 0 else own).items():
            _write(beside / f"{group}.safetensors", tensors)
        wait()
        if rank == 0:
            _finish(beside, final, state)
    except (OSError, SafetensorError) as error:
        if rank == 0:
            shutil.rmtree(beside, ignore_errors=True)
        raise CheckpointError(
            f"The checkpoint {final} could not be written ({error}); make room, or allow larger files, and resume: "
            "it goes on from the one before, or begins again if there is none."
        ) from error
    if rank == 0:
        for old in checkpoint_folders(folder)[:-keep]:
            _remove(old)
    return final


def checkpoint_folders(folder: Path) -> list[Path]:
    """All whole checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def read_values(path: Path) -> dict[str, Any]:
    """The values of a checkpoint, and its `step`; raises `CheckpointError` if it is damaged."""
    values, _ = _read_state(path)
    return values


def load_checkpoint(path: Path, rank: int = 0) -> TrainingState:
    """Read one checkpoint, as the process `rank` needs it. Raises `CheckpointError` if a file is damaged."""
    values, hashes = _read_state(path)
    tensors: dict[str, Mapping[str, NDArray[Any]]] = {}
    own: dict[str, Mapping[str, NDArray[Any]]] = {}
    try:
        for file in sorted(path.glob("*.safetensors")):
            belongs = _OWN.fullmatch(file.stem)
            if belongs is None:
                tensors[file.stem] = _read(file, hashes)
            elif int(belongs[2]) == rank:
                own[belongs[1]] = _read(file, hashes)
    except (OSError, ValueError, SafetensorError) as error:
        raise _damaged(path, error) from error
    return TrainingState(values.pop("step"), tensors, values, own)


def _write(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    save_file({name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}, path)
    _sync(path)


def _read_state(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The values, and the SHA-256 of each file by its name."""
    try:
        values = json.loads((path / _STATE).read_text("utf-8"))
        hashes = dict(values.pop("files").items())
        missing = [name for name in hashes if not (path / name).is_file()]
        if missing:
            raise ValueError(f"{missing[0]} is missing")
        return {**values, "step": int(values["step"])}, hashes
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error


def _read(path: Path, hashes: Mapping[str, str]) -> Mapping[str, NDArray[Any]]:
    """Two bits that are others would go unseen, and change what is learnt."""
    if hash_pieces(file_pieces(path)) != hashes.get(path.name):
        raise ValueError(f"{path.name} is not what the run wrote")
    tensors: Mapping[str, NDArray[Any]] = load_file(path)
    return tensors


def _finish(beside: Path, final: Path, state: TrainingState) -> None:
    files = {path.name: hash_pieces(file_pieces(path)) for path in sorted(beside.iterdir())}
    state_file = beside / _STATE
    state_file.write_text(json.dumps({"step": state.step, "files": files, **state.values}), "utf-8")
    _sync(state_file)
    _sync(beside)
    if final.exists():
        _remove(final)
    os.replace(beside, final)
    _sync(final.parent)


def _remove(checkpoint: Path) -> None:
    """Not under its name: half of a checkpoint must never look like one."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old")
    os.replace(checkpoint, hidden)
    shutil.rmtree(hidden)


def _clear_hidden(folder: Path) -> None:
    """What a process that was killed has left."""
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"The checkpoint {path} is damaged ({error}); remove it to resume from an older one.")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
