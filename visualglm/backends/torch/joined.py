"""The joined model: image → embeddings, embeddings in their slots, prefill and step."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from visualglm.backends.torch.chatglm import ChatGLM
from visualglm.backends.torch.kv_cache import KVCache
from visualglm.backends.torch.linear import Linear
from visualglm.backends.torch.qformer import QFormer
from visualglm.backends.torch.vit import ViT
from visualglm.config import VisualGLMConfig

IGNORED_LABEL = -100


class VisualGLMModel(nn.Module):
    """ViT → Q-Former → projection → ChatGLM. Parameter names are those of `visualglm.parameters`."""

    def __init__(self, config: VisualGLMConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = ViT(config.vision)
        self.qformer = QFormer(config.qformer, config.vision.hidden_size)
        self.projection = Linear(config.qformer.hidden_size, config.text.hidden_size)
        self.text = ChatGLM(config.text)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Pixels [images, 3, S, S] → image_embeds [images, queries, text width]."""
        # Parts that are trained may be in another precision than those that are not.
        vision = self.vision(pixels.to(self.vision.class_token.dtype))
        return self.projection(self.qformer(vision.to(self.qformer.query_tokens.dtype)))  # type: ignore[no-any-return]

    def embed(self, input_ids: Tensor, image_embeds: Tensor | None, image_starts: Tensor) -> Tensor:
        """Token embeddings [batch, seq, width] with each image in its row's slots.

        image_embeds: [rows with an image, queries, width], in the order of their rows.
        image_starts: int64 [batch], the column of the first slot, or -1 in a row without an image; better left on the
        CPU, since which rows have an image has to be known there.
        """
        embeds = self.text.word_embeddings(input_ids)
        if image_embeds is None:
            return embeds  # type: ignore[no-any-return]
        rows = torch.nonzero(image_starts >= 0)
        slots = image_starts[rows] + torch.arange(image_embeds.shape[1], device=rows.device)
        places = (rows.to(embeds.device), slots.to(embeds.device))
        return torch.index_put(embeds, places, image_embeds.to(embeds.dtype))

    def hidden_states(
        self,
        input_ids: Tensor,
        image_embeds: Tensor | None,
        image_starts: Tensor,
        position_ids: Tensor,
        mask: Tensor,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Hidden states [batch, seq, width] of a whole prompt; `cache` is filled when given."""
        embeds = self.embed(input_ids, image_embeds, image_starts)
        return self.text(embeds, position_ids, mask, cache)  # type: ignore[no-any-return]

    def step(self, token_ids: Tensor, position_ids: Tensor, mask: Tensor | None, cache: KVCache) -> Tensor:
        """One more token per row, int64 [batch] → logits [batch, vocab]."""
        hidden = self.text(self.text.word_embeddings(token_ids[:, None]), position_ids, mask, cache)
        return self.text.lm_head(hidden[:, -1])  # type: ignore[no-any-return]

    def answer_loss(self, hidden: Tensor, labels: Tensor, reduction: Literal["mean", "none"] = "mean") -> Tensor:
        """Cross-entropy, computed in float32, over the labels that count: their mean, or each, [labels that count].

        hidden: [batch, seq, width]; labels: int64 [batch, seq], -100 where nothing is learnt. The label of a column is
        predicted from the column before it; only those columns go through `lm_head`.
        """
        targets = labels[:, 1:]
        counted = targets != IGNORED_LABEL
        logits = self.text.lm_head(hidden[:, :-1][counted]).float()
        return functional.cross_entropy(logits, targets[counted], reduction=reduction)
