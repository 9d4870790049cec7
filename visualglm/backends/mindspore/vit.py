"""The ViT: image → one embedding per patch, and one for the class token."""

from __future__ import annotations

from mindspore import Tensor, nn, ops

from visualglm.backends.mindspore.modules import MLP, LayerNorm, SelfAttention, new_parameter
from visualglm.config import VisionConfig


class ViTLayer(nn.Cell):
    """A pre-LN block."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = SelfAttention(config.hidden_size, config.num_attention_heads)
        self.norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, gelu="none")

    def construct(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Cell):
    """Pixels [batch, 3, S, S] → embeddings [batch, 1 + patches, width], the class token first."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.width = width
        self.patch_embed = nn.Conv2d(
            config.in_channels, width, patch, stride=patch, pad_mode="valid", has_bias=True, weight_init="zeros"
        )
        self.class_token = new_parameter(1, width)
        self.position_embeddings = new_parameter(config.sequence_length, width)
        self.layers = nn.CellList([ViTLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = LayerNorm(width, config.final_layer_norm_eps)

    def construct(self, pixels: Tensor) -> Tensor:
        batch = pixels.shape[0]
        patches = ops.transpose(ops.reshape(self.patch_embed(pixels), (batch, self.width, -1)), (0, 2, 1))
        class_token = ops.broadcast_to(self.class_token, (batch, 1, self.width))
        x = ops.concat((class_token, patches), axis=1) + self.position_embeddings
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)
