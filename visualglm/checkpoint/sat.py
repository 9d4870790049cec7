"""Archives of SwissArmyTransformer: a folder with `model_config.json`, `latest`, and one torch file under its tag."""

from __future__ import annotations

import json
import re
from pathlib import Path

from visualglm.checkpoint.contents import Checkpoint
from visualglm.checkpoint.files import is_plain_name, read_json_object, write_file
from visualglm.checkpoint.foreign import TOKENIZER, ForeignFormat
from visualglm.checkpoint.foreign_config import SAT_CONFIG, Values
from visualglm.checkpoint.keys import SAT_KEYS
from visualglm.checkpoint.manifest import Layout
from visualglm.checkpoint.model_dir import write_side_files
from visualglm.checkpoint.pickle_reader import read_torch_archive
from visualglm.checkpoint.pickle_writer import write_torch_archive
from visualglm.checkpoint.progress import ByteProgress
from visualglm.checkpoint.tensors import StoredTensor
from visualglm.errors import CheckpointError

SAT = ForeignFormat("sat", SAT_KEYS, SAT_CONFIG)
_LATEST = "latest"
_TAG = "1"
_WEIGHTS = "mp_rank_00_model_states.pt"
_STATE_DICT = "module"
_ADAPTER_NAME = re.compile(r".+\.matrix_[AB]\.\d+|mixins\.ptuning\.prefix\.\d+")


def read_sat(path: Path) -> Checkpoint:
    """The SAT archive in folder `path`; raises `CheckpointError` if it is incomplete, not of VisualGLM, or holds what
    fine-tuning added to a model."""
    values = read_json_object(path / SAT_CONFIG.file_name)
    found = read_state(path)
    if any(map(is_adapter_name, found)):
        raise CheckpointError(
            f"{path} holds an adapter (LoRA or P-tuning), which is converted by itself: "
            f"`visualglm convert {path} OUT --base MODEL`."
        )
    return SAT.adopt(path, values, found, layout_of(values))


def read_state(path: Path) -> dict[str, StoredTensor]:
    """All tensors of an archive, or of one of its weight files; raises `CheckpointError` if it is incomplete."""
    weights = path if path.is_file() else path / _latest_tag(path) / _WEIGHTS
    return read_torch_archive(weights, inside=_STATE_DICT)


def is_adapter_name(name: str) -> bool:
    """Whether a tensor of that name was added by fine-tuning."""
    return bool(_ADAPTER_NAME.fullmatch(name))


def write_sat(folder: Path, checkpoint: Checkpoint, progress: ByteProgress) -> None:
    """Write a SAT archive into an empty folder; `OSError` if that fails."""
    values = SAT.foreign_config(checkpoint)
    (folder / _TAG).mkdir()
    tensors = SAT.foreign_tensors(checkpoint, layout_of(values))
    write_torch_archive(folder / _TAG / _WEIGHTS, tensors, progress, inside=_STATE_DICT)
    write_file(folder / SAT_CONFIG.file_name, [json.dumps(values, indent=4).encode()])
    write_file(folder / _LATEST, [_TAG.encode()])
    write_side_files(folder, checkpoint, TOKENIZER)


def layout_of(values: Values) -> Layout:
    """An inference: archives from before July 2023 pack q, k and v head by head, and name no pad token."""
    return "thirds" if "pad_token_id" in values else "per_head"


def _latest_tag(path: Path) -> str:
    try:
        tag = (path / _LATEST).read_text("utf-8").strip()
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path / _LATEST}, which names the folder of the weights, is missing or unreadable; get the archive again."
        ) from error
    if not tag:
        raise CheckpointError(f"{path / _LATEST} is empty and should name the weights' folder; get the archive again.")
    if not is_plain_name(tag):
        raise CheckpointError(f"{path / _LATEST} names a folder outside the archive, {tag[:80]!r}; do not use it.")
    return tag
