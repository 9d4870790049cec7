"""The lite directory: a model as ONNX graphs, with its configuration, its tokenizer and a manifest."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveInt

from visualglm.checkpoint.files import checked_path, read_json_object, staged_folder, write_file
from visualglm.checkpoint.listed_files import (
    hash_files,
    open_manifest,
    require_listed,
    require_sizes,
    require_small_unchanged,
    verify_files,
)
from visualglm.checkpoint.manifest import MANIFEST, ONNX_EXPORT, FileRecord, FolderManifest, Sha256
from visualglm.checkpoint.model_dir import (
    CONFIG,
    TOKENIZER,
    ModelDirectory,
    tokenizer_of,
    write_side_files,
)
from visualglm.checkpoint.onnx_file import DATA_SUFFIX, check_external_data
from visualglm.checkpoint.progress import Report
from visualglm.checkpoint.replaceable import require_replaceable_as
from visualglm.config import VisualGLMConfig
from visualglm.errors import CheckpointError
from visualglm.memory import BYTES_PER_ELEMENT, CacheType, MemoryEstimate, estimate_lite_memory

Precision = Literal["fp32", "fp16", "int8", "int4"]
"""Of the decoder's linear layers."""
Graph = Literal["vision_encoder", "embed_tokens", "decoder"]
GRAPHS: tuple[Graph, ...] = ("vision_encoder", "embed_tokens", "decoder")

# Of what is read whole when a directory is opened; weights lie outside the graphs.
_LARGEST_READ = 64 * 2**20


class LiteForm(BaseModel):
    """How the graphs of an export compute.

    kv_cache: type of keys and values, which means nothing without use_past. block_size: weights that share a scale,
    None if they are not quantised. int8_layers: kinds of linear layers that have 8 bits where the others have 4, such
    as "qkv". onnxruntime_version: what was installed when the export was made.
    """

    model_config = ConfigDict(frozen=True)

    precision: Precision
    kv_cache: CacheType
    use_past: bool
    block_size: PositiveInt | None = None
    int8_layers: tuple[str, ...] = ()
    onnxruntime_version: str | None = None

    @property
    def title(self) -> str:
        """In words: "int4 (qkv int8) in blocks of 128, KV cache int8, made beside onnxruntime 1.32.0"."""
        wider = f" ({', '.join(self.int8_layers)} int8)" if self.int8_layers else ""
        facts = [f"{self.precision}{wider} in blocks of {self.block_size}" if self.block_size else self.precision]
        facts.append(f"KV cache {self.kv_cache}" if self.use_past else "no KV cache")
        if self.onnxruntime_version:
            facts.append(f"made beside onnxruntime {self.onnxruntime_version}")
        return ", ".join(facts)


class LiteManifest(LiteForm, FolderManifest):
    """The manifest of a lite directory. parameter_count, source and fingerprint are those of the exported model."""

    kind = ONNX_EXPORT

    format: Literal["visualglm-onnx"] = "visualglm-onnx"
    model_fingerprint: Sha256
    tokenizer_sha256: Sha256 | None


@dataclass(frozen=True)
class LiteDirectory:
    """An opened lite directory, whose graphs have been looked at and whose weights have not."""

    path: Path
    config: VisualGLMConfig
    manifest: LiteManifest
    tokenizer_path: Path | None

    def graph(self, name: Graph) -> Path:
        """The file of a graph; its weights lie beside it."""
        return self.path / _graph_file(name)

    def read_graph(self, name: Graph) -> bytes:
        """A graph without its weights; raises `CheckpointError` if it cannot be read."""
        return _read(self.graph(name))

    @property
    def weights_bytes(self) -> int:
        """Size of the graphs and their data."""
        files = self.manifest.files
        names = [file for name in GRAPHS for file in (_graph_file(name), _data_file(name))]
        return sum(files[name].size for name in names if name in files)

    @property
    def memory(self) -> MemoryEstimate:
        """What it takes to run it on a CPU, where weights that are not quantised are widened to float32."""
        cache_type = self.manifest.kv_cache if self.manifest.use_past else None
        widened = 0 if self.manifest.block_size else self.manifest.parameter_count * BYTES_PER_ELEMENT["float32"]
        return estimate_lite_memory(self.config, max(self.weights_bytes, widened), cache_type)


def is_lite_directory(path: Path | str) -> bool:
    """Whether a manifest says so; all else is up to `open_lite_directory`."""
    try:
        return read_json_object(checked_path(path) / MANIFEST).get("format") == ONNX_EXPORT.format
    except CheckpointError:
        return False


def open_lite_directory(path: Path | str, *, hash_weights: bool = True) -> LiteDirectory:
    """Open and check a lite directory: all but the hashes of large weights (see `verify_lite`).

    hash_weights: False for weights that are as much to be relied on as this program itself. Raises `CheckpointError` if
    it is none or of a newer version, files are missing, cut short or not as they were written, the tokenizer is another
    one, or a graph asks for weights that do not lie in its own data file; `ConfigError` if the configuration is not
    valid. Links to files are followed, as caches of downloads have them.
    """
    path = checked_path(path)
    manifest = open_manifest(path, LiteManifest)
    tokenizer_path = _checked_tokenizer(path, manifest)
    require_sizes(path, manifest)
    require_listed(path, manifest, [CONFIG, *map(_graph_file, GRAPHS)])
    _read_unchanged(path / CONFIG, manifest)
    for name in GRAPHS:
        data = manifest.files.get(_data_file(name))
        graph = path / _graph_file(name)
        if data:
            _require_neighbours(graph, path / _data_file(name))
        check_external_data(graph, _read_unchanged(graph, manifest), data.size if data else None)
    if hash_weights:
        require_small_unchanged(path, manifest, [name for name in map(_data_file, GRAPHS) if name in manifest.files])
    return LiteDirectory(path, VisualGLMConfig.from_file(path / CONFIG), manifest, tokenizer_path)


def verify_lite(path: Path | str, report: Report | None = None) -> LiteManifest:
    """Hash every file again; raises `CheckpointError` naming those that are missing or not as they were written."""
    return verify_files(checked_path(path), LiteManifest, report)


def write_lite_directory(
    path: Path | str,
    model: ModelDirectory,
    fill: Callable[[Path], LiteForm],
    *,
    needed_bytes: int,
    force: bool = False,
    report: Report | None = None,
) -> LiteDirectory:
    """Write the export of `model` as a lite directory that appears under `path` whole or not at all.

    `fill` writes the graphs, their data and what else belongs to them into the empty folder that it is given, and
    tells how they compute; what surrounds them is written here. needed_bytes: room that it takes on the disk. `report`
    is told of the hashing, once `fill` is done. Raises `CheckpointError` if `path` is in use (an export that nothing
    else lies beside is replaced with `force`), the disk fills up, or what was written could not be opened.
    """
    path = checked_path(path)
    replaceable = partial(require_replaceable_as, LiteManifest)
    with staged_folder(path, needed_bytes=needed_bytes, force=force, require_replaceable=replaceable) as folder:
        form = fill(folder)
        write_file(folder / CONFIG, [model.config.model_dump_json(indent=2).encode()])
        write_side_files(folder, model.checkpoint, TOKENIZER)
        manifest = _manifest(folder, model, form, report)
        write_file(folder / MANIFEST, [manifest.to_json()])
        open_lite_directory(folder)
    return open_lite_directory(path)


def _manifest(folder: Path, model: ModelDirectory, form: LiteForm, report: Report | None) -> LiteManifest:
    names = sorted(entry.name for entry in folder.iterdir())
    for name in names:
        _sync(folder / name)
    hashes = hash_files(folder, names, report)
    return LiteManifest(
        **form.model_dump(),
        parameter_count=model.manifest.parameter_count,
        source=model.manifest.source,
        model_fingerprint=model.fingerprint,
        tokenizer_sha256=hashes.get(TOKENIZER),
        files={name: FileRecord(sha256=hashes[name], size=(folder / name).stat().st_size) for name in names},
    )


def _require_neighbours(graph: Path, data: Path) -> None:
    """ONNX Runtime takes weights from the folder only that the graph really lies in."""
    if graph.resolve().parent != data.resolve().parent:
        raise CheckpointError(
            f"{data} is a link to another folder than {graph.name} lies in, where weights are not looked for; "
            "put the file itself there."
        )


def _sync(file: Path) -> None:
    """Bring what was written by others down to the disk."""
    with open(file, "r+b") as opened:
        os.fsync(opened.fileno())


def _graph_file(name: Graph) -> str:
    return f"{name}.onnx"


def _data_file(name: Graph) -> str:
    return _graph_file(name) + DATA_SUFFIX


def _checked_tokenizer(path: Path, manifest: LiteManifest) -> Path | None:
    """The tokenizer, which may have been added to an export that had none."""
    tokenizer = tokenizer_of(path)
    if manifest.tokenizer_sha256 is None:
        return tokenizer
    if tokenizer is None:
        raise CheckpointError(f"{path} lacks its {TOKENIZER}; export the model again.")
    if _sha256(_read(tokenizer)) != manifest.tokenizer_sha256:
        raise CheckpointError(
            f"{tokenizer} is not the tokenizer that {path} was exported with (sha256 {manifest.tokenizer_sha256}); "
            "put that one in its place, or export the model again."
        )
    return tokenizer


def _read_unchanged(file: Path, manifest: LiteManifest) -> bytes:
    """The content of a small file that the manifest lists; `CheckpointError` if it is not what was written."""
    content = _read(file)
    if _sha256(content) != manifest.files[file.name].sha256:
        raise CheckpointError(f"{file} changed since it was written; export the model again.")
    return content


def _read(file: Path) -> bytes:
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


def _sha256(content: bytes) -> str:
    return sha256(content).hexdigest()
