"""LoRA on the decoder, which is PEFT's, and the names under which it is stored."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from visualglm.backends.torch.joined import VisualGLMModel
from visualglm.training.parts import lora_modules
from visualglm.training.recipe import TuneRecipe

_ADAPTER = "default"

# PEFT imports transformers, which takes seconds: not before LoRA is made. That it is missing is told at once.
if find_spec("peft") is None:
    raise ModuleNotFoundError("No module named 'peft'", name="peft")


def add_lora(model: VisualGLMModel, tune: TuneRecipe, seed: int) -> None:
    """Put float32 pairs beside `lora_modules`; all else in the model is frozen by this."""
    from peft import LoraConfig, inject_adapter_in_model

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
