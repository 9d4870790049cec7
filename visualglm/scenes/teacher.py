"""Linear probes that read off the picture's embeddings what the drawing knows; thrown away after training.

They make learning from scratch a matter of an hour: the ViT is told what each patch shows, and the first image slots
what each shape is, before the decoder learns to speak.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from visualglm.config import VisualGLMConfig
from visualglm.scenes.dataset import MAX_CHARACTERS, PATCH_CLASSES, SHAPE_CLASSES
from visualglm.scenes.scene import MAX_SHAPES, TEXTURES

NOTHING_WEIGHT = 0.1


class SceneTeacher(nn.Module):
    """Cross-entropies of the drawing's own knowledge, from the ViT's patches and from the image embeddings."""

    def __init__(self, config: VisualGLMConfig) -> None:
        super().__init__()
        self.patches = nn.Linear(config.vision.hidden_size, sum(PATCH_CLASSES))
        width = config.text.hidden_size
        self.shapes = nn.Linear(width, sum(SHAPE_CLASSES))
        self.characters = nn.Linear(width, PATCH_CLASSES[4])
        self.texture = nn.Linear(width, len(TEXTURES))

    def patch_loss(self, vision: Tensor, targets: Tensor) -> Tensor:
        """vision: [scenes, 1 + patches, width]; targets: int64 [scenes, patches, len(PATCH_CLASSES)]."""
        logits = self.patches(vision[:, 1:]).split_with_sizes(list(PATCH_CLASSES), dim=-1)
        return _mean_loss(logits, targets.unbind(-1))

    def slot_loss(self, image_embeds: Tensor, targets: Tensor) -> Tensor:
        """image_embeds: [scenes, queries, width]; targets: int64 [scenes, slots], see `slot_targets`."""
        # Image embeddings are normalised by the decoder's first norm; the probes read them as it does.
        embeds = functional.layer_norm(image_embeds, image_embeds.shape[-1:])
        stop = MAX_SHAPES + MAX_CHARACTERS
        of_shapes, of_characters, of_texture = targets.split_with_sizes([4 * MAX_SHAPES, MAX_CHARACTERS, 1], dim=-1)
        shapes = self.shapes(embeds[:, :MAX_SHAPES]).split_with_sizes(list(SHAPE_CLASSES), dim=-1)
        shape_loss = _mean_loss(shapes, of_shapes.view(-1, MAX_SHAPES, 4).unbind(-1))
        character_loss = _mean_loss([self.characters(embeds[:, MAX_SHAPES:stop])], [of_characters])
        texture_loss = functional.cross_entropy(self.texture(embeds[:, stop]), of_texture[:, 0])
        return shape_loss + 0.5 * character_loss + 0.2 * texture_loss


def _mean_loss(logits: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Mean over several classifications; class 0, "nothing", is common and counts less.

    logits: [..., classes] each; targets: int64 [...] each.
    """
    losses = []
    for part, target in zip(logits, targets, strict=True):
        weight = part.new_ones(part.shape[-1])
        weight[0] = NOTHING_WEIGHT
        losses.append(functional.cross_entropy(part.flatten(0, -2), target.flatten(), weight))
    return torch.stack(losses).mean()
