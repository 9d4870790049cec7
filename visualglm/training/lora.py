"""LoRA on the decoder, which is PEFT's: which layers get it, and under which names it is stored."""

from __future__ import annotations

import torch
from peft import LoraConfig, inject_adapter_in_model

from visualglm.backends.torch.joined import VisualGLMModel
from visualglm.config import TextConfig
from visualglm.training.recipe import TuneRecipe

_PARENT = {"qkv": "attention", "proj": "attention", "fc1": "mlp", "fc2": "mlp"}
_ADAPTER = "default"


def lora_modules(tune: TuneRecipe, text: TextConfig) -> list[str]:
    """Names of the linear layers that get LoRA; raises `ConfigError` for a layer that the model does not have."""
    return [
        f"text.layers.{layer}.{_PARENT[module]}.{module}"
        for layer in tune.layers(text.num_hidden_layers)
        for module in tune.target_modules
    ]


def add_lora(model: VisualGLMModel, tune: TuneRecipe, seed: int) -> None:
    """Put float32 pairs beside `lora_modules`; all else in the model is frozen by this."""
    settings = LoraConfig(
        r=tune.lora_rank,
        lora_alpha=tune.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=tune.lora_dropout,
        target_modules=lora_modules(tune, model.config.text),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, model, adapter_name=_ADAPTER)
    for name, parameter in model.named_parameters():
        if is_lora(name):
            parameter.data = parameter.data.float()


def is_lora(name: str) -> bool:
    """Whether a parameter of the model belongs to LoRA."""
    return ".lora_" in name


def peft_name(name: str) -> str:
    """What PEFT calls a LoRA parameter in a file."""
    return f"base_model.model.{name.replace(f'.{_ADAPTER}.', '.')}"
