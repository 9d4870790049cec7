"""Embeddings of images on disk, for training whose ViT and Q-Former stay as they are: computed once, read ever after."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visualglm.backends.base import ImageEmbeds
from visualglm.config import DType, VisualGLMConfig
from visualglm.training.rows import Report

Encode = Callable[[NDArray[np.float32]], Sequence[ImageEmbeds]]
"""Pixels [images, 3, S, S] → one `ImageEmbeds` an image, as `Backend.encode_images`."""


class ImageCache:
    """One file an image, named by the hash of its content, in a folder for the model and precision that computed it.

    folder: where the caches of all models lie. fingerprint: of the model. dtype: in which the embeddings are kept.
    Any number of processes may fill and read it at once.
    """

    def __init__(self, folder: Path, config: VisualGLMConfig, fingerprint: str, dtype: DType) -> None:
        raise NotImplementedError

    def read(self, image: Path) -> NDArray[np.float32]:
        """Embeddings [queries, text width] of an image; raises `ImageError` if they are not there or damaged."""
        raise NotImplementedError

    def missing(self, images: Iterable[Path]) -> list[Path]:
        """Those of `images` that have no entry, or a damaged one; each content once."""
        raise NotImplementedError

    def fill(self, images: Iterable[Path], encode: Encode, *, batch_size: int = 8, report: Report | None = None) -> int:
        """Compute what is missing; returns how many. Raises `ImageError`, or `DataError` if it cannot be written."""
        raise NotImplementedError
