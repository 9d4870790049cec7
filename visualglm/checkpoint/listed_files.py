"""The files that a manifest lists: whether they are there, whole, and as they were written."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import TypeVar

from visualglm.checkpoint.checks import listed
from visualglm.checkpoint.files import file_pieces, hash_pieces, require_file
from visualglm.checkpoint.instead import no_manifest, require_model_folder
from visualglm.checkpoint.manifest import MANIFEST, FileRecord, FolderKind, FolderManifest
from visualglm.checkpoint.progress import ByteProgress, Report
from visualglm.errors import CheckpointError

M = TypeVar("M", bound=FolderManifest)

# Hashed in the time that it takes to load them, also on processors without instructions for it.
_SMALL_BYTES = 64 * 2**20


def open_manifest(path: Path, manifest_type: type[M]) -> M:
    """The manifest of the folder `path`, which is of that kind and lacks none of its files, though some may be cut
    short; else `CheckpointError`."""
    require_model_folder(path)
    kind = manifest_type.kind
    if not (path / MANIFEST).is_file():
        raise no_manifest(path, kind)
    manifest = manifest_type.from_file(path / MANIFEST)
    missing = [name for name in manifest.files if not (path / name).is_file()]
    if missing:
        raise CheckpointError(f"{path} lacks {listed(missing)}; {kind.remedy}.")
    return manifest


def require_sizes(path: Path, manifest: FolderManifest) -> None:
    """Raises `CheckpointError` unless each file in the folder `path` is as long as `manifest` says."""
    for name, record in manifest.files.items():
        require_size(path / name, record, manifest.kind)


def require_size(path: Path, record: FileRecord, kind: FolderKind) -> None:
    """Raises `CheckpointError` unless the file is there in full length."""
    if not path.exists():
        raise CheckpointError(f"{path} is missing; {kind.remedy}.")
    require_file(path)
    size = path.stat().st_size
    if size != record.size:
        raise CheckpointError(
            f"{path} has {size:,} bytes instead of {record.size:,}: it was cut short or changed; {kind.remedy}."
        )


def require_listed(path: Path, manifest: FolderManifest, names: Collection[str]) -> None:
    """Raises `CheckpointError` if the manifest of the folder `path` leaves out what no such folder can do without."""
    unlisted = [name for name in names if name not in manifest.files]
    if unlisted:
        raise CheckpointError(f"{path / MANIFEST} does not list {listed(unlisted)}; {manifest.kind.remedy}.")


def verify_files(path: Path, manifest_type: type[M], report: Report | None) -> M:
    """Hash every file again; raises `CheckpointError` naming those that are missing or not as they were written."""
    manifest = open_manifest(path, manifest_type)
    require_sizes(path, manifest)
    _require_hashes(path, manifest, list(manifest.files), report)
    return manifest


def require_small_unchanged(path: Path, manifest: FolderManifest, names: Collection[str]) -> None:
    """Raises `CheckpointError` if one of these files is not as it was written; large ones are left to `verify_files`.

    Large are those of more than 64 MiB together.
    """
    if sum(manifest.files[name].size for name in names) <= _SMALL_BYTES:
        _require_hashes(path, manifest, names, None)


def _require_hashes(path: Path, manifest: FolderManifest, names: Collection[str], report: Report | None) -> None:
    hashes = hash_files(path, names, report)
    damaged = [name for name in names if hashes[name] != manifest.files[name].sha256]
    if damaged:
        raise CheckpointError(
            f"{path} is damaged: {listed(damaged)} changed since it was written; {manifest.kind.remedy}."
        )


def hash_files(path: Path, names: Collection[str], report: Report | None) -> dict[str, str]:
    """SHA-256 in hex of each of these files in the folder `path`."""
    progress = ByteProgress(sum((path / name).stat().st_size for name in names), report)
    hashes = progress.run(partial(hash_pieces, progress.track(file_pieces(path / name))) for name in names)
    return dict(zip(names, hashes, strict=True))
