"""A ragged batch of random text, some of its rows with an image, to hold one way of computing against another."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from visualglm.config import VisualGLMConfig
from visualglm.processing.layout import Layout, pad_batch

# Rows of unlike length, the second and the last without an image.
LENGTHS, STARTS, CONTEXTS = (9, 14, 12, 6), (1, None, 0, None), (7, 10, 12, 3)


def random_pixels(config: VisualGLMConfig) -> NDArray[np.float32]:
    """The two images, float32 [2, 3, S, S]."""
    size = config.vision.image_size
    return np.random.default_rng(0).normal(size=(2, 3, size, size)).astype(np.float32)


def random_rows(config: VisualGLMConfig) -> list[list[int]]:
    """Ids of the rows, `<sop>` after the context of each."""
    random, bos = np.random.default_rng(1), config.text.bos_token_id
    rows = [random.integers(20, config.text.vocab_size, length).tolist() for length in LENGTHS]
    return [[*ids[:context], bos, *ids[context:]] for ids, context in zip(rows, CONTEXTS, strict=True)]


def layout_of(config: VisualGLMConfig, rows: Sequence[Sequence[int]], starts: Sequence[int | None] = STARTS) -> Layout:
    return pad_batch(rows, starts, pad_token_id=config.text.pad_token_id, bos_token_id=config.text.bos_token_id)


def close(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    """Within 5e-6 of the largest."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-6 * np.abs(expected).max())
