"""A backend of the package as an engine to be measured; the workers differ only in which backend they load."""

from __future__ import annotations

import numpy as np

from engine_worker import seconds_of
from visualglm.backends.torch.backend import TorchBackend
from visualglm.benchmark import Decoding, random_prompt


class BackendEngine:
    """Measures a loaded backend as `visualglm bench` does."""

    abilities = ("images", "batches")

    def __init__(self, backend: TorchBackend) -> None:
        self._backend = backend
        self._decoding: tuple[int, int, Decoding] | None = None

    def encode(self) -> float:
        vision = self._backend.config.vision
        shape = (1, vision.in_channels, vision.image_size, vision.image_size)
        pixels = np.random.default_rng(0).standard_normal(shape, np.float32)
        return seconds_of(lambda: self._backend.encode_images(pixels))

    def prefill(self, tokens: int) -> float:
        layout = random_prompt(self._backend.config, tokens, has_image=False)
        return seconds_of(lambda: self._backend.prefill(layout, [], tokens))

    def decode(self, context: int, batch: int, steps: int) -> float:
        decoding = self._at(context, steps)
        decoding.spread(batch)
        return decoding.seconds_per_step()

    def _at(self, context: int, steps: int) -> Decoding:
        """Behind a prompt of `context` tokens, which is computed once as long as no other is asked for."""
        if self._decoding is None or self._decoding[:2] != (context, steps):
            self._decoding = None  # its cache is freed before there is another
            self._decoding = context, steps, Decoding(self._backend, context, steps)
        return self._decoding[2]
