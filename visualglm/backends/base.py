"""What a backend is: tensors and arithmetic behind four calls. Prompts, files and text are not its business."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from visualglm.checkpoint.adapter_dir import AdapterDirectory
from visualglm.config import VisualGLMConfig
from visualglm.processing.layout import Layout


@dataclass(frozen=True, eq=False)
class ImageEmbeds:
    """An encoded image: float32 [num_query_tokens, text width]. Made once, it can be asked about many times."""

    array: NDArray[np.float32]


class KVCache(Protocol):
    """The keys and values of a batch; whose they are and where they lie, only the backend knows."""

    @property
    def length(self) -> int:
        """Columns filled so far, padding included."""
        ...

    def keep_rows(self, rows: NDArray[np.int64]) -> None:
        """Drop all rows of the batch but `rows`."""
        ...


class Backend(Protocol):
    """A loaded model. Arrays are numpy: ids int64, pixels and logits float32."""

    @property
    def config(self) -> VisualGLMConfig: ...

    @property
    def description(self) -> str:
        """Backend, device and precision in a few words, such as "torch on cpu, bfloat16"."""
        ...

    @property
    def threads(self) -> int:
        """How many threads compute on the CPU."""
        ...

    def encode_images(self, pixels: NDArray[np.float32]) -> list[ImageEmbeds]:
        """Pixels [images, 3, S, S] → one `ImageEmbeds` an image."""
        ...

    def prefill(
        self, layout: Layout, image_embeds: Sequence[ImageEmbeds], capacity: int
    ) -> tuple[NDArray[np.float32], KVCache]:
        """Run a prompt; logits [batch, vocab] after its last column, and a cache with room for `capacity` columns.

        `image_embeds` are those of the rows that have an image, in the order of the rows.
        """
        ...

    def step(self, token_ids: NDArray[np.int64], layout: Layout, cache: Any) -> NDArray[np.float32]:
        """One token a row, [batch], in the column after those of the cache → logits [batch, vocab].

        `cache` is what this backend's `prefill` gave; no other backend's will do.
        """
        ...

    def logits(self, layout: Layout, image_embeds: Sequence[ImageEmbeds]) -> NDArray[np.float32]:
        """Logits [batch, seq, vocab] of a whole prompt, without a cache."""
        ...


@runtime_checkable
class AdaptableBackend(Backend, Protocol):
    """A backend that holds several adapters beside its model and computes with one of them, or with none."""

    def add_adapter(self, name: str, adapter: AdapterDirectory) -> None:
        """Load an adapter that fits the model and is finite, in place of another of that name, but use it not yet."""
        ...

    def use_adapter(self, name: str | None) -> None:
        """Compute with the adapter of that name from now on; None: with the model as it is."""
        ...
