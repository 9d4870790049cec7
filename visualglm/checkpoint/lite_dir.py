"""The lite directory: a model as ONNX graphs, with its configuration, its tokenizer and a manifest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveInt

from visualglm.checkpoint.export_dir import (
    ExportManifest,
    checked_tokenizer,
    finish_export,
    is_export,
    read_small,
    read_unchanged,
    staged_export,
)
from visualglm.checkpoint.files import checked_path
from visualglm.checkpoint.listed_files import (
    open_manifest,
    require_listed,
    require_sizes,
    require_small_unchanged,
    verify_files,
)
from visualglm.checkpoint.manifest import ONNX_EXPORT
from visualglm.checkpoint.model_dir import CONFIG, ModelDirectory
from visualglm.checkpoint.onnx_file import DATA_SUFFIX, check_external_data
from visualglm.checkpoint.progress import Report
from visualglm.config import VisualGLMConfig
from visualglm.errors import CheckpointError
from visualglm.memory import BYTES_PER_ELEMENT, CacheType, MemoryEstimate, estimate_lite_memory

Precision = Literal["fp32", "fp16", "int8", "int4"]
"""Of the decoder's linear layers."""
Graph = Literal["vision_encoder", "embed_tokens", "decoder"]
GRAPHS: tuple[Graph, ...] = ("vision_encoder", "embed_tokens", "decoder")


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


class LiteManifest(LiteForm, ExportManifest):
    """The manifest of a lite directory."""

    kind = ONNX_EXPORT

    format: Literal["visualglm-onnx"] = "visualglm-onnx"


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
        return read_small(self.graph(name))

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
    return is_export(path, ONNX_EXPORT)


def open_lite_directory(path: Path | str, *, hash_weights: bool = True) -> LiteDirectory:
    """Open and check a lite directory: all but the hashes of large weights (see `verify_lite`).

    hash_weights: False for weights that are as much to be relied on as this program itself. Raises `CheckpointError` if
    it is none or of a newer version, files are missing, cut short or not as they were written, the tokenizer is another
    one, or a graph asks for weights that do not lie in its own data file; `ConfigError` if the configuration is not
    valid. Links to files are followed, as caches of downloads have them.
    """
    path = checked_path(path)
    manifest = open_manifest(path, LiteManifest)
    tokenizer_path = checked_tokenizer(path, manifest)
    require_sizes(path, manifest)
    require_listed(path, manifest, [CONFIG, *map(_graph_file, GRAPHS)])
    read_unchanged(path / CONFIG, manifest)
    for name in GRAPHS:
        data = manifest.files.get(_data_file(name))
        graph = path / _graph_file(name)
        if data:
            _require_neighbours(graph, path / _data_file(name))
        check_external_data(graph, read_unchanged(graph, manifest), data.size if data else None)
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
    with staged_export(path, model, LiteManifest, needed_bytes=needed_bytes, force=force) as folder:
        finish_export(folder, model, LiteManifest, fill(folder), report)
        open_lite_directory(folder)
    return open_lite_directory(path)


def _require_neighbours(graph: Path, data: Path) -> None:
    """ONNX Runtime takes weights from the folder only that the graph really lies in."""
    if graph.resolve().parent != data.resolve().parent:
        raise CheckpointError(
            f"{data} is a link to another folder than {graph.name} lies in, where weights are not looked for; "
            "put the file itself there."
        )


def _graph_file(name: Graph) -> str:
    return f"{name}.onnx"


def _data_file(name: Graph) -> str:
    return _graph_file(name) + DATA_SUFFIX
