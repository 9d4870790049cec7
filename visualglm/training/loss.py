"""What is minimised: the cross-entropy of the answers of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from visualglm.backends.torch.joined import VisualGLMModel

if TYPE_CHECKING:
    from visualglm.training.batches import Batch


def compute_loss(model: VisualGLMModel, batch: Batch) -> tuple[Tensor, int]:
    """Sum of the cross-entropies of the labels that count, a float32 scalar, and their number.

    Only the columns that predict a label go through `lm_head`. Divide by the number of labels of the whole step: over
    all processes and accumulated batches.
    """
    raise NotImplementedError
