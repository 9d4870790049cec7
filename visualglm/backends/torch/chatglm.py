"""ChatGLM: the decoder, with two-dimensional rotary positions and scaled post-LN residuals."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from visualglm.backends.torch.kv_cache import KVCache
from visualglm.backends.torch.linear import Linear
from visualglm.backends.torch.modules import MLP, merge_heads, run_layer, split_heads
from visualglm.backends.torch.prefix import with_prefix
from visualglm.config import TextConfig


def rotary_table(config: TextConfig, device: torch.device) -> Tensor:
    """Cosines and sines, float32 [2, max_sequence_length, head_dim / 2], for one half of a head.

    Computed on the CPU, so that every device turns alike; `rotary_inv_freq_dtype` float16 rounds the frequencies first.
    """
    dim, cpu = config.head_dim // 2, torch.device("cpu")
    inv_freq = 1.0 / config.rotary_base ** (torch.arange(0, dim, 2, dtype=torch.float32, device=cpu) / dim)
    if config.rotary_inv_freq_dtype == "float16":
        inv_freq = inv_freq.half().float()
    positions = torch.arange(config.max_sequence_length, dtype=torch.float32, device=cpu)
    angles = torch.outer(positions, inv_freq).repeat(1, 2)
    return torch.stack([angles.cos(), angles.sin()]).to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn both halves of each head by their own position row.

    x: [batch, heads, seq, head_dim]; cos, sin: float32 [batch, 1, seq, 2, head_dim / 2].
    Each half is rotate-half, not interleaved. The turn is computed in float32.
    """
    halves = x.view(*x.shape[:-1], 2, -1).float()
    left, right = halves.chunk(2, dim=-1)
    turned = halves * cos + torch.cat([-right, left], dim=-1) * sin
    return turned.flatten(-2).to(x.dtype)


class ChatGLMAttention(nn.Module):
    """Attention between the columns of a prompt, and to the cached and the learned ones (`prefix`) if there are any."""

    prefix: nn.Parameter | None

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = Linear(config.hidden_size, config.hidden_size)
        self.register_parameter("prefix", None)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        if self.prefix is not None:
            k, v, mask = with_prefix(self.prefix, k, v, mask)
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(merge_heads(attended))  # type: ignore[no-any-return]


class ChatGLMLayer(nn.Module):
    """A post-LN block whose residuals are the normalised tensors times sqrt(2 * layers)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.residual_scale = config.residual_scale
        self.input_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = ChatGLMAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, gelu="tanh")

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        x = self.input_norm(x)
        x = self.attention_norm(x * self.residual_scale + self.attention(x, rotary, mask, cache, layer))
        return x * self.residual_scale + self.mlp(x)  # type: ignore[no-any-return]


class ChatGLM(nn.Module):
    """Token embeddings [batch, seq, width] → hidden states of the same shape, after the final norm.

    recompute_activations: whether training keeps only what goes into each layer, and computes the rest once more.
    """

    rotary: Tensor

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute_activations = False
        # Not drawn at random: on the meta device that imports a computer algebra system, which takes two seconds.
        empty = torch.empty(config.vocab_size, config.hidden_size)
        self.word_embeddings = nn.Embedding.from_pretrained(empty, freeze=False)  # type: ignore[no-untyped-call]
        self.layers = nn.ModuleList(ChatGLMLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("rotary", rotary_table(config, torch.device("cpu")), persistent=False)

    def forward(
        self, inputs_embeds: Tensor, position_ids: Tensor, mask: Tensor | None, cache: KVCache | None = None
    ) -> Tensor:
        """position_ids: int64 [batch, 2, seq]; mask: bool [batch, 1, seq, keys], or None where all is visible."""
        cos, sin = self.rotary[:, position_ids.transpose(1, 2)].unsqueeze(2)
        x = inputs_embeds
        for index, layer in enumerate(self.layers):
            x = run_layer(layer, x, (cos, sin), mask, cache, index, recompute=self.recompute_activations)
        if cache is not None:
            cache.advance(inputs_embeds.shape[1])
        return self.norm(x)  # type: ignore[no-any-return]
