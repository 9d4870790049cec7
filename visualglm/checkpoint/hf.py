"""Checkpoints of Hugging Face: `config.json` and weights in one file or several, pickled or safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from visualglm.checkpoint.contents import Checkpoint
from visualglm.checkpoint.files import read_json_object, write_file
from visualglm.checkpoint.foreign import TOKENIZER, ForeignFormat
from visualglm.checkpoint.foreign_config import HF_CONFIG
from visualglm.checkpoint.keys import HF_KEYS
from visualglm.checkpoint.model_dir import write_side_files
from visualglm.checkpoint.pickle_reader import read_torch_archive
from visualglm.checkpoint.pickle_writer import write_torch_archive
from visualglm.checkpoint.progress import ByteProgress
from visualglm.checkpoint.safetensors_file import read_safetensors
from visualglm.checkpoint.shards import index_json, read_sharded, split_into_shards
from visualglm.checkpoint.tensors import StoredTensor
from visualglm.errors import CheckpointError

HF = ForeignFormat("hf", HF_KEYS, HF_CONFIG)
_STEM, _SUFFIX = "pytorch_model", ".bin"
# In the order of preference of Hugging Face itself.
_READERS: dict[str, Callable[[Path], dict[str, StoredTensor]]] = {
    "model.safetensors": read_safetensors,
    _STEM + _SUFFIX: read_torch_archive,
}


def read_hf(path: Path) -> Checkpoint:
    """The checkpoint in folder `path`; raises `CheckpointError` if it is incomplete or not of VisualGLM."""
    return HF.adopt(path, read_json_object(path / HF_CONFIG.file_name), _read_weights(path), "per_head")


def write_hf(folder: Path, checkpoint: Checkpoint, progress: ByteProgress) -> None:
    """Write a checkpoint with `pytorch_model*.bin` into an empty folder; `OSError` if that fails."""
    values = HF.foreign_config(checkpoint)
    shards = split_into_shards(HF.foreign_tensors(checkpoint, "per_head"), _STEM, _SUFFIX)
    progress.run(partial(write_torch_archive, folder / name, tensors, progress) for name, tensors in shards.items())
    if len(shards) > 1:
        write_file(folder / _index(_STEM + _SUFFIX), [index_json(shards)])
    write_file(folder / HF_CONFIG.file_name, [json.dumps(values, indent=2).encode()])
    write_side_files(folder, checkpoint, TOKENIZER)


def _read_weights(path: Path) -> dict[str, StoredTensor]:
    for name, read in _READERS.items():
        if (path / _index(name)).is_file():
            return read_sharded(path / _index(name), read)
        if (path / name).is_file():
            return read(path / name)
    wanted = ", ".join(file_name for name in _READERS for file_name in (name, _index(name)))
    raise CheckpointError(f"{path} has no weights: none of {wanted} is there; get the checkpoint again.")


def _index(name: str) -> str:
    return f"{name}.index.json"
