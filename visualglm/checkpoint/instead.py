"""What lies where a model should: folders and files of other kinds that people give, and the way on from each."""

from __future__ import annotations

import shlex
from itertools import islice
from pathlib import Path
from typing import Any

from visualglm.checkpoint.files import checked_path, read_json_object, readable
from visualglm.checkpoint.foreign_config import HF_CONFIG, SAT_CONFIG
from visualglm.checkpoint.manifest import ADAPTER, MANIFEST, FolderKind
from visualglm.checkpoint.mindformers_keys import GLM, QFORMER, VIT
from visualglm.checkpoint.peft_config import PEFT_CONFIG
from visualglm.errors import CheckpointError

_MARKERS = (MANIFEST, SAT_CONFIG.file_name, HF_CONFIG.file_name, GLM, PEFT_CONFIG)
_SOURCE = "convert the SAT archive or the Hugging Face folder of the model"
_WHOLE_FOLDER = "give the folder in which it lies beside its configuration"
# What files are, by the ends of their names or their first bytes, and what to do in their place.
_FILES = {
    ".onnx": ("an ONNX graph without the manifest of an export", "export the model with `visualglm export`"),
    ".mindir": (
        "a MindIR graph without the manifest of an export",
        "give the folder that `visualglm export --format mindir` has made",
    ),
    ".ckpt": (
        "a checkpoint of MindSpore",
        f"give the folder with {VIT}, {QFORMER} and {GLM} to `visualglm convert`, or a file of LoRA with --base MODEL",
    ),
    ".gguf": ("a model for llama.cpp or chatglm.cpp, which cannot be read here", _SOURCE),
    ".zip": ("a packed archive", "unpack it, and give the folder that comes out"),
    ".pt": ("a file of weights", _WHOLE_FOLDER),
    ".bin": ("a file of weights", _WHOLE_FOLDER),
    ".safetensors": ("a file of weights", _WHOLE_FOLDER),
}
_ALIKE = {".ggml": ".gguf", ".tar": ".zip", ".gz": ".zip", ".tgz": ".zip", ".7z": ".zip", ".pth": ".pt"}
_MAGIC = {b"GGUF": ".gguf", b"ggml": ".gguf"}
# Entries of a folder that are looked at; more would be no folder of a model.
_MOST_ENTRIES = 1000


def require_model_folder(path: Path) -> None:
    """Raises `CheckpointError` unless `path` is a folder; a file is named by what it is."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give the folder that holds the checkpoint.")
    if path.is_dir():
        return
    if any((path.parent / marker).is_file() for marker in _MARKERS):
        raise CheckpointError(f"{path} is a file; give the folder that it lies in, {path.parent}.")
    known = _file_kind(path)
    if known:
        raise CheckpointError(f"{path} is {known[0]}; {known[1]}.")
    raise CheckpointError(f"{path} is a file; give the folder that holds the checkpoint.")


def no_manifest(path: Path, wanted: FolderKind) -> CheckpointError:
    """The error for a folder without a manifest in place of one of the kind that is wanted."""
    found = kind_instead(path)
    if found:
        return CheckpointError(f"{path} {found[0]}, and {wanted.title} is needed; {found[1]}.")
    return CheckpointError(f"{path} has no {MANIFEST}, so it is no {wanted.name}; make one with `{wanted.command}`.")


def is_adapter(path: Path | str) -> bool:
    """Whether the folder says that it is one; all else is up to `open_adapter`."""
    path = checked_path(path)
    try:
        return read_json_object(path / MANIFEST).get("format") == ADAPTER.format
    except CheckpointError:
        return (path / PEFT_CONFIG).is_file() and not (path / MANIFEST).exists()


def adapter_inside(path: Path) -> Path | None:
    """An adapter in the folder `path`, as the folder of a run has one."""
    return next(filter(is_adapter, _entries(path)), None)


def kind_instead(path: Path) -> tuple[str, str] | None:
    """What a folder without a manifest is, and what to do in its place; None if it is nothing that is known."""
    entries = _entries(path)
    if not entries:
        return "is empty", "give another folder"
    if holds_graphs(path) and not (path / MANIFEST).exists():
        return f"holds the graphs of an export without its {MANIFEST}", "export the model again"
    known = _checkpoint_kind(path)
    # With a configuration it may be one that has lost its manifest.
    if known or (path / HF_CONFIG.file_name).exists():
        return known
    if (path.parent / SAT_CONFIG.file_name).is_file():
        return "is a folder inside a SAT archive", f"give the archive, {path.parent}"
    return _weights_kind(entries) or _folder_inside(entries)


def holds_graphs(path: Path) -> bool:
    """Whether graphs lie in the folder `path` as exports have them beside a configuration."""
    graphs = (*path.glob("*.onnx"), *path.glob("mindir_*/*.mindir"))
    return bool(graphs) and (path / HF_CONFIG.file_name).is_file()


def _entries(path: Path) -> list[Path]:
    try:
        return sorted(islice(path.iterdir(), _MOST_ENTRIES))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error


def _checkpoint_kind(path: Path) -> tuple[str, str] | None:
    make = f"make one with `visualglm convert {shlex.quote(str(path))} OUT`"
    if (path / SAT_CONFIG.file_name).is_file():
        return "is a SAT archive", make
    if (path / GLM).is_file():
        return "holds the files of MindFormers", make
    if is_adapter(path):
        return "is an adapter", str(ADAPTER.use)
    config = _config(path / HF_CONFIG.file_name)
    if HF_CONFIG.vision_section in config:
        return "is a Hugging Face checkpoint", make
    if "model_type" in config:
        what = readable(str(config.get("model_type")))
        return f"is a Hugging Face folder of another model ({what})", "give one of VisualGLM-6B to `visualglm convert`"
    return None


def _config(file: Path) -> dict[str, Any]:
    try:
        return read_json_object(file)
    except CheckpointError:
        return {}


def _weights_kind(entries: list[Path]) -> tuple[str, str] | None:
    kind = next(filter(None, map(_file_kind, entries)), None)
    return (f"holds {kind[0]}", kind[1]) if kind else None


def _folder_inside(entries: list[Path]) -> tuple[str, str] | None:
    inside = next((entry for entry in entries if any((entry / marker).is_file() for marker in _MARKERS)), None)
    if inside is None:
        return None
    if is_adapter(inside):
        remedy = f"give {inside}, which goes beside its model as --adapter"
        return f"holds a folder with an adapter, {readable(inside.name)}", remedy
    return f"holds a folder with a checkpoint, {readable(inside.name)}", f"give {inside}"


def _file_kind(file: Path) -> tuple[str, str] | None:
    if not file.is_file():
        return None
    suffix = file.suffix.lower()
    return _FILES.get(_MAGIC.get(_start(file)) or _ALIKE.get(suffix, suffix))


def _start(file: Path) -> bytes:
    try:
        with open(file, "rb") as opened:
            return opened.read(4)
    except OSError:
        return b""
