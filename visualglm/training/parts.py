"""Which parts of a model a recipe trains or quantises, as far as that can be told without the model."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from visualglm.checkpoint.peft_config import peft_values
from visualglm.config import TextConfig
from visualglm.errors import ConfigError
from visualglm.training.recipe import TuneRecipe

# Smaller blocks than those of an export: nothing is gained in training by few scales.
QUANTIZATION_BLOCK = 64
WholePart = Literal["vision", "qformer", "projection", "text"]
_WHOLE_PARTS: dict[str, tuple[WholePart, ...]] = {
    "vit": ("vision",),
    "qformer": ("qformer", "projection"),
    "full": ("vision", "qformer", "projection", "text"),
}
_PARENT = {"qkv": "attention", "proj": "attention", "fc1": "mlp", "fc2": "mlp"}


class Trained(NamedTuple):
    """A row of the table shown before training: what is trained, in which layers, and how many parameters."""

    what: str
    layers: str
    parameters: int


def whole_parts(tune: TuneRecipe) -> tuple[WholePart, ...]:
    """Parts of the model all of whose weights are trained, in the order of the model."""
    named = {part for method in tune.methods for part in _WHOLE_PARTS.get(method, ())}
    return tuple(part for part in _WHOLE_PARTS["full"] if part in named)


def lora_modules(tune: TuneRecipe, text: TextConfig) -> list[str]:
    """Names of the linear layers that get LoRA.

    Raises `ConfigError` for a layer that the model does not have, or a rank above the smallest width of these layers.
    """
    has_mlp = not {"fc1", "fc2"}.isdisjoint(tune.target_modules)
    width = min(text.hidden_size, text.intermediate_size) if has_mlp else text.hidden_size
    if tune.lora_rank > width:
        raise ConfigError(
            f"tune.lora_rank is {tune.lora_rank:,}, but the layers beside which LoRA stands are {width:,} wide; "
            f"give at most {width:,} (--rank)."
        )
    return [
        f"text.layers.{layer}.{_PARENT[module]}.{module}"
        for layer in tune.layers(text.num_hidden_layers)
        for module in tune.target_modules
    ]


def lora_summary(tune: TuneRecipe, text: TextConfig, parameters: int) -> Trained:
    """The row of LoRA in the table shown before training."""
    layers = ", ".join(map(str, tune.layers(text.num_hidden_layers)))
    what = f"LoRA on {', '.join(tune.target_modules)} (rank {tune.lora_rank}, alpha {tune.lora_alpha:g})"
    return Trained(what, layers, parameters)


def lora_settings(tune: TuneRecipe, text: TextConfig) -> dict[str, Any]:
    """What `adapter_config.json` of PEFT holds."""
    modules = dict.fromkeys(lora_modules(tune, text), tune.lora_rank)
    return peft_values(modules, rank=tune.lora_rank, alpha=tune.lora_alpha, dropout=tune.lora_dropout)


def is_sharded(tune: TuneRecipe, processes: int) -> bool:
    """Whether so many processes share the weights, each with a part of them, instead of all having all of them."""
    return "full" in tune.methods and processes > 1


def is_quantized(name: str, tune: TuneRecipe) -> bool:
    """Whether a parameter is a matrix that qlora keeps in whole numbers: those of the decoder's layers."""
    is_matrix = name.startswith("text.layers.") and name.endswith(".weight") and "norm" not in name
    return is_matrix and "qlora" in tune.methods
