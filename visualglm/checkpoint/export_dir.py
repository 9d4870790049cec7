"""What all export directories have in common: graphs of a model, its configuration, its tokenizer, a manifest."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from visualglm.checkpoint.files import checked_path, read_json_object, staged_folder, write_file
from visualglm.checkpoint.listed_files import hash_files
from visualglm.checkpoint.manifest import MANIFEST, FileRecord, FolderKind, FolderManifest, Sha256
from visualglm.checkpoint.model_dir import CONFIG, TOKENIZER, ModelDirectory, tokenizer_of, write_side_files
from visualglm.checkpoint.progress import Report
from visualglm.checkpoint.replaceable import require_replaceable_as
from visualglm.errors import CheckpointError

M = TypeVar("M", bound="ExportManifest")

# Of what is read whole when a directory is opened; weights lie outside the graphs.
_LARGEST_READ = 64 * 2**20


class ExportManifest(FolderManifest):
    """parameter_count, source and fingerprint are those of the exported model."""

    model_fingerprint: Sha256
    tokenizer_sha256: Sha256 | None


def is_export(path: Path | str, kind: FolderKind) -> bool:
    """Whether a manifest says so; all else is up to what opens it."""
    try:
        return read_json_object(checked_path(path) / MANIFEST).get("format") == kind.format
    except CheckpointError:
        return False


def checked_tokenizer(path: Path, manifest: ExportManifest) -> Path | None:
    """The tokenizer, which may have been added to an export that had none; `CheckpointError` if it is another one."""
    tokenizer = tokenizer_of(path)
    if manifest.tokenizer_sha256 is None:
        return tokenizer
    if tokenizer is None:
        raise CheckpointError(f"{path} lacks its {TOKENIZER}; {manifest.kind.remedy}.")
    if sha256(read_small(tokenizer)).hexdigest() != manifest.tokenizer_sha256:
        raise CheckpointError(
            f"{tokenizer} is not the tokenizer that {path} was exported with (sha256 {manifest.tokenizer_sha256}); "
            f"put that one in its place, or {manifest.kind.remedy}."
        )
    return tokenizer


def read_unchanged(file: Path, manifest: ExportManifest) -> bytes:
    """The content of a small file that the manifest lists; `CheckpointError` if it is not what was written."""
    content = read_small(file)
    if sha256(content).hexdigest() != manifest.files[file.name].sha256:
        raise CheckpointError(f"{file} changed since it was written; {manifest.kind.remedy}.")
    return content


def read_small(file: Path) -> bytes:
    """The content of a file without weights; `CheckpointError` if it cannot be read, or is none of that kind."""
    size = file.stat().st_size
    if size > _LARGEST_READ:
        raise CheckpointError(
            f"{file} has {size:,} bytes, and may have {_LARGEST_READ:,}, since weights lie outside; "
            "export the model again."
        )
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}).") from error


def staged_export(
    path: Path, model: ModelDirectory, manifest_type: type[ExportManifest], *, needed_bytes: int, force: bool
) -> AbstractContextManager[Path]:
    """The folder that becomes `path`; an export of the same kind that nothing else lies beside is replaced with
    `force`. See `staged_folder`. Raises `CheckpointError` if it would lie in that of `model`."""
    if path.resolve().is_relative_to(model.path.resolve()) and path.resolve() != model.path.resolve():
        raise CheckpointError(f"{path} lies in the model that is to be exported, {model.path}; give another folder.")
    replaceable = partial(require_replaceable_as, manifest_type)
    return staged_folder(path, needed_bytes=needed_bytes, force=force, require_replaceable=replaceable)


def finish_export(
    folder: Path, model: ModelDirectory, manifest_type: type[M], form: BaseModel, report: Report | None
) -> M:
    """Write what surrounds the graphs of `model` that are in `folder`: its configuration, its tokenizer, and the
    manifest, which holds the fields of `form` and is given back. `report` is told of the hashing."""
    write_file(folder / CONFIG, [model.config.model_dump_json(indent=2).encode()])
    write_side_files(folder, model.checkpoint, TOKENIZER)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for file in files:
        _sync(file)
    names = [file.relative_to(folder).as_posix() for file in files]
    hashes = hash_files(folder, names, report)
    manifest = manifest_type(
        **form.model_dump(),
        parameter_count=model.manifest.parameter_count,
        source=model.manifest.source,
        model_fingerprint=model.fingerprint,
        tokenizer_sha256=hashes.get(TOKENIZER),
        files={name: FileRecord(sha256=hashes[name], size=(folder / name).stat().st_size) for name in names},
    )
    write_file(folder / MANIFEST, [manifest.to_json()])
    return manifest


def _sync(file: Path) -> None:
    """Bring what was written by others down to the disk."""
    with open(file, "r+b") as opened:
        os.fsync(opened.fileno())
