"""Loads a model to be trained: frozen weights in half precision or fewer bits, trained ones in float32."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch

from visualglm.backends.torch.joined import VisualGLMModel
from visualglm.checkpoint.model_dir import ModelDirectory
from visualglm.config import DType, VisualGLMConfig
from visualglm.training.recipe import FinetuneRecipe, Precision

Part = Literal["image", "text"]
"""ViT, Q-Former and projection; or the decoder."""
ALL_PARTS: tuple[Part, ...] = ("image", "text")


def load_for_training(
    directory: ModelDirectory, recipe: FinetuneRecipe, device: torch.device, parts: Collection[Part] = ALL_PARTS
) -> VisualGLMModel:
    """The model of `directory` on `device`, ready for `make_trainable`.

    Weights are in the precision of the recipe, except that parts trained as a whole are in float32, and the decoder's
    linear layers in whole numbers for qlora. Without "image" the model takes image embeddings only, without "text" it
    can only `encode_images`; what is left out takes no memory.

    Raises `DeviceError` if the precision cannot be had on that device.
    """
    raise NotImplementedError


def training_dtype(precision: Precision, config: VisualGLMConfig, device: torch.device) -> DType:
    """The precision that is computed in; "auto": float32 for a small model, else bfloat16 where the device has it.

    With "float16" gradients must be scaled.
    """
    raise NotImplementedError
