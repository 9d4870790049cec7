"""A MindIR export as a `Backend`: numpy in, numpy out, in the one shape that its graphs have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from visualglm.backends.base import ImageEmbeds
from visualglm.backends.mindir.prompt import FixedPrompt
from visualglm.checkpoint.mindir_dir import MindirDirectory, MindirGraph
from visualglm.config import VisualGLMConfig
from visualglm.errors import PromptError
from visualglm.processing.layout import Layout


class Graph(Protocol):
    """A graph that has been loaded."""

    def __call__(
        self, inputs: Sequence[NDArray[Any]], past: Sequence[Any] = ()
    ) -> tuple[NDArray[np.float32], Sequence[Any]]:
        """Run it on arrays, and behind them on what an earlier run left; its first output as an array, and the others
        where they lie, to be such a past."""
        ...


class KVCache:
    """What the incremental graph needs of the columns so far: keys and values of all of them, wherever they lie.

    places: the row of the graph that each row of the text has; those of rows that have ended are computed on.
    """

    def __init__(self, past: Sequence[Any], length: int, rows: int) -> None:
        self.past = past
        self.length = length
        self.places: NDArray[np.int64] = np.arange(rows)

    def keep_rows(self, rows: NDArray[np.int64]) -> None:
        """Drop the finished rows: only `rows` stay, in that order, none of them twice."""
        self.places = self.places[rows]


class GrowingPrompt:
    """What an export without an incremental graph has in place of a cache: the text so far, to be run again."""

    def __init__(self, prompt: FixedPrompt) -> None:
        self.prompt = prompt

    @property
    def length(self) -> int:
        return self.prompt.layout.sequence_length

    def keep_rows(self, rows: NDArray[np.int64]) -> None:
        self.prompt = self.prompt.keep_rows(rows)


class MindirBackend:
    """The graphs of a MindIR directory. Its window is the length that was exported.

    Batches of fewer rows than were exported are filled up. description: what runs them, and where.
    """

    def __init__(
        self, directory: MindirDirectory, graphs: Mapping[MindirGraph, Graph], description: str, threads: int
    ) -> None:
        self.form = directory.manifest
        self.threads = threads
        self._config = directory.config
        self._graphs = graphs
        self._runtime = description

    @property
    def config(self) -> VisualGLMConfig:
        return self._config

    @property
    def description(self) -> str:
        return f"{self._runtime}, {self.form.precision}, {self.form.batch_size} × {self.form.seq_length}"

    def encode_images(self, pixels: NDArray[np.float32]) -> list[ImageEmbeds]:
        encode = self._graphs["vision_encoder"]
        return [ImageEmbeds(encode([image[None]])[0][0]) for image in pixels]

    def prefill(
        self, layout: Layout, image_embeds: Sequence[ImageEmbeds], capacity: int
    ) -> tuple[NDArray[np.float32], KVCache | GrowingPrompt]:
        prompt = self._prompt(layout, image_embeds, capacity)
        logits, past = self._run(prompt, layout.sequence_length - 1)
        cache = KVCache(past, layout.sequence_length, layout.batch_size)
        return logits, cache if self.form.use_past else GrowingPrompt(prompt)

    def step(self, token_ids: NDArray[np.int64], layout: Layout, cache: KVCache | GrowingPrompt) -> NDArray[np.float32]:
        self._require_length(cache.length + 1)
        if isinstance(cache, GrowingPrompt):
            cache.prompt = cache.prompt.append(token_ids)
            return self._run(cache.prompt, cache.length - 1)[0]
        rows, column, places = self.form.batch_size, cache.length, cache.places
        tokens, positions = np.zeros(rows, np.int32), np.zeros((rows, 2, 1), np.int32)
        visible = np.zeros((rows, 1, 1, self.form.seq_length), np.bool_)
        tokens[places], positions[places] = token_ids, layout.position_ids(column, column + 1)
        visible[places, 0, 0, :column] = np.arange(column) >= layout.pad_lengths[:, None]
        inputs = [tokens, positions, visible, np.array([column], np.int32)]
        logits, cache.past = self._graphs["inc"](inputs, cache.past)
        cache.length += 1
        return logits[places]

    def logits(self, layout: Layout, image_embeds: Sequence[ImageEmbeds]) -> NDArray[np.float32]:
        """As every backend; the graph gives those of one column, and so it runs once for each."""
        prompt = self._prompt(layout, image_embeds, layout.sequence_length)
        return np.stack([self._run(prompt, column)[0] for column in range(layout.sequence_length)], axis=1)

    def _run(self, prompt: FixedPrompt, column: int) -> tuple[NDArray[np.float32], Sequence[Any]]:
        """Logits [batch, vocab] after a column, and what the graph leaves."""
        logits, past = self._graphs["full"]([*prompt.arrays, np.array([column], np.int32)])
        return logits[: prompt.layout.batch_size], past

    def _prompt(self, layout: Layout, image_embeds: Sequence[ImageEmbeds], capacity: int) -> FixedPrompt:
        self._require_length(capacity)
        if layout.batch_size > self.form.batch_size:
            raise PromptError(
                f"{layout.batch_size} rows are to be answered at once, but the export was made for "
                f"{self.form.batch_size}; give --batch-size {self.form.batch_size}, or export the model with "
                f"--batch-size {layout.batch_size}."
            )
        return FixedPrompt(layout, tuple(image_embeds), self._config, self.form)

    def _require_length(self, columns: int) -> None:
        if columns > self.form.seq_length:
            raise PromptError(
                f"Prompt and answer take {columns} tokens, but the export was made for {self.form.seq_length}; shorten "
                "them, or export the model with a longer --seq-length."
            )
