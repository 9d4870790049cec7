"""Adapters of random numbers, large enough to be seen in any answer."""

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from visualglm.checkpoint.adapter_dir import AdapterDirectory, write_adapter
from visualglm.checkpoint.manifest import Source
from visualglm.checkpoint.model_dir import ModelDirectory, open_model_directory
from visualglm.checkpoint.peft_config import peft_values
from visualglm.parameters import parameter_shapes, prefix_name

MODULES = ("text.layers.0.attention.qkv", "text.layers.1.attention.proj", "text.layers.1.mlp.fc1")


def random_pairs(model: ModelDirectory, modules: Sequence[str], rank: int, seed: int) -> dict[str, NDArray[np.float32]]:
    """Pairs for these modules by PEFT's names."""
    random, shapes = np.random.default_rng(seed), parameter_shapes(model.config)
    pairs = {}
    for module in modules:
        outputs, inputs = shapes[f"{module}.weight"]
        for part, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            pairs[f"base_model.model.{module}.lora_{part}.weight"] = random.normal(0, 0.3, shape).astype(np.float32)
    return pairs


def write_random_adapter(
    path: Path,
    base: Path,
    *,
    seed: int = 0,
    modules: Sequence[str] = MODULES,
    trained: Sequence[str] = (),
    prefix_length: int = 0,
    knows_base: bool = True,
) -> AdapterDirectory:
    """An adapter of rank 3 and scale 2 for the model in `base`, with whole parameters and prefixes if so asked."""
    model, random = open_model_directory(base), np.random.default_rng(seed + 1)
    text, shapes = model.config.text, parameter_shapes(model.config)
    shape = (2, text.num_attention_heads, prefix_length, text.head_dim)
    layers = range(text.num_hidden_layers if prefix_length else 0)
    return write_adapter(
        path,
        base=model if knows_base else None,
        lora_settings=peft_values(dict.fromkeys(modules, 3), rank=3, alpha=6.0) if modules else None,
        lora=random_pairs(model, modules, 3, seed),
        trained={name: random.normal(0, 0.5, shapes[name]).astype(np.float32) for name in trained},
        prefix={prefix_name(layer): random.normal(0, 1, shape).astype(np.float32) for layer in layers},
        source=Source(format="random"),
    )


def spoil_config(adapter: Path, **values: object) -> None:
    """Other values in `adapter_config.json`, as if they had been written so."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    _list_again(path)


def spoil_tensors(
    adapter: Path, name: str = "adapter_model.safetensors", **tensors: NDArray[np.generic] | None
) -> None:
    """Other tensors, None for none, as if they had been written so; `__` stands for a dot in a name."""
    path = adapter / name
    found = load_file(path) | {key.replace("__", "."): array for key, array in tensors.items()}
    save_file({key: array for key, array in found.items() if array is not None}, path)
    _list_again(path)


def _list_again(path: Path) -> None:
    manifest = json.loads((path.parent / "manifest.json").read_text())
    content = path.read_bytes()
    manifest["files"][path.name] = {"sha256": sha256(content).hexdigest(), "size": len(content)}
    (path.parent / "manifest.json").write_text(json.dumps(manifest))
