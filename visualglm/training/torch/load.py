"""Loads a model to be trained: frozen weights in half precision or fewer bits, trained ones in float32."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visualglm.backends.torch.chatglm import rotary_table
from visualglm.backends.torch.joined import VisualGLMModel
from visualglm.backends.torch.load import choose_dtype, mapped_tensor
from visualglm.backends.torch.quantized_linear import Bits, QuantizedLinear
from visualglm.checkpoint.contents import Checkpoint
from visualglm.checkpoint.model_dir import ModelDirectory
from visualglm.checkpoint.progress import Report, each_reported
from visualglm.checkpoint.tensors import Tensor as StoredTensor
from visualglm.config import DType, VisualGLMConfig
from visualglm.export.quantize import quantize_blocks
from visualglm.training.parts import QUANTIZATION_BLOCK, is_quantized, whole_parts
from visualglm.training.recipe import FinetuneRecipe, Precision

Part = Literal["image", "text"]
"""ViT, Q-Former and projection; or the decoder."""
ALL_PARTS: tuple[Part, ...] = ("image", "text")

_MODULES: dict[Part, tuple[str, ...]] = {"image": ("vision", "qformer", "projection"), "text": ("text",)}


def load_for_training(
    directory: ModelDirectory | Checkpoint,
    recipe: FinetuneRecipe,
    device: torch.device,
    parts: Collection[Part] = ALL_PARTS,
    report: Report | None = None,
) -> VisualGLMModel:
    """The model of `directory` on `device`, ready for `make_trainable`.

    Weights are in the precision of the recipe, except that parts trained as a whole are in float32, and the decoder's
    linear layers in whole numbers for qlora. Without "image" the model takes image embeddings only, without "text" it
    can only `encode_images`; what is left out takes no memory.

    Raises `DeviceError` if the precision cannot be had on that device, `CheckpointError` if weights are not finite
    numbers that are to be quantised.
    """
    with torch.device("meta"):
        model = VisualGLMModel(directory.config)
    for part in _MODULES.keys() - set(parts):
        for module in _MODULES[part]:
            delattr(model, module)
    dtype, whole = training_dtype(recipe.run.precision, directory.config, device), whole_parts(recipe.tune)
    state = {}
    for name, stored in each_reported({name: directory.tensors[name] for name in model.state_dict()}, report):
        if is_quantized(name, recipe.tune):
            _quantize(model, name.removesuffix(".weight"), stored, recipe.tune.base_bits, device)
        else:
            precision = "float32" if name.split(".")[0] in whole else dtype
            state[name] = mapped_tensor(stored).to(device=device, dtype=getattr(torch, precision))
    # Not strict: the layers that were quantised have their weights, under other names.
    model.load_state_dict(state, strict=False, assign=True)
    if "text" in parts:
        model.text.rotary = rotary_table(directory.config.text, device)
    return model


def training_dtype(precision: Precision, config: VisualGLMConfig, device: torch.device) -> DType:
    """The precision that is computed in; "auto": float32 for a small model, else bfloat16 where the device has it.

    With "float16" gradients must be scaled.
    """
    chosen = choose_dtype(precision, config, device)
    if precision == "auto" and chosen == "float16" and _has_bfloat16(device):
        return "bfloat16"
    return chosen


def _has_bfloat16(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


class _Rows:
    """A matrix whose rows come as float32 when they are asked for."""

    def __init__(self, matrix: Tensor) -> None:
        self._matrix = matrix
        self.shape = tuple(matrix.shape)

    def __getitem__(self, rows: slice, /) -> NDArray[Any]:
        widened: NDArray[np.float32] = self._matrix[rows].float().numpy()
        return widened


def _quantize(model: VisualGLMModel, name: str, stored: StoredTensor, bits: Bits, device: torch.device) -> None:
    """Put a quantised layer in the place of the linear layer `name`."""
    weight = _Rows(mapped_tensor(stored))
    quantized = quantize_blocks(weight, bits, QUANTIZATION_BLOCK, name=f"{name}.weight")
    data, scales, zeros = (
        torch.from_numpy(array).to(device) for array in (quantized.data, quantized.scales, quantized.zeros())
    )
    # The bias is loaded with all the others.
    with torch.device("meta"):
        bias = torch.empty(len(data))
    layer = QuantizedLinear(data, scales, zeros, bias, bits=bits, in_features=quantized.in_features)
    model.set_submodule(name, layer, strict=True)
