"""Which parts of a model a recipe trains or quantises, as far as that can be told without the model."""

from __future__ import annotations

from typing import Literal

from visualglm.training.recipe import TuneRecipe

WholePart = Literal["vision", "qformer", "projection", "text"]
_WHOLE_PARTS: dict[str, tuple[WholePart, ...]] = {
    "vit": ("vision",),
    "qformer": ("qformer", "projection"),
    "full": ("vision", "qformer", "projection", "text"),
}


def whole_parts(tune: TuneRecipe) -> tuple[WholePart, ...]:
    """Parts of the model all of whose weights are trained, in the order of the model."""
    named = {part for method in tune.methods for part in _WHOLE_PARTS.get(method, ())}
    return tuple(part for part in _WHOLE_PARTS["full"] if part in named)


def is_quantized(name: str, tune: TuneRecipe) -> bool:
    """Whether a parameter is a matrix that qlora keeps in whole numbers: those of the decoder's layers."""
    is_matrix = name.startswith("text.layers.") and name.endswith(".weight") and "norm" not in name
    return is_matrix and "qlora" in tune.methods
