"""Models of random weights in several sizes: nothing can be asked of them but how fast they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visualglm.checkpoint.contents import Checkpoint
from visualglm.checkpoint.manifest import Source
from visualglm.checkpoint.model_dir import ModelDirectory, write_model_directory
from visualglm.checkpoint.progress import Report
from visualglm.checkpoint.tensors import Piece
from visualglm.config import QFormerConfig, TextConfig, VisionConfig, VisualGLMConfig
from visualglm.parameters import Shape, parameter_shapes

# In the widths of the released model; the sizes of the smallest one are those of nothing in particular.
PRESETS = {
    "full": VisualGLMConfig(dtype="bfloat16"),
    "medium": VisualGLMConfig(
        vision=VisionConfig(num_hidden_layers=4),
        qformer=QFormerConfig(num_hidden_layers=2, cross_attention_layers=(0,)),
        text=TextConfig(num_hidden_layers=4),
        dtype="bfloat16",
    ),
    "tiny": VisualGLMConfig(
        vision=VisionConfig(
            image_size=56, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
        ),
        qformer=QFormerConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            cross_attention_layers=(0,),
        ),
        text=TextConfig(
            vocab_size=1000,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_sequence_length=512,
            mask_token_id=996,
            gmask_token_id=997,
            bos_token_id=998,
            eos_token_id=999,
        ),
        dtype="bfloat16",
    ),
}

# Elements from where one tensor begins in the block to where the next does: many blocks of any quantisation.
_STRIDE = 9973
_BLOCK_ELEMENTS = 1 << 23


@dataclass(frozen=True)
class RepeatedTensor:
    """A bfloat16 tensor, given as bits, whose elements are those of one block again and again, from `start` on.

    Tensors that begin at different places differ: equal ones a runtime may keep only once, and read from its caches.
    """

    block: NDArray[np.uint16] = field(repr=False)
    shape: Shape
    start: int = 0
    dtype: str = "bfloat16"

    def array(self) -> NDArray[Any]:
        return np.frombuffer(bytearray().join(self.pieces()), np.uint16).reshape(self.shape)

    def pieces(self) -> Iterator[Piece]:
        remaining, data = 2 * prod(self.shape), self._turned().view(np.uint8).data
        while remaining:
            piece = data[: min(remaining, len(data))]
            remaining -= len(piece)
            yield piece

    def regrouped(self, groups: Shape, axes: Shape) -> RepeatedTensor:
        """Itself: its order means nothing."""
        return self

    def _turned(self) -> NDArray[np.uint16]:
        return np.roll(self.block, -self.start)


def write_random_model(path: Path, config: VisualGLMConfig, report: Report | None = None) -> ModelDirectory:
    """Write a model directory of small random bfloat16 weights, without a tokenizer, as fast as the disk takes it.

    Raises `CheckpointError` if `path` is in use or the disk has no room for it.
    """
    return write_model_directory(path, random_checkpoint(config), report=report)


def random_checkpoint(config: VisualGLMConfig) -> Checkpoint:
    """Small random bfloat16 weights that are made when they are asked for."""
    values = np.random.default_rng(0).normal(0, 0.02, _BLOCK_ELEMENTS).astype(np.float32)
    block = (values.view(np.uint32) >> 16).astype(np.uint16)
    shapes = parameter_shapes(config).items()
    tensors = {name: RepeatedTensor(block, shape, _STRIDE * index) for index, (name, shape) in enumerate(shapes)}
    return Checkpoint(config, tensors, Source(format="random"))
