"""Weights to start training from scratch with."""

from __future__ import annotations

from math import pi, sqrt

import torch
from torch import Tensor, nn

from visualglm.backends.torch.joined import VisualGLMModel
from visualglm.backends.torch.vit import ViT
from visualglm.config import TextConfig, VisionConfig

# Where the heads of the first two ViT layers look at the start: columns right, rows down; one head more looks anywhere.
_FIRST_LOOKS = (((1, 0), (-1, 0), (0, 1), (0, -1)), ((1, 1), (-1, 1), (1, -1), (-1, -1)))
# Logits of a patch in the wanted column, or row: in both, it gets about four fifths of the attention.
_LOOK_LOGIT = 4.0
# Variances below this, in squared normalised pixels, are noise not worth amplifying.
_WHITENING_FLOOR = 0.1


def initialize(model: VisualGLMModel, seed: int, sample: Tensor) -> None:
    """Xavier for matrices and zero for biases, with a decoder that starts calm and a ViT that starts near-sighted.

    sample: pixels [images, 3, S, S] of some pictures of the kind that the model is to see.
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
        _calm_decoder(model.text.layers, model.config.text)
        _near_sighted(model.vision, model.config.vision)
        _whiten_patches(model.vision, model.config.vision, sample)


def _calm_decoder(layers: nn.ModuleList, config: TextConfig) -> None:
    """DeepNorm (Wang et al. 2022): where residuals are scaled, inner matrices start at (8 * layers)^-1/4."""
    scale = (8 * config.num_hidden_layers) ** -0.25
    for name, parameter in layers.named_parameters():
        if name.endswith(("proj.weight", "fc1.weight", "fc2.weight")):
            parameter.mul_(scale)


def _near_sighted(vision: ViT, config: VisionConfig) -> None:
    """Positions in the first `head_dim` columns, pixels in the others, and heads that look at a neighbour each.

    A ViT must find out what lies beside what; told at the start, it learns shapes several times sooner (compare
    d'Ascoli et al. 2021, ConViT). All of it is learned further.
    """
    positions = sine_positions(config)
    vision.position_embeddings.zero_()
    vision.position_embeddings[:, : positions.shape[1]] = positions
    for layer, looks in zip(vision.layers, _FIRST_LOOKS, strict=False):
        qkv = layer.get_submodule("attention").get_parameter("qkv.weight")
        for head, look in enumerate(looks[: config.num_attention_heads - 1]):
            _look_at(qkv, config, head, look)


def _whiten_patches(vision: ViT, config: VisionConfig, sample: Tensor) -> None:
    """Patch embeddings start as the sample's principal components, each of like strength.

    Else a patch's mean colour drowns its edges, and shapes are learned late (whitening as in CIFAR speed runs).
    """
    size, first = config.patch_size, config.hidden_size // config.num_attention_heads
    patches = sample.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * size**2)
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T).double())
    kept = min(config.hidden_size - first, len(values))
    scaled = (vectors / (values + _WHITENING_FLOOR).sqrt())[:, -kept:].T.float()
    vision.patch_embed.weight.zero_()
    vision.patch_embed.weight[first : first + kept] = scaled.view(kept, 3, size, size)
    vision.patch_embed.get_parameter("bias")[first : first + kept] = -scaled @ mean


def sine_positions(config: VisionConfig) -> Tensor:
    """[1 + patches, head_dim]: sines and cosines of the column, then of the row; zero for the class token.

    The frequencies are those at which different columns (rows) are orthogonal: pi * (k + 1/2) / n.
    """
    grid = config.image_size // config.patch_size
    axis = _waves(torch.arange(grid, dtype=torch.float32), config.hidden_size // config.num_attention_heads)
    columns, rows = axis[None, :].expand(grid, grid, -1), axis[:, None].expand(grid, grid, -1)
    patches = torch.cat([columns, rows], dim=-1).flatten(0, 1)
    return torch.cat([torch.zeros(1, patches.shape[1]), patches])


def _waves(places: Tensor, head_dim: int) -> Tensor:
    count = head_dim // 4
    angles = torch.outer(places, pi * (torch.arange(count) + 0.5) / count)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _look_at(qkv: Tensor, config: VisionConfig, head: int, look: tuple[int, int]) -> None:
    """One head's queries, turned by `look`, meet the keys of the patch there: <turn(p), q> peaks at q = p + look.

    qkv: packed weights [3 * width, width].
    """
    width = config.hidden_size
    head_dim = width // config.num_attention_heads
    count = head_dim // 4
    gain = sqrt(_LOOK_LOGIT * sqrt(head_dim) / count)
    turn = torch.zeros(head_dim, head_dim)
    for axis, offset in enumerate(look):
        sines, cosines = _waves(torch.tensor([float(offset)]), head_dim)[0].split_with_sizes([count, count])
        for index in range(count):
            s, c = 2 * count * axis + index, 2 * count * axis + count + index
            # sin(a + o) = sin a cos o + cos a sin o, cos(a + o) = cos a cos o - sin a sin o
            turn[s, s] = turn[c, c] = cosines[index]
            turn[s, c], turn[c, s] = sines[index], -sines[index]
    queries = slice(head * head_dim, (head + 1) * head_dim)
    keys = slice(width + queries.start, width + queries.stop)
    for rows, matrix in ((queries, turn), (keys, torch.eye(head_dim))):
        qkv[rows] = 0
        qkv[rows, :head_dim] = gain * matrix
