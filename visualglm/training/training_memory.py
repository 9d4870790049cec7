"""How much memory training takes, told before anything is loaded, and what to change where there is not enough."""

from __future__ import annotations

from dataclasses import dataclass

from visualglm.config import DType, VisualGLMConfig
from visualglm.training.recipe import FinetuneRecipe


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that training takes in one process."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.working


def estimate_training_memory(
    config: VisualGLMConfig, recipe: FinetuneRecipe, dtype: DType, *, length: int, image_encoder: bool
) -> TrainingMemory:
    """What a run of `recipe` takes that computes in `dtype` (`load.training_dtype`).

    length: tokens of the longest row. image_encoder: whether ViT and Q-Former are in memory beside the decoder.
    """
    raise NotImplementedError


def require_training_memory(
    config: VisualGLMConfig,
    recipe: FinetuneRecipe,
    dtype: DType,
    *,
    length: int,
    image_encoder: bool,
    available: int,
    where: str,
) -> TrainingMemory:
    """The estimate; raises `DeviceError`, with the setting that would fit, if it is more than is `available`."""
    raise NotImplementedError
