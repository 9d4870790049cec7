"""The ViT: image → one embedding per patch, and one for the class token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visualglm.backends.torch.modules import MLP, SelfAttention, run_layer
from visualglm.config import VisionConfig


class ViTLayer(nn.Module):
    """A pre-LN block."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = SelfAttention(config.hidden_size, config.num_attention_heads)
        self.norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, gelu="none")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class ViT(nn.Module):
    """Pixels [batch, 3, S, S] → embeddings [batch, 1 + patches, width], the class token first."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.recompute_activations = False
        self.patch_embed = nn.Conv2d(config.in_channels, config.hidden_size, config.patch_size, config.patch_size)
        self.class_token = nn.Parameter(torch.empty(1, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.empty(config.sequence_length, config.hidden_size))
        self.layers = nn.ModuleList(ViTLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.final_layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        class_token = self.class_token.expand(len(pixels), 1, -1)
        x = torch.cat([class_token, patches], dim=1) + self.position_embeddings
        for layer in self.layers:
            x = run_layer(layer, x, recompute=self.recompute_activations)
        return self.norm(x)  # type: ignore[no-any-return]
