"""`visualglm info`: what this program, this machine and a model are."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Annotated

import psutil
from typer import Argument

from visualglm import __version__
from visualglm.checkpoint.adapter_dir import AdapterDirectory, open_adapter
from visualglm.checkpoint.files import readable
from visualglm.checkpoint.instead import is_adapter
from visualglm.checkpoint.lite_dir import LiteDirectory
from visualglm.checkpoint.mindir_dir import MindirDirectory
from visualglm.checkpoint.model_dir import ModelDirectory, license_of, open_model_directory
from visualglm.cli.adapters import adapter_facts
from visualglm.cli.messages import print_table
from visualglm.config import VisualGLMConfig
from visualglm.loading import BUILTIN_NOTICE, builtin_path, open_export
from visualglm.memory import available_memory, gib
from visualglm.parameters import parameter_count, parameter_shapes

_MISSING = "not installed"
_LIBRARIES = ("numpy", "pillow", "sentencepiece", "safetensors", "pydantic", "typer", "rich")

Row = tuple[str, str]


def info(
    model: Annotated[
        Path | None, Argument(metavar="MODEL", help="Model directory, export or adapter; else the built-in model.")
    ] = None,
) -> None:
    """Show version, machine, devices, and what a model or an adapter is."""
    print_table([*_program(), *_onnx(), *_torch(), *_mindspore()])
    print()
    path = builtin_path() if model is None else model
    if is_adapter(path):
        print_table(_adapter(open_adapter(path)))
        return
    directory = open_export(path) or open_model_directory(path)
    print_table(_folder(directory, is_builtin=model is None))
    print()
    print_table(_parts(directory.config), header=("part", "layers", "width", "heads", "MLP", "parameters", "other"))


def _program() -> list[Row]:
    memory = psutil.virtual_memory()
    return [
        ("visualglm", __version__),
        ("Python", f"{platform.python_version()} ({sys.executable})"),
        ("system", platform.platform()),
        ("processor", f"{os.cpu_count()} cores"),
        ("memory", f"{gib(memory.total)}, of which {gib(available_memory())} are free"),
        ("libraries", ", ".join(f"{name} {_version(name)}" for name in _LIBRARIES)),
    ]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return _MISSING


def _onnx() -> list[Row]:
    import onnxruntime

    from visualglm.backends.onnx.session import core_count

    providers = ", ".join(name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers())
    tools = _version("onnx")
    return [
        ("onnxruntime", f"{onnxruntime.__version__}, {core_count()} threads; providers: {providers}"),
        ("onnx", f"{tools}; `pip install 'visualglm[export]'` adds it" if tools == _MISSING else tools),
    ]


def _torch() -> list[Row]:
    found = _version("torch")
    if found == _MISSING:
        return [("torch", f"{found}; `pip install 'visualglm[torch]'` adds it")]
    try:
        import torch
    except (ImportError, OSError) as error:
        return [("torch", f"{found}, but it cannot be imported ({error})")]
    devices = [f"cpu ({torch.get_num_threads()} threads)"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(f"cuda:{index} ({properties.name}, {gib(properties.total_memory)})")
    if torch.backends.mps.is_available():
        devices.append("mps")
    return [("torch", found), ("devices", ", ".join(devices))]


def _mindspore() -> list[Row]:
    found = _version("mindspore")
    added = "; `pip install 'visualglm[mindspore]'` adds it, in an environment of its own"
    return [("mindspore", found + added if found == _MISSING else found)]


def _folder(directory: ModelDirectory | LiteDirectory | MindirDirectory, *, is_builtin: bool) -> list[Row]:
    config, tokenizer = directory.config, directory.tokenizer_path
    merged = directory.manifest.source.merged or ()
    license_text = (license_of(directory.path) or "").strip() or "none is given"
    return [
        ("model", str(directory.path)),
        *([("", BUILTIN_NOTICE)] if is_builtin else []),
        *(_model(directory) if isinstance(directory, ModelDirectory) else _export(directory)),
        ("tokenizer", "none: it cannot be asked" if tokenizer is None else tokenizer.name),
        ("window", f"{config.text.max_sequence_length:,} tokens, {config.text.vocab_size:,} ids"),
        ("source", directory.manifest.source.format),
        *(("merged", f"{readable(it.adapter_name)}, fingerprint {it.adapter}") for it in merged),
        ("licence", license_text.splitlines()[0]),
    ]


def _model(directory: ModelDirectory) -> list[Row]:
    config, size = directory.config, directory.checkpoint.size_bytes
    return [
        ("parameters", f"{parameter_count(config):,}, {config.dtype}, {gib(size)}"),
        ("fingerprint", directory.fingerprint),
    ]


def _export(directory: LiteDirectory | MindirDirectory) -> list[Row]:
    manifest = directory.manifest
    return [
        ("parameters", f"{manifest.parameter_count:,}, {gib(directory.weights_bytes)}"),
        (manifest.kind.name, manifest.title),
        ("memory", directory.memory.beside(available_memory())),
        ("fingerprint", f"{manifest.model_fingerprint}, of the model it was made from"),
    ]


def _adapter(adapter: AdapterDirectory) -> list[Row]:
    manifest = adapter.manifest
    return [
        *adapter_facts(adapter),
        ("fingerprint", adapter.fingerprint),
        ("source", manifest.source.format if manifest else "PEFT, without a manifest"),
    ]


def _parts(config: VisualGLMConfig) -> list[tuple[str, ...]]:
    vision, qformer, text = config.vision, config.qformer, config.text
    counts = {part: _part_count(config, part) for part in ("vision", "qformer", "projection", "text")}
    size = f"{vision.image_size}×{vision.image_size}, patch {vision.patch_size}, {vision.sequence_length} tokens"
    cross = ", ".join(map(str, qformer.cross_attention_layers))
    sizes = [
        (
            name,
            str(part.num_hidden_layers),
            str(part.hidden_size),
            str(part.num_attention_heads),
            str(part.intermediate_size),
        )
        for name, part in (("ViT", vision), ("Q-Former", qformer), ("ChatGLM", text))
    ]
    return [
        (*sizes[0], counts["vision"], size),
        (*sizes[1], counts["qformer"], f"{qformer.num_query_tokens} queries, cross-attention in layers {cross}"),
        ("projection", "1", f"{qformer.hidden_size}→{text.hidden_size}", "", "", counts["projection"], ""),
        (*sizes[2], counts["text"], f"vocabulary {text.vocab_size:,}, window {text.max_sequence_length:,}"),
    ]


def _part_count(config: VisualGLMConfig, part: str) -> str:
    shapes = parameter_shapes(config)
    return f"{sum(prod(shape) for name, shape in shapes.items() if name.startswith(f'{part}.')):,}"
