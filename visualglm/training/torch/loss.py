"""What is minimised: the cross-entropy of the answers of a batch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from visualglm.backends.torch.joined import IGNORED_LABEL, VisualGLMModel
from visualglm.backends.torch.load import exact_dtype
from visualglm.training.batches import Batch


def compute_loss(model: VisualGLMModel, batch: Batch) -> tuple[Tensor, int]:
    """Sum of the cross-entropies of the labels that count, a scalar of `exact_dtype`, and their number.

    Only the columns that predict a label go through `lm_head`. Divide by the number of labels of the whole step: over
    all processes and accumulated batches.
    """
    device = model.text.norm.weight.device

    def tensor(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(device)

    layout = batch.layout
    image_embeds = None if batch.image_embeds is None else tensor(batch.image_embeds)
    if batch.pixels is not None:
        image_embeds = model.encode_images(tensor(batch.pixels))
    hidden = model.hidden_states(
        tensor(layout.input_ids),
        image_embeds,
        torch.from_numpy(layout.image_starts),
        tensor(layout.position_ids()),
        tensor(layout.attention_mask()).unsqueeze(1),
    )
    count = int((batch.labels[:, 1:] != IGNORED_LABEL).sum())
    losses = model.answer_loss(hidden, tensor(batch.labels), reduction="none")
    # Else a sum over many tokens would depend on how they are spread over batches and processes.
    return losses.sum(dtype=exact_dtype(device)), count


class AnswerLoss(nn.Module):
    """`compute_loss` as a module, which is what DDP and FSDP wrap.

    autocast: the half precision that parts whose weights are kept in float32 compute in; None for none.
    """

    def __init__(self, model: VisualGLMModel, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast

    def forward(self, batch: Batch) -> tuple[Tensor, int]:
        with self._precision():
            return compute_loss(self.model, batch)

    def _precision(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.model.text.norm.weight.device.type, self.autocast)
