"""Linear probes that read off the picture's embeddings what the drawing knows; thrown away after training.

They make learning from scratch a matter of an hour: the ViT is told what each patch shows, and the first image slots what
each shape is, while the decoder is still learning to speak.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from visualglm.config import VisualGLMConfig
from visualglm.scenes.dataset import MAX_CHARACTERS, PATCH_CLASSES, SHAPE_CLASSES, SLOT_CLASSES
from visualglm.scenes.scene import MAX_SHAPES, TEXTURES


class SceneTeacher(nn.Module):
    """Cross-entropies of the drawing's own knowledge, from the ViT's patches and from the image embeddings."""

    def __init__(self, config: VisualGLMConfig) -> None:
        super().__init__()
        self.patches = nn.Linear(config.vision.hidden_size, sum(PATCH_CLASSES))
        width = config.text.hidden_size
        self.shapes = nn.Linear(width, sum(SHAPE_CLASSES))
        self.characters = nn.Linear(width, PATCH_CLASSES[3])
        self.texture = nn.Linear(width, len(TEXTURES))

    def patch_loss(self, vision: Tensor, targets: Tensor) -> Tensor:
        """vision: [scenes, 1 + patches, width]; targets: int64 [scenes, patches, 4]."""
        return _split_cross_entropy(self.patches(vision[:, 1:]).flatten(0, 1), PATCH_CLASSES, targets.flatten(0, 1))

    def slot_loss(self, image_embeds: Tensor, targets: Tensor) -> Tensor:
        """image_embeds: [scenes, queries, width]; targets: int64 [scenes, len(SLOT_CLASSES)]."""
        # Image embeddings are normalised by the decoder's first norm; the probes read them as it does.
        embeds = functional.layer_norm(image_embeds, image_embeds.shape[-1:])
        stop = MAX_SHAPES + MAX_CHARACTERS
        logits = [
            self.shapes(embeds[:, :MAX_SHAPES]).flatten(1),
            self.characters(embeds[:, MAX_SHAPES:stop]).flatten(1),
            self.texture(embeds[:, stop]),
        ]
        return _split_cross_entropy(torch.cat(logits, 1), SLOT_CLASSES, targets)


def _split_cross_entropy(logits: Tensor, classes: Sequence[int], targets: Tensor) -> Tensor:
    """Mean over several classifications whose logits lie side by side in the last dimension."""
    parts = logits.split(list(classes), dim=-1)
    losses = [functional.cross_entropy(part, target) for part, target in zip(parts, targets.unbind(-1), strict=True)]
    return torch.stack(losses).mean()
