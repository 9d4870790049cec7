"""The model directory: configuration, weights, tokenizer and a manifest with the hash of every file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

from visualglm.checkpoint.checks import check_tensors
from visualglm.checkpoint.contents import Checkpoint
from visualglm.checkpoint.files import checked_path, file_pieces, require_file, staged_folder, write_file
from visualglm.checkpoint.listed_files import (
    open_manifest,
    require_listed,
    require_sizes,
    require_small_unchanged,
    verify_files,
)
from visualglm.checkpoint.manifest import MANIFEST, FileRecord, Manifest
from visualglm.checkpoint.progress import ByteProgress, Report
from visualglm.checkpoint.replaceable import require_replaceable
from visualglm.checkpoint.safetensors_file import read_safetensors, safetensors_pieces
from visualglm.checkpoint.shards import index_json, read_sharded, split_into_shards
from visualglm.checkpoint.tensors import Piece, StoredTensor, Tensor
from visualglm.config import VisualGLMConfig
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
    tensors: Mapping[str, Tensor]
    extras: Mapping[str, StoredTensor]
    tokenizer_path: Path | None

    @property
    def fingerprint(self) -> str:
        """Identifies configuration and weights; see `Manifest.fingerprint`."""
        return self.manifest.fingerprint

    @property
    def weights_bytes(self) -> int:
        """Size of all tensors."""
        return self.checkpoint.size_bytes

    @property
    def checkpoint(self) -> Checkpoint:
        """Its contents, to be written elsewhere or in another format."""
        return Checkpoint(
            config=self.config,
            tensors=self.tensors,
            source=self.manifest.source,
            extras=self.extras,
            tokenizer_path=self.tokenizer_path,
            license_text=license_of(self.path),
        )


def open_model_directory(path: Path | str, *, hash_weights: bool = True) -> ModelDirectory:
    """Open and check a model directory, except for the hashes of large weights (see `verify`).

    hash_weights: False for weights that are as much to be relied on as this program itself. Raises `CheckpointError` if
    it is none, files are missing, cut short or git-lfs pointers, or its tensors are not exactly those its configuration
    asks for; `ConfigError` if the configuration is not valid.
    """
    path = checked_path(path)
    manifest = open_manifest(path, Manifest)
    require_sizes(path, manifest)
    config = VisualGLMConfig.from_file(path / CONFIG)
    tensors = read_weights(path, config)
    weights = sorted({tensor.path.name for tensor in tensors.values()})
    require_listed(path, manifest, [CONFIG, *weights])
    if hash_weights:
        require_small_unchanged(path, manifest, weights)
    return ModelDirectory(
        path=path,
        config=config,
        manifest=manifest,
        tensors={name: tensors[name] for name in parameter_shapes(config)},
        extras=read_safetensors(path / EXTRAS) if EXTRAS in manifest.files else {},
        tokenizer_path=tokenizer_of(path),
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
    return verify_files(checked_path(path), Manifest, report)


def staged_checkpoint(
    path: Path | str, checkpoint: Checkpoint, *, force: bool, repeated_bytes: int = 0
) -> AbstractContextManager[Path]:
    """The folder that becomes `path`, with room for `checkpoint` in any format; see `staged_folder`.

    repeated_bytes: of tensors that the format has in more than one place.
    """
    needed = checkpoint.size_bytes + repeated_bytes + _OVERHEAD_BYTES
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
    write_file(folder / MANIFEST, [manifest.to_json()])


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


def tokenizer_of(path: Path) -> Path | None:
    """The tokenizer in a folder, which may have been added after the manifest was written."""
    tokenizer = path / TOKENIZER
    if not tokenizer.exists():
        return None
    require_file(tokenizer)
    return tokenizer


def license_of(path: Path) -> str | None:
    """The licence text in a folder."""
    license_path = path / LICENSE
    return license_path.read_text("utf-8", "replace") if license_path.is_file() else None


def read_weights(path: Path, config: VisualGLMConfig) -> dict[str, StoredTensor]:
    """The tensors of a model directory; raises `CheckpointError` unless they are those that `config` asks for."""
    index, single = path / INDEX, path / "".join(WEIGHTS)
    tensors = read_sharded(index, read_safetensors) if index.exists() else read_safetensors(single)
    check_tensors(path, tensors, parameter_shapes(config))
    return tensors
