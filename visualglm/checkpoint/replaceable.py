"""Which folders `--force` may delete: those of the wanted kind that hold nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath

from visualglm.checkpoint.files import read_json_object, readable
from visualglm.checkpoint.foreign_config import HF_CONFIG, SAT_CONFIG
from visualglm.checkpoint.manifest import MANIFEST, MODEL, FolderKind, FolderManifest, Manifest, kind_of
from visualglm.checkpoint.mindformers_keys import GLM, QFORMER, VIT
from visualglm.errors import CheckpointError

_LATEST = "latest"
_BESIDE = r"|ice_text\.model|WEIGHTS_LICENSE\.txt"
_SAT_FILES = re.compile(r"model_config\.json|latest" + _BESIDE)
_SAT_WEIGHTS = re.compile(r"mp_rank_\d+_model_states\.pt")
_MINDFORMERS_FILES = re.compile(
    r"visualglm_(vit|qformer)\.ckpt|glm_6b(_for_lite)?\.ckpt|visualglm_config\.json|SHA256SUMS" + _BESIDE
)
_HF_WEIGHTS = re.compile(r"(pytorch_model|model)(-\d+-of-\d+)?\.(bin|safetensors)(\.index\.json)?")
_HF_FILES = re.compile(rf"config\.json|{_HF_WEIGHTS.pattern}{_BESIDE}")


def require_replaceable(folder: Path) -> None:
    """Raises `CheckpointError` unless `folder` is a checkpoint and every file in it belongs to one."""
    _require_nothing_else(folder, _format_of, MODEL, "checkpoint")


def require_replaceable_as(manifest_type: type[FolderManifest], folder: Path) -> None:
    """Raises `CheckpointError` unless `folder` has such a manifest and holds nothing but what that lists."""
    kind = manifest_type.kind
    _require_nothing_else(folder, partial(_listed_in, manifest_type), kind, kind.name)


def _require_nothing_else(
    folder: Path, format_of: Callable[[Path], Callable[[Path], bool]], kind: FolderKind, name: str
) -> None:
    found = kind_of(folder)
    if found and found is not kind:
        raise CheckpointError(
            f"{folder} is not replaced, because it is {found.title} and not {kind.title}; "
            "give another folder, or remove this one first."
        )
    try:
        belongs = format_of(folder)
        foreign = next((path for path in sorted(folder.iterdir()) if not belongs(path)), None)
    except CheckpointError as error:
        raise CheckpointError(f"{folder} is not replaced, because it is no whole {name}: {error}") from error
    if foreign is not None:
        entry = readable(foreign.name)
        raise CheckpointError(f"{folder} holds {entry}, which is no part of the {name}; it is not replaced.")


def _format_of(folder: Path) -> Callable[[Path], bool]:
    """What tells whether an entry of `folder` belongs to the checkpoint there."""
    if (folder / MANIFEST).is_file():
        return _listed_in(Manifest, folder)
    if (folder / SAT_CONFIG.file_name).is_file() and (folder / _LATEST).is_file():
        tag = _tag(folder)
        return lambda path: _matches(_SAT_FILES, path) or (path.name == tag and _holds_only_weights(path))
    if all((folder / name).is_file() for name in (VIT, QFORMER, GLM)):
        return lambda path: _matches(_MINDFORMERS_FILES, path)
    if _is_hf(folder):
        return lambda path: _matches(_HF_FILES, path)
    raise CheckpointError("it has neither a manifest nor the files of a VisualGLM checkpoint.")


def _listed_in(manifest_type: type[FolderManifest], folder: Path) -> Callable[[Path], bool]:
    names = {*manifest_type.from_file(folder / MANIFEST).files, MANIFEST, "tokenizer.model"}
    folders = {parent.as_posix() for name in names for parent in PurePosixPath(name).parents}

    def belongs(path: Path) -> bool:
        name = path.relative_to(folder).as_posix()
        if _is_file(path):
            return name in names
        return name in folders and all(map(belongs, path.iterdir()))

    return belongs


def _is_hf(folder: Path) -> bool:
    if not (folder / HF_CONFIG.file_name).is_file():
        return False
    values = read_json_object(folder / HF_CONFIG.file_name)
    has_weights = any(_HF_WEIGHTS.fullmatch(path.name) for path in folder.iterdir())
    return has_weights and {HF_CONFIG.vision_section, HF_CONFIG.qformer_section} <= values.keys()


def _tag(folder: Path) -> str:
    """The folder of a SAT archive's weights; it need not be there."""
    try:
        return (folder / _LATEST).read_text("utf-8").strip()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{_LATEST} cannot be read.") from error


def _holds_only_weights(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and all(_matches(_SAT_WEIGHTS, entry) for entry in path.iterdir())


def _matches(names: re.Pattern[str], path: Path) -> bool:
    return bool(names.fullmatch(path.name)) and _is_file(path)


def _is_file(path: Path) -> bool:
    return path.is_file() or path.is_symlink()
