"""Weights to start training from scratch with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visualglm.backends.torch.joined import VisualGLMModel
from visualglm.config import VisionConfig


def initialize(model: VisualGLMModel, seed: int) -> None:
    """Xavier for matrices, zero for biases; the decoder's inner matrices are scaled down as DeepNorm says.

    DeepNorm (Wang et al. 2022): where residuals are scaled by alpha, values and outputs start at (8 * layers)^-1/4.
    """
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1) if isinstance(module, nn.Conv2d) else module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(model.text.word_embeddings.weight, std=0.1)
    nn.init.normal_(model.vision.class_token, std=0.02)
    nn.init.normal_(model.qformer.query_tokens, std=0.5)
    with torch.no_grad():
        model.vision.position_embeddings.copy_(sine_positions(model.config.vision))
        scale = (8 * model.config.text.num_hidden_layers) ** -0.25
        for name, parameter in model.text.layers.named_parameters():
            if name.endswith(("proj.weight", "fc1.weight", "fc2.weight")):
                parameter.mul_(scale)


def sine_positions(config: VisionConfig, amplitude: float = 0.5) -> Tensor:
    """Two-dimensional sines and cosines, [1 + patches, width], zero for the class token: a start, then learned."""
    grid = config.image_size // config.patch_size
    frequencies = 1.0 / 100 ** (torch.arange(config.hidden_size // 4) / (config.hidden_size // 4))
    angles = torch.outer(torch.arange(grid, dtype=torch.float32), frequencies)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = axis[:, None].expand(grid, grid, -1), axis[None, :].expand(grid, grid, -1)
    patches = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    return amplitude * torch.cat([torch.zeros(1, patches.shape[1]), patches])
