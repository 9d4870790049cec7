"""LoRA that PEFT trained on the Hugging Face model, as an adapter directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visualglm.checkpoint.adapter_dir import AdapterDirectory, LoraPair, open_adapter, write_adapter
from visualglm.checkpoint.checks import listed
from visualglm.checkpoint.files import checked_path, read_json_object, readable
from visualglm.checkpoint.foreign_config import HF_CONFIG
from visualglm.checkpoint.instead import is_adapter
from visualglm.checkpoint.keys import hf_modules, unpacked
from visualglm.checkpoint.manifest import MANIFEST, Source
from visualglm.checkpoint.model_dir import ModelDirectory
from visualglm.checkpoint.peft_config import PEFT_CONFIG, LoraSettings, peft_values
from visualglm.checkpoint.tensors import Tensor, as_float32
from visualglm.config import TextConfig
from visualglm.errors import CheckpointError


def holds_hf_adapter(source: Path) -> bool:
    """Whether a folder is an adapter that PEFT wrote elsewhere, and not the model itself."""
    ours = source / MANIFEST, source / HF_CONFIG.file_name
    return is_adapter(source) and not any(path.exists() for path in ours)


def told_hf_base(source: Path) -> str | None:
    """What PEFT noted as the name of the model; None if nothing. Raises `CheckpointError` if it cannot be read."""
    name = read_json_object(source / PEFT_CONFIG).get("base_model_name_or_path")
    return readable(name) if isinstance(name, str) and name else None


def convert_hf_adapter(
    source: Path | str, output: Path | str, *, base: ModelDirectory | None = None, force: bool = False
) -> AdapterDirectory:
    """Convert LoRA that PEFT wrote for the Hugging Face model, in safetensors or pickled, to an adapter directory.

    base: the model that was fine-tuned, which must be given: without it nobody knows how many heads there are. That it
    is the same cannot be checked, since PEFT keeps no hash of it. Raises `CheckpointError` if the adapter is damaged,
    more than plain LoRA, or does not fit the base, and if `output` cannot be written.
    """
    source = checked_path(source)
    if base is None:
        raise CheckpointError(f"{source} packs q, k and v head by head, as its base does; give that with --base MODEL.")
    found = open_adapter(source)
    names = _our_names(found, base)
    text = base.config.text
    return write_adapter(
        output,
        base=base,
        lora_settings=_renamed(found.settings, found.lora, names) if found.settings else None,
        lora={
            f"base_model.model.{names[module]}.lora_{part}.weight": matrix
            for module, pair in found.lora.items()
            for part, matrix in (("A", _floats(pair.a)), ("B", _floats(_in_thirds(names[module], pair.b, text))))
        },
        source=Source(format="hf", layout="per_head", config=read_json_object(source / PEFT_CONFIG)),
        force=force,
    )


def _our_names(found: AdapterDirectory, base: ModelDirectory) -> dict[str, str]:
    modules = hf_modules(base.config)
    unknown = [module for module in found.lora if module not in modules]
    if unknown and set(unknown) <= set(modules.values()):
        raise CheckpointError(f"{found.path} has the names of a model directory already; give it as it is.")
    if unknown:
        raise CheckpointError(
            f"{found.path} adapts layers that the Hugging Face model of {base.path} does not have: "
            f"{listed([readable(module) for module in unknown])}."
        )
    return {module: modules[module] for module in found.lora}


def _renamed(settings: LoraSettings, lora: Mapping[str, LoraPair], names: Mapping[str, str]) -> dict[str, object]:
    """The values of an `adapter_config.json` that scale every pair as `settings` do, under its new name."""
    values = peft_values(
        {names[module]: pair.rank for module, pair in lora.items()},
        rank=settings.r,
        alpha=settings.lora_alpha,
        dropout=settings.lora_dropout,
    )
    alphas = {names[module]: settings.alpha(module) for module in lora}
    others = {module: alpha for module, alpha in alphas.items() if alpha != settings.lora_alpha}
    return values | {"alpha_pattern": others, "use_rslora": settings.use_rslora}


def _in_thirds(module: str, b: Tensor, text: TextConfig) -> Tensor:
    """B [out, rank] of a module; where that is ChatGLM's qkv its rows come head by head, and are put in thirds."""
    if b.shape[0] != 3 * text.hidden_size:
        # It is no qkv of this model, and if it should be, it is refused beside the base.
        return b
    weight = f"{module}.weight"
    return unpacked({weight: b}, text, "per_head")[weight]


def _floats(tensor: Tensor) -> NDArray[np.float32]:
    return as_float32(np.ascontiguousarray(tensor.array()), tensor.dtype)
