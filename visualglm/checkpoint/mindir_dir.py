"""The MindIR directory: a model as graphs of MindSpore, with its configuration, its tokenizer and a manifest.

The full and the incremental graph lie in folders that are named as those of the MindFormers recipe. Above a size that
MindSpore decides on, it writes the weights of a graph into a folder beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveInt

from visualglm.checkpoint.export_dir import (
    ExportManifest,
    checked_tokenizer,
    finish_export,
    is_export,
    read_unchanged,
    staged_export,
)
from visualglm.checkpoint.files import checked_path
from visualglm.checkpoint.listed_files import open_manifest, require_listed, require_sizes, require_small_unchanged
from visualglm.checkpoint.manifest import MINDIR_EXPORT
from visualglm.checkpoint.mindir_graph import check_graph
from visualglm.checkpoint.model_dir import CONFIG, ModelDirectory
from visualglm.checkpoint.progress import Report
from visualglm.config import VisualGLMConfig
from visualglm.errors import CheckpointError
from visualglm.memory import CacheType, MemoryEstimate, estimate_lite_memory

MindirPrecision = Literal["fp32", "fp16"]
MindirGraph = Literal["vision_encoder", "full", "inc"]
SUFFIX = ".mindir"
VARIABLES = "_variables"
"""What MindSpore adds to the name of a graph for the folder of its weights; the graph is then called `…_graph`."""
RANK = "rank_0"
CONTEXT = "context.cfg"
"""Options for MindSpore Lite, which users may put beside the manifest."""

_CACHE_TYPES: dict[MindirPrecision, CacheType] = {"fp32": "float32", "fp16": "float16"}


class MindirForm(BaseModel):
    """How the graphs of an export compute, and the shape that every run of them has.

    seq_length: columns of prompt and answer together. batch_size: rows. use_past: whether there is an incremental
    graph. mindspore_version: what made them.
    """

    model_config = ConfigDict(frozen=True)

    precision: MindirPrecision
    seq_length: PositiveInt
    batch_size: PositiveInt
    use_past: bool
    mindspore_version: str

    @property
    def graphs(self) -> tuple[MindirGraph, ...]:
        return ("vision_encoder", "full", "inc") if self.use_past else ("vision_encoder", "full")

    @property
    def title(self) -> str:
        """In words: "fp32, 1 row of 512 tokens, with a KV cache, made by MindSpore 2.10.0"."""
        rows = "1 row" if self.batch_size == 1 else f"{self.batch_size} rows"
        cache = "with a KV cache" if self.use_past else "no KV cache"
        return (
            f"{self.precision}, {rows} of {self.seq_length} tokens, {cache}, made by MindSpore {self.mindspore_version}"
        )

    def folder(self, graph: MindirGraph) -> str:
        """Name of the folder that a graph lies in."""
        if graph == "vision_encoder":
            return f"mindir_{graph}"
        return f"mindir_{graph}_checkpoint_bs_{self.batch_size}_{self.seq_length}"

    def file(self, graph: MindirGraph) -> str:
        """Name of a graph's file, as manifests list it."""
        return f"{self.folder(graph)}/{RANK}_graph{SUFFIX}"


class MindirManifest(MindirForm, ExportManifest):
    """The manifest of a MindIR directory."""

    kind = MINDIR_EXPORT

    format: Literal["visualglm-mindir"] = "visualglm-mindir"


@dataclass(frozen=True)
class MindirDirectory:
    """An opened MindIR directory, whose graphs have not been loaded.

    model_config: that of the model; `config` has the export's length as its window.
    """

    path: Path
    model_config: VisualGLMConfig
    manifest: MindirManifest
    tokenizer_path: Path | None

    @cached_property
    def config(self) -> VisualGLMConfig:
        text = self.model_config.text.model_copy(update={"max_sequence_length": self.manifest.seq_length})
        return self.model_config.model_copy(update={"text": text})

    def graph(self, name: MindirGraph) -> Path:
        return self.path / self.manifest.file(name)

    def require_harmless(self) -> None:
        """Raises `CheckpointError` if a graph has more in it than exports have; see `check_graph`."""
        for name in self.manifest.graphs:
            start = f"{self.manifest.folder(name)}/"
            files = self.manifest.files
            data = {file.removeprefix(start): files[file].size for file in files if file.startswith(start)}
            check_graph(self.graph(name), data)

    @property
    def context_path(self) -> Path | None:
        """The options for MindSpore Lite, if somebody put some there."""
        context = self.path / CONTEXT
        return context if context.is_file() else None

    @property
    def weights_bytes(self) -> int:
        """Size of the graphs and their weights."""
        folders = tuple(f"{self.manifest.folder(graph)}/" for graph in self.manifest.graphs)
        return sum(record.size for name, record in self.manifest.files.items() if name.startswith(folders))

    @property
    def memory(self) -> MemoryEstimate:
        """What it takes to run it: each graph has weights of its own."""
        cache_type = _CACHE_TYPES[self.manifest.precision] if self.manifest.use_past else None
        return estimate_lite_memory(self.config, self.weights_bytes, cache_type, batch_size=self.manifest.batch_size)


def is_mindir_directory(path: Path | str) -> bool:
    """Whether a manifest says so; all else is up to `open_mindir_directory`."""
    return is_export(path, MINDIR_EXPORT)


def open_mindir_directory(path: Path | str) -> MindirDirectory:
    """Open and check a MindIR directory: all but the hashes of large files, which `visualglm check` looks at.

    Raises `CheckpointError` if it is none or of a newer version, files are missing, cut short or not as they were
    written, a link leads the weights of a graph away from it, or the tokenizer is another one; `ConfigError` if the
    configuration is not valid. Other links to files are followed, as caches of downloads have them.
    """
    path = checked_path(path)
    manifest = open_manifest(path, MindirManifest)
    tokenizer_path = checked_tokenizer(path, manifest)
    require_sizes(path, manifest)
    graphs = [manifest.file(graph) for graph in manifest.graphs]
    require_listed(path, manifest, [CONFIG, *graphs])
    read_unchanged(path / CONFIG, manifest)
    require_small_unchanged(path, manifest, graphs)
    require_small_unchanged(path, manifest, [name for name in manifest.files if VARIABLES in name])
    for graph in graphs:
        _require_neighbours(path, graph, manifest)
    return MindirDirectory(path, VisualGLMConfig.from_file(path / CONFIG), manifest, tokenizer_path)


def write_mindir_directory(
    path: Path | str,
    model: ModelDirectory,
    form: MindirForm,
    fill: Callable[[Path], None],
    *,
    needed_bytes: int,
    force: bool = False,
    report: Report | None = None,
) -> MindirDirectory:
    """Write the export of `model` as a MindIR directory that appears under `path` whole or not at all.

    `fill` writes the graphs of `form` into the empty folder that it is given; what surrounds them is written here.
    needed_bytes: room that it takes on the disk. `report` is told of the hashing. Raises `CheckpointError` if `path` is
    in use (such an export that nothing else lies beside is replaced with `force`), or the disk fills up.
    """
    path = checked_path(path)
    with staged_export(path, model, MindirManifest, needed_bytes=needed_bytes, force=force) as folder:
        fill(folder)
        finish_export(folder, model, MindirManifest, form, report)
        open_mindir_directory(folder)
    return open_mindir_directory(path)


def _require_neighbours(path: Path, graph: str, manifest: MindirManifest) -> None:
    """MindSpore takes weights from where the graph really lies."""
    beside = path / graph
    for name in manifest.files:
        place = path / name
        if VARIABLES not in name or not place.is_relative_to(beside.parent):
            continue
        if place.resolve() != beside.resolve().parent / place.relative_to(beside.parent):
            raise CheckpointError(
                f"{place} does not lie beside {beside.name} where links are followed, and weights are not looked for "
                "elsewhere; put the files themselves there."
            )
