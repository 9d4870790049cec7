"""From a path to a loaded model: what lies there, which backend runs it, and an export of it where that is needed."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

from visualglm.backends.base import Backend
from visualglm.backends.mindir.load import prepare_mindir
from visualglm.backends.mindspore.environment import prepare_mindspore
from visualglm.checkpoint.adapter_dir import AdapterDirectory, open_adapter, require_base
from visualglm.checkpoint.files import checked_path
from visualglm.checkpoint.lite_dir import LiteDirectory, Precision, is_lite_directory, open_lite_directory
from visualglm.checkpoint.merge import MergedDirectory, fingerprint_of_both, merged
from visualglm.checkpoint.mindir_dir import MindirDirectory, is_mindir_directory, open_mindir_directory
from visualglm.checkpoint.model_dir import ModelDirectory, open_model_directory
from visualglm.config import DType, VisualGLMConfig
from visualglm.errors import DeviceError
from visualglm.export_cache import Exporting, cached_export, is_cached
from visualglm.memory import MemoryEstimate, estimate_memory
from visualglm.model import VisualGLM
from visualglm.processing.tokenizer import Tokenizer
from visualglm.signals import held_signals

BUILTIN_NAME = "visualglm-tiny"
BUILTIN_NOTICE = (
    "The built-in model knows only drawn shapes, numbers and short words: "
    "it shows how everything works and is not VisualGLM-6B."
)
BackendName = Literal["auto", "onnx", "torch", "mindspore", "mindir"]
GraphMode = Literal[0, 1]
"""Of MindSpore: 0 compiles the model into graphs, 1 runs it operator by operator."""
DTypeName = Literal["auto", "float32", "bfloat16", "float16", "int8", "int4"]
Exporter = Callable[[ModelDirectory, Precision, Exporting | None], LiteDirectory]
"""What gives the export of a model directory; see `cached_export`."""

# Below this size nothing is gained by whole numbers.
_SMALL_MODEL = 100_000_000
_PRECISIONS: dict[str, Precision] = {"float32": "fp32", "float16": "fp16", "int8": "int8", "int4": "int4"}
_QUANTIZED = ("int8", "int4")
_HALVES = ("bfloat16", "float16")


@dataclass(frozen=True)
class Choice:
    """A model that has been found and looked at, and how it is to be run; nothing is loaded yet."""

    directory: ModelDirectory | LiteDirectory | MindirDirectory
    backend: Literal["onnx", "torch", "mindspore", "mindir"]
    device: str
    dtype: str
    name: str
    tokenizer_path: Path | None
    adapters: Mapping[str, AdapterDirectory] = field(default_factory=dict)
    """By name, the first of them in use; but for torch the one that is merged into `directory`."""
    graph_mode: GraphMode | None = None

    @property
    def config(self) -> VisualGLMConfig:
        return self.directory.config

    @property
    def fingerprint(self) -> str:
        """Of the model, whatever its form, with the adapter that is in use."""
        if isinstance(self.directory, LiteDirectory | MindirDirectory):
            return self.directory.manifest.model_fingerprint
        if isinstance(self.directory, MergedDirectory):
            return self.directory.fingerprint
        used = next(iter(self.adapters.values()), None)
        return fingerprint_of_both(self.directory.fingerprint, used) if used else self.directory.fingerprint

    @property
    def warnings(self) -> list[str]:
        """What users should be told of its adapters."""
        return [adapter.warning for adapter in self.adapters.values() if adapter.warning]

    @property
    def memory(self) -> MemoryEstimate:
        """What it takes; for "auto" that of the weights' own precision, whichever is taken."""
        if isinstance(self.directory, LiteDirectory | MindirDirectory):
            return self.directory.memory
        stored = self.config.dtype
        return estimate_memory(self.config, next((known for known in get_args(DType) if known == self.dtype), stored))

    def load(self, threads: int | None = None) -> VisualGLM:
        """Load it, to compute with so many threads on a CPU (None: as many as the backend takes by itself).

        Raises a `VisualGLMError` if the device is not there, or the memory too small.
        """
        path = self.tokenizer_path
        tokenizer = None if path is None else Tokenizer.for_model(path, self.config.text)
        if isinstance(self.directory, LiteDirectory | MindirDirectory) or self.backend != "torch":
            return VisualGLM(self._load_backend(threads), tokenizer, name=self.name)
        model = VisualGLM(self._load_backend(threads), tokenizer, name=self.name, directory=self.directory)
        for name, adapter in self.adapters.items():
            model.add_adapter(name, adapter)
        model.use_adapter(next(iter(self.adapters), None))
        return model

    def _load_backend(self, threads: int | None) -> Backend:
        if isinstance(self.directory, LiteDirectory):
            from visualglm.backends.onnx.load import load_onnx_backend

            return load_onnx_backend(self.directory, self.device, threads)
        if isinstance(self.directory, MindirDirectory):
            from visualglm.backends.mindir.load import load_mindir_backend

            return load_mindir_backend(self.directory, self.device, threads)
        if self.backend == "mindspore":
            with held_signals():
                from visualglm.backends.mindspore.load import load_mindspore_backend

            compiled = self.graph_mode != 1
            return load_mindspore_backend(self.directory, self.device, self.dtype, compiled=compiled, threads=threads)
        from visualglm.backends.torch.load import load_torch_backend

        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        return load_torch_backend(self.directory, self.device, self.dtype)


def builtin_path() -> Path:
    """Where the built-in model's directory lies in the installed package."""
    return _asset("tiny")


def builtin_export() -> Path:
    """Where the built-in model lies ready for ONNX Runtime."""
    return _asset("tiny-onnx")


def load_model(
    path: str | Path | None,
    *,
    backend: str,
    device: str,
    dtype: str,
    adapter: str | Path | None,
    graph_mode: int | None,
) -> VisualGLM:
    """See `visualglm.load`."""
    adapters = {} if adapter is None else {adapter_name(adapter): adapter}
    choice = choose(path, backend=backend, device=device, dtype=dtype, adapters=adapters, graph_mode=graph_mode)
    for warning in choice.warnings:
        warnings.warn(warning, stacklevel=3)
    return choice.load()


def adapter_name(path: str | Path) -> str:
    """What an adapter is called if it is given no name: as its folder is."""
    return checked_path(path).resolve().name


def choose(
    path: str | Path | None,
    *,
    backend: str,
    device: str,
    dtype: str,
    adapters: Mapping[str, str | Path] | None = None,
    graph_mode: int | None = None,
    exporting: Exporting | None = None,
    exporter: Exporter = cached_export,
) -> Choice:
    """Find what lies at `path` (None: the built-in model) and decide what runs it.

    "auto" is torch on a GPU and onnx on a CPU, and mindspore for "ascend" and where neither is to be had. A directory
    that onnx is to run is exported by `exporter`: once, into the cache. `exporting` gives the context in which the
    progress of that is shown.
    adapters: folders by the names they are to have, the first to be used. onnx and mindspore take one, which is merged
    for them; where there are several, or learned prefixes, "auto" is torch.
    graph_mode: a `GraphMode`; None: 0 for mindspore, and the others have none.
    Raises a `VisualGLMError`.
    """
    _check_known("backend", backend, get_args(BackendName))
    _check_known("precision", dtype, get_args(DTypeName))
    _check_graph_mode(graph_mode, backend)
    found = None if path is None else open_export(path)
    if found is not None:
        if adapters:
            raise DeviceError(
                f"{path} is an export, which takes no adapter; give the model directory that it was made from, "
                "or export that with --adapter."
            )
        return _exported(found, backend, device, dtype)
    if backend == "mindir":
        raise DeviceError(
            f"The mindir backend runs exports only, and {path or 'the built-in model'} is none; make one with "
            "`visualglm export MODEL OUT --format mindir`, or give --backend mindspore."
        )
    # The built-in model is part of the package, whose files were checked when it was installed.
    directory = open_model_directory(builtin_path() if path is None else path, hash_weights=path is not None)
    name = BUILTIN_NAME if path is None else str(directory.path)
    opened = _open_adapters(adapters or {}, directory)
    if len(opened) == 1:
        name += f" with adapter {next(iter(opened.values())).path}"
    only_torch = _why_only_torch(opened)
    if backend == "auto" and only_torch:
        backend = "torch"
    elif backend != "torch" and backend != "auto" and only_torch:
        raise DeviceError(f"The {backend} backend cannot run {only_torch}; give --backend torch.")
    if only_torch and dtype in _QUANTIZED:
        raise DeviceError(f"The onnx backend has {dtype}, and cannot run {only_torch}; leave --dtype out.")
    export = _Export(directory, opened, _precision(directory, dtype), is_builtin=path is None)
    if backend == "mindspore" or (backend == "auto" and _is_for_mindspore(device, dtype, export)):
        return _on_mindspore(directory, opened, device, dtype, name, graph_mode)
    if _use_torch(backend, device, dtype, export):
        _require_torch(dtype)
        return Choice(directory, "torch", device, dtype, name, directory.tokenizer_path, opened)
    return Choice(export.open(exporter, exporting), "onnx", device, dtype, name, directory.tokenizer_path, opened)


def _on_mindspore(
    directory: ModelDirectory,
    adapters: Mapping[str, AdapterDirectory],
    device: str,
    dtype: str,
    name: str,
    graph_mode: int | None,
) -> Choice:
    if dtype in _QUANTIZED:
        raise DeviceError(f"The mindspore backend has no {dtype}; give --backend onnx, or another precision.")
    prepare_mindspore()
    for adapter in adapters.values():
        directory = merged(directory, adapter)
    tokenizer = directory.tokenizer_path
    return Choice(directory, "mindspore", device, dtype, name, tokenizer, adapters, 1 if graph_mode else 0)


def _open_adapters(adapters: Mapping[str, str | Path], directory: ModelDirectory) -> dict[str, AdapterDirectory]:
    opened = {name: open_adapter(path) for name, path in adapters.items()}
    for adapter in opened.values():
        require_base(adapter, directory)
    return opened


def _why_only_torch(adapters: Mapping[str, AdapterDirectory]) -> str | None:
    """What of the adapters no export can hold."""
    if len(adapters) > 1:
        return "several adapters, since one alone can be merged into the weights"
    prefixed = next((adapter.path for adapter in adapters.values() if adapter.prefix), None)
    return f"the adapter {prefixed}, which has learned prefixes (P-tuning)" if prefixed else None


@dataclass(frozen=True)
class _Export:
    """The export of a model directory, which may have to be made first."""

    base: ModelDirectory
    adapters: Mapping[str, AdapterDirectory]
    precision: Precision
    is_builtin: bool

    @cached_property
    def directory(self) -> ModelDirectory:
        """The base, or what it is with its adapter."""
        adapter = next(iter(self.adapters.values()), None)
        return merged(self.base, adapter) if adapter else self.base

    @property
    def can_be_had(self) -> bool:
        return self._comes_along or find_spec("onnx") is not None or is_cached(self.directory, self.precision)

    def open(self, exporter: Exporter, exporting: Exporting | None) -> LiteDirectory:
        if self._comes_along:
            return open_lite_directory(builtin_export(), hash_weights=False)
        return exporter(self.directory, self.precision, exporting)

    @property
    def _comes_along(self) -> bool:
        return self.is_builtin and self.precision == "fp32" and not self.adapters


def open_export(path: str | Path) -> LiteDirectory | MindirDirectory | None:
    """What lies at `path`, if it is an export; raises `CheckpointError` or `ConfigError` if that is not as it was."""
    if is_lite_directory(path):
        return open_lite_directory(path)
    return open_mindir_directory(path) if is_mindir_directory(path) else None


def _exported(directory: LiteDirectory | MindirDirectory, backend: str, device: str, dtype: str) -> Choice:
    own: Literal["onnx", "mindir"]
    own, runtime = ("onnx", "ONNX Runtime") if isinstance(directory, LiteDirectory) else ("mindir", "MindSpore")
    if backend not in ("auto", own):
        raise DeviceError(
            f"{directory.path} is an export for {runtime}, which {backend} cannot run; "
            f"give --backend {own}, or the model directory that it was made from."
        )
    precision = directory.manifest.precision
    if dtype != "auto" and _PRECISIONS.get(dtype) != precision:
        raise DeviceError(
            f"{directory.path} is an export of precision {precision} and cannot be run as {dtype}; "
            "leave --dtype out, or export the model again."
        )
    if own == "mindir":
        prepare_mindir()
    return Choice(directory, own, device, dtype, str(directory.path), directory.tokenizer_path)


def _precision(directory: ModelDirectory, dtype: str) -> Precision:
    """What an export is to be for `dtype`; "auto" is exact where that is cheap."""
    if dtype in _PRECISIONS:
        return _PRECISIONS[dtype]
    return "fp32" if directory.manifest.parameter_count < _SMALL_MODEL else "int8"


def _is_for_mindspore(device: str, dtype: str, export: _Export) -> bool:
    """Whether the device is MindSpore's, or nothing else that is installed can run the model."""
    if device.partition(":")[0] == "ascend":
        return True
    if dtype in _QUANTIZED or device not in ("auto", "cpu") or find_spec("torch") or not find_spec("mindspore"):
        return False
    return dtype in _HALVES or not export.can_be_had


def _use_torch(backend: str, device: str, dtype: str, export: _Export) -> bool:
    if backend != "auto":
        if backend == "onnx" and dtype == "bfloat16":
            raise DeviceError("The onnx backend has no bfloat16; give float32, float16, int8 or int4.")
        return backend == "torch"
    if dtype in _QUANTIZED:
        return False
    if dtype in _HALVES or device not in ("auto", "cpu"):
        return True
    if device == "auto" and _has_gpu():
        return True
    return not export.can_be_had and find_spec("torch") is not None


def _has_gpu() -> bool:
    """Whether torch has a CUDA device; it is not imported, which takes seconds, where there is no driver for one."""
    if shutil.which("nvidia-smi") is None or find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def _require_torch(dtype: str) -> None:
    if find_spec("torch") is None:
        raise DeviceError("The torch backend needs PyTorch; run `pip install 'visualglm[torch]'`.")
    if dtype in _QUANTIZED:
        raise DeviceError(f"The torch backend has no {dtype}; give --backend onnx, or another precision.")


def _check_known(what: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise DeviceError(f"The {what} {name!r} is unknown; give {', '.join(known[:-1])} or {known[-1]}.")


def _check_graph_mode(graph_mode: int | None, backend: str) -> None:
    if graph_mode is None:
        return
    if backend != "mindspore":
        raise DeviceError(f"The graph mode is MindSpore's, and the backend is {backend}; give --backend mindspore.")
    if graph_mode not in get_args(GraphMode):
        raise DeviceError(f"The graph mode {graph_mode} is unknown; give 0 (graph) or 1 (operator by operator).")


def _asset(name: str) -> Path:
    return Path(str(files("visualglm") / "assets" / name))
