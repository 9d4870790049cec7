"""A backend of the package as an engine to be measured; the workers differ in which backend they load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from engine_worker import seconds_of
from visualglm.backends.base import Backend
from visualglm.benchmark import random_prompt
from visualglm.processing.layout import Layout

_ANY_TOKEN = 100


class BackendEngine:
    """Measures a loaded backend; `rewind(cache, length)` makes its cache forget the columns from `length` on."""

    abilities = ("images", "batches")

    def __init__(self, backend: Backend, rewind: Callable[[Any, int], None]) -> None:
        self._backend = backend
        self._rewind = rewind
        self._prompt: tuple[Layout, Any] | None = None

    def encode(self) -> float:
        vision = self._backend.config.vision
        shape = (1, vision.in_channels, vision.image_size, vision.image_size)
        pixels = np.random.default_rng(0).standard_normal(shape, np.float32)
        return seconds_of(lambda: self._backend.encode_images(pixels))

    def prefill(self, tokens: int) -> float:
        layout = random_prompt(self._backend.config, tokens, has_image=False)
        return seconds_of(lambda: self._backend.prefill(layout, [], tokens))

    def decode(self, context: int, batch: int, steps: int) -> float:
        layout, cache = self._behind(context, steps)
        rows = np.zeros(batch, np.int64)
        if layout.batch_size != batch:
            cache.keep_rows(rows)
            layout = layout.keep_rows(rows)
            self._prompt = layout, cache
        self._rewind(cache, context)
        return seconds_of(lambda: self._decode(layout, cache, steps)) / steps

    def _behind(self, context: int, steps: int) -> tuple[Layout, Any]:
        """A prompt of `context` tokens and its cache, computed once as long as no other is asked for."""
        if self._prompt is None or self._prompt[0].sequence_length != context:
            self._prompt = None  # the memory of its cache is needed for the next
            layout = random_prompt(self._backend.config, context, has_image=False)
            _, cache = self._backend.prefill(layout, [], context + steps)
            self._prompt = layout, cache
        return self._prompt

    def _decode(self, layout: Layout, cache: Any, steps: int) -> None:
        tokens = np.full(layout.batch_size, _ANY_TOKEN, np.int64)
        for _ in range(steps):
            tokens = self._backend.step(tokens, layout, cache).argmax(-1)
