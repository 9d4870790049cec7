"""The joined model: image → embeddings, embeddings in their slots, prefill and step."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from visualglm.backends.mindspore.chatglm import ChatGLM
from visualglm.backends.mindspore.qformer import QFormer
from visualglm.backends.mindspore.vit import ViT
from visualglm.config import VisualGLMConfig


class VisualGLMModel(nn.Cell):
    """ViT → Q-Former → projection → ChatGLM. Parameter names are those of `visualglm.parameters`."""

    def __init__(self, config: VisualGLMConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = ViT(config.vision)
        self.qformer = QFormer(config.qformer, config.vision.hidden_size)
        self.projection = nn.Dense(config.qformer.hidden_size, config.text.hidden_size)
        self.text = ChatGLM(config.text)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Pixels [images, 3, S, S] → image_embeds [images, queries, text width]."""
        # Parts that are trained may be in another precision than those that are not.
        vision = self.vision(ops.cast(pixels, self.vision.class_token.dtype))
        return self.projection(self.qformer(ops.cast(vision, self.qformer.query_tokens.dtype)))

    def embed(self, input_ids: Tensor, image_embeds: Tensor | None, image_starts: Tensor) -> Tensor:
        """Token embeddings [batch, seq, width] with each image in its row's slots.

        image_embeds: [images, queries, width], in the order of the rows that have one; more at the end do no harm, so
        that batches of any rows can have one shape.
        image_starts: int32 [batch], the column of the first slot, or -1 in a row without an image.
        """
        embeds = self.text.word_embeddings(input_ids)
        if image_embeds is None:
            return embeds
        images, queries, width = image_embeds.shape
        starts = ops.expand_dims(image_starts, 1)
        # The column of each within its image, and the number of that image.
        slots = ops.arange(input_ids.shape[1], dtype=ms.int32) - starts
        numbers = ops.cumsum(ops.cast(starts >= 0, ms.int32), 0) - 1
        is_slot = ops.logical_and(starts >= 0, ops.logical_and(slots >= 0, slots < queries))
        places = ops.select(is_slot, numbers * queries + slots, ops.zeros_like(slots))
        pictured = ops.gather(ops.reshape(image_embeds, (images * queries, width)), places, 0)
        shown = ops.broadcast_to(ops.expand_dims(is_slot, 2), embeds.shape)
        return ops.select(shown, ops.cast(pictured, embeds.dtype), embeds)

    def hidden_states(
        self,
        input_ids: Tensor,
        image_embeds: Tensor | None,
        image_starts: Tensor,
        position_ids: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """Hidden states [batch, seq, width] of a whole prompt; see `embed` and `ChatGLM`."""
        return self.text(self.embed(input_ids, image_embeds, image_starts), position_ids, mask)[0]

    def logits(
        self, input_ids: Tensor, image_embeds: Tensor, image_starts: Tensor, position_ids: Tensor, mask: Tensor
    ) -> Tensor:
        """Logits, float32 [batch, seq, vocab], of a whole prompt."""
        return self._logits(self.hidden_states(input_ids, image_embeds, image_starts, position_ids, mask))

    def prefill(
        self, input_ids: Tensor, image_embeds: Tensor, image_starts: Tensor, position_ids: Tensor, mask: Tensor
    ) -> tuple[Tensor, ...]:
        """Logits, float32 [batch, vocab], after the last column of a prompt, then its keys and values by layer."""
        hidden, *present = self.text(self.embed(input_ids, image_embeds, image_starts), position_ids, mask)
        return self._logits(hidden[:, -1]), *present

    def step(self, token_ids: Tensor, position_ids: Tensor, mask: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """One more token a row, int32 [batch] → logits, float32 [batch, vocab], then its keys and values by layer.

        The mask is of `past`; see `ChatGLM`.
        """
        embeds = self.text.word_embeddings(ops.expand_dims(token_ids, 1))
        hidden, *present = self.text(embeds, position_ids, mask, *past)
        return self._logits(hidden[:, -1]), *present

    def _logits(self, hidden: Tensor) -> Tensor:
        return ops.cast(self.text.lm_head(hidden), ms.float32)
