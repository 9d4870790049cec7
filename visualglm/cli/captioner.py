"""Answers rows in batches, while threads decode the images of the next ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visualglm.cli.options import GenerationOptions, ImageOptions
from visualglm.cli.rows import FolderRows, Row, Rows
from visualglm.errors import ImageError, PromptError
from visualglm.model import Reply, VisualGLM
from visualglm.processing.ahead import prepared_batches
from visualglm.processing.image import load_image, preprocess

_SHORT_QUESTION = "?"

Prepared = NDArray[np.float32] | None | ImageError | PromptError
"""Pixels [3, S, S], nothing for a row without an image, or why the row cannot be answered."""


class Captioner:
    """A model that answers rows."""

    def __init__(self, model: VisualGLM, generation: GenerationOptions, images: ImageOptions) -> None:
        self._model = model
        self._generation = generation
        self._config = generation.config()
        self._limits = images.limits()
        self._allow_urls = images.allow_urls

    def require_room(self, rows: Rows) -> None:
        """Raises `PromptError` if no row's question fits: told once, and not in each of them."""
        question = rows.prompt if isinstance(rows, FolderRows) else _SHORT_QUESTION
        try:
            self._prompt(question, has_image=all(row.source is not None for row in rows))
        except PromptError as error:
            raise PromptError(
                f"With {self._config.max_new_tokens:,} tokens for the answer, the model's window of "
                f"{self._model.config.text.max_sequence_length:,} tokens has no room for the question of any row; "
                "ask for fewer new tokens or shorten the prompt."
            ) from error

    @contextmanager
    def answers(self, rows: Iterable[Row], batch_size: int, start: int = 0) -> Iterator[Iterator[list[dict[str, Any]]]]:
        """The output rows of `rows` from the one at `start` on, a batch at a time: see `prepared_batches`."""
        with prepared_batches(rows, self._prepare, batch_size, start) as batches:
            yield map(self._answer, batches)

    def _prepare(self, row: Row) -> Prepared:
        try:
            self._prompt(row.prompt, has_image=row.source is not None)
            if row.source is None:
                return None
            image = load_image(row.source, self._limits, allow_urls=self._allow_urls)
            return preprocess(image, self._model.config.vision.image_size)
        except (ImageError, PromptError) as error:
            return error

    def _prompt(self, question: str, *, has_image: bool) -> None:
        """Raises `PromptError` if the question cannot be put."""
        self._model.prompt(question, has_image=has_image, language=self._generation.language, config=self._config)

    def _answer(self, batch: Sequence[tuple[Row, Prepared]]) -> list[dict[str, Any]]:
        pixels = [prepared for _, prepared in batch if isinstance(prepared, np.ndarray)]
        embeds = iter(self._model.backend.encode_images(np.stack(pixels)) if pixels else ())
        pairs = [
            (None if prepared is None else next(embeds), row.prompt)
            for row, prepared in batch
            if not isinstance(prepared, Exception)
        ]
        replies = iter(self._model.reply_batch(pairs, batch_size=len(batch), **self._generation.keywords()))
        return [
            row.named() | ({"error": str(prepared)} if isinstance(prepared, Exception) else _answer_of(next(replies)))
            for row, prepared in batch
        ]


def _answer_of(reply: Reply) -> dict[str, Any]:
    return {"answer": reply.text, "prompt_tokens": reply.prompt_tokens, "new_tokens": reply.new_tokens}
