"""The model directory: configuration, weights, tokenizer and a manifest with the hash of every file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

from visualglm.checkpoint.checks import check_tensors, listed
from visualglm.checkpoint.contents import Checkpoint
from visualglm.checkpoint.files import (
    checked_path,
    file_pieces,
    hash_pieces,
    require_file,
    require_folder,
    staged_folder,
    write_file,
)
from visualglm.checkpoint.manifest import MANIFEST, FileRecord, Manifest
from visualglm.checkpoint.progress import ByteProgress, Report
from visualglm.checkpoint.replaceable import require_replaceable
from visualglm.checkpoint.safetensors_file import read_safetensors, safetensors_pieces
from visualglm.checkpoint.shards import index_json, read_sharded, split_into_shards
from visualglm.checkpoint.tensors import Piece, StoredTensor
from visualglm.config import VisualGLMConfig
from visualglm.errors import CheckpointError
from visualglm.parameters import parameter_shapes

CONFIG = "config.json"
WEIGHTS = ("model", ".safetensors")
INDEX = "model.safetensors.index.json"
EXTRAS = "extras.safetensors"
TOKENIZER = "tokenizer.model"
LICENSE = "WEIGHTS_LICENSE.txt"

_OVERHEAD_BYTES = 1_000_000


@dataclass(frozen=True)
class ModelDirectory:
    """An opened model directory; nothing but headers has been read.

    `tensors` maps each name of `parameter_shapes(config)` to its place; `tensors[name].array()` maps it into memory.
    """

    path: Path
    config: VisualGLMConfig
    manifest: Manifest
    tensors: Mapping[str, StoredTensor]
    extras: Mapping[str, StoredTensor]
    tokenizer_path: Path | None

    @property
    def fingerprint(self) -> str:
        """Identifies configuration and weights; see `Manifest.fingerprint`."""
        return self.manifest.fingerprint

    @property
    def checkpoint(self) -> Checkpoint:
        """Its contents, to be written elsewhere or in another format."""
        license_path = self.path / LICENSE
        return Checkpoint(
            config=self.config,
            tensors=self.tensors,
            source=self.manifest.source,
            extras=self.extras,
            tokenizer_path=self.tokenizer_path,
            license_text=license_path.read_text("utf-8", "replace") if license_path.is_file() else None,
        )


def open_model_directory(path: Path | str) -> ModelDirectory:
    """Open and check a model directory, except for its hashes (see `verify`).

    Raises `CheckpointError` if it is none, files are missing, cut short or git-lfs pointers, or its tensors are not
    exactly those its configuration asks for; `ConfigError` if the configuration is not valid.
    """
    path = checked_path(path)
    manifest = _read_manifest(path)
    config = VisualGLMConfig.from_file(path / CONFIG)
    tensors = read_weights(path, config)
    _check_listed(manifest, path, [CONFIG, *sorted({tensor.path.name for tensor in tensors.values()})])
    return ModelDirectory(
        path=path,
        config=config,
        manifest=manifest,
        tensors={name: tensors[name] for name in parameter_shapes(config)},
        extras=read_safetensors(path / EXTRAS) if EXTRAS in manifest.files else {},
        tokenizer_path=_tokenizer(path),
    )


def write_model_directory(
    path: Path | str, checkpoint: Checkpoint, *, force: bool = False, report: Report | None = None
) -> ModelDirectory:
    """Write `checkpoint` as a model directory that appears under `path` whole or not at all.

    Raises `CheckpointError` if the tensors do not fit the configuration (before anything is written), `path` is in
    use (a model directory is replaced with `force`), or the disk fills up.
    """
    check_tensors(Path(path), checkpoint.tensors, parameter_shapes(checkpoint.config))
    progress = ByteProgress(checkpoint.size_bytes, report)
    with staged_checkpoint(path, checkpoint, force=force) as folder:
        fill_model_directory(folder, checkpoint, progress)
    return open_model_directory(path)


def verify(path: Path | str, report: Report | None = None) -> Manifest:
    """Hash every file again; raises `CheckpointError` naming those that are missing or not as they were written."""
    path = checked_path(path)
    manifest = _read_manifest(path)
    progress = ByteProgress(sum(record.size for record in manifest.files.values()), report)
    hashes = progress.run(partial(hash_pieces, progress.track(file_pieces(path / name))) for name in manifest.files)
    damaged = [
        name for (name, record), found in zip(manifest.files.items(), hashes, strict=True) if found != record.sha256
    ]
    if damaged:
        raise CheckpointError(f"{path} is damaged: {listed(damaged)} changed since it was written; convert it again.")
    return manifest


def staged_checkpoint(path: Path | str, checkpoint: Checkpoint, *, force: bool) -> AbstractContextManager[Path]:
    """The folder that becomes `path`, with room for `checkpoint` in any format; see `staged_folder`."""
    needed = checkpoint.size_bytes + _OVERHEAD_BYTES
    if checkpoint.tokenizer_path:
        needed += checkpoint.tokenizer_path.stat().st_size
    return staged_folder(checked_path(path), needed_bytes=needed, force=force, require_replaceable=require_replaceable)


def fill_model_directory(folder: Path, checkpoint: Checkpoint, progress: ByteProgress) -> None:
    """Write all files of a model directory into an empty folder; `OSError` if that fails."""
    files = _file_contents(checkpoint)
    hashes = progress.run(partial(write_file, folder / name, progress.track(pieces)) for name, pieces in files.items())
    manifest = Manifest(
        parameter_count=sum(prod(tensor.shape) for tensor in checkpoint.tensors.values()),
        source=checkpoint.source,
        files={
            name: FileRecord(sha256=sha256, size=(folder / name).stat().st_size)
            for name, sha256 in zip(files, hashes, strict=True)
        },
    )
    write_file(folder / MANIFEST, [json.dumps(manifest.model_dump(), indent=2).encode()])


def _file_contents(checkpoint: Checkpoint) -> dict[str, Iterable[Piece]]:
    shards = split_into_shards(checkpoint.tensors, *WEIGHTS)
    files: dict[str, Iterable[Piece]] = {CONFIG: [checkpoint.config.model_dump_json(indent=2).encode()]}
    files |= {name: safetensors_pieces(shard) for name, shard in shards.items()}
    if len(shards) > 1:
        files[INDEX] = [index_json(shards)]
    if checkpoint.extras:
        files[EXTRAS] = safetensors_pieces(checkpoint.extras)
    return files | _side_files(checkpoint, TOKENIZER)


def write_side_files(folder: Path, checkpoint: Checkpoint, tokenizer_name: str) -> None:
    """Write what lies beside the weights in every format."""
    for name, pieces in _side_files(checkpoint, tokenizer_name).items():
        write_file(folder / name, pieces)


def _side_files(checkpoint: Checkpoint, tokenizer_name: str) -> dict[str, Iterable[Piece]]:
    files: dict[str, Iterable[Piece]] = {}
    if checkpoint.tokenizer_path:
        files[tokenizer_name] = file_pieces(checkpoint.tokenizer_path)
    if checkpoint.license_text is not None:
        files[LICENSE] = [checkpoint.license_text.encode()]
    return files


def _read_manifest(path: Path) -> Manifest:
    """The manifest of a model directory all of whose files are there in full length."""
    require_folder(path)
    if not (path / MANIFEST).is_file():
        raise CheckpointError(
            f"{path} has no {MANIFEST}, so it is no model directory; make one with `visualglm convert`."
        )
    manifest = Manifest.from_file(path / MANIFEST)
    missing = [name for name in manifest.files if not (path / name).is_file()]
    if missing:
        raise CheckpointError(f"{path} lacks {listed(missing)}; convert the checkpoint again.")
    for name, record in manifest.files.items():
        require_file(path / name)
        size = (path / name).stat().st_size
        if size != record.size:
            raise CheckpointError(
                f"{path / name} has {size:,} bytes instead of {record.size:,}: it was cut short or changed; "
                "convert the checkpoint again."
            )
    return manifest


def _check_listed(manifest: Manifest, path: Path, names: list[str]) -> None:
    """What makes up the fingerprint must be in the manifest."""
    unlisted = [name for name in names if name not in manifest.files]
    if unlisted:
        raise CheckpointError(f"{path / MANIFEST} does not list {listed(unlisted)}; convert the checkpoint again.")


def _tokenizer(path: Path) -> Path | None:
    """The tokenizer, which may have been added after the manifest was written."""
    tokenizer = path / TOKENIZER
    if not tokenizer.exists():
        return None
    require_file(tokenizer)
    return tokenizer


def read_weights(path: Path, config: VisualGLMConfig) -> dict[str, StoredTensor]:
    """The tensors of a model directory; raises `CheckpointError` unless they are those that `config` asks for."""
    index, single = path / INDEX, path / "".join(WEIGHTS)
    tensors = read_sharded(index, read_safetensors) if index.exists() else read_safetensors(single)
    check_tensors(path, tensors, parameter_shapes(config))
    return tensors
