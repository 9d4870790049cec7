"""The decoding loop, written once for all backends: prefill, then a step a token; rows that end leave the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from visualglm.backends.base import Backend, ImageEmbeds
from visualglm.config import TextConfig
from visualglm.errors import ConfigError, PromptError
from visualglm.generation.config import GenerationConfig
from visualglm.generation.sampling import Sampler
from visualglm.processing.layout import Layout


class Decoding:
    """One batch under way. Iterate over it for the (row, token) pairs of each step; `stop(row)` ends a row early.

    A row that has ended (by eos, by `stop` or by max_new_tokens) leaves the batch and costs nothing more.
    Raises `PromptError` if prompt and answer would not fit the model's window, `ConfigError` if the options name
    tokens that the model does not have or leave it none.
    """

    def __init__(
        self, backend: Backend, layout: Layout, image_embeds: Sequence[ImageEmbeds], config: GenerationConfig
    ) -> None:
        text = backend.config.text
        _check_tokens(config, text)
        needed = layout.sequence_length + config.max_new_tokens
        if needed > text.max_sequence_length:
            raise PromptError(
                f"A prompt of {layout.sequence_length} tokens and max_new_tokens {config.max_new_tokens} exceed "
                f"the model's window of {text.max_sequence_length} tokens; shorten one of them."
            )
        self._backend = backend
        self._layout = layout
        self._image_embeds = image_embeds
        self._config = config
        self._eos = text.eos_token_id if config.eos_token_id is None else config.eos_token_id
        image_length = backend.config.qformer.num_query_tokens
        self._samplers = [
            Sampler(config, layout.text_ids(row, image_length).tolist()) for row in range(layout.batch_size)
        ]
        self._stopped: set[int] = set()

    def stop(self, row: int) -> None:
        """End a row: nothing more is generated for it."""
        self._stopped.add(row)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        layout = self._layout
        rows = np.arange(layout.batch_size)
        capacity = layout.sequence_length + self._config.max_new_tokens - 1
        logits, cache = self._backend.prefill(layout, self._image_embeds, capacity)
        for remaining in reversed(range(self._config.max_new_tokens)):
            samplers = [self._samplers[row] for row in rows]
            tokens = np.array([sampler.next_token(scores) for sampler, scores in zip(samplers, logits, strict=True)])
            yield [(int(row), int(token)) for row, token in zip(rows, tokens, strict=True) if token != self._eos]
            going = np.flatnonzero((tokens != self._eos) & ~np.isin(rows, list(self._stopped)))
            if not remaining or not len(going):
                return
            if len(going) < len(rows):
                cache.keep_rows(going)
                layout, rows, tokens = layout.keep_rows(going), rows[going], tokens[going]
            logits = self._backend.step(tokens, layout, cache)


def _check_tokens(config: GenerationConfig, text: TextConfig) -> None:
    eos = () if config.eos_token_id is None else (config.eos_token_id,)
    beyond = [token for token in (*config.suppress_tokens, *eos) if token >= text.vocab_size]
    if beyond:
        raise ConfigError(f"The token {beyond[0]} does not exist: the model's tokens are 0 … {text.vocab_size - 1}.")
    if len(set(config.suppress_tokens)) == text.vocab_size:
        raise ConfigError("suppress_tokens names every token of the model, so that none is left; name fewer.")


def generate_ids(
    backend: Backend, layout: Layout, image_embeds: Sequence[ImageEmbeds], config: GenerationConfig
) -> list[list[int]]:
    """The new ids of each row, eos not included."""
    answers: list[list[int]] = [[] for _ in range(layout.batch_size)]
    for pairs in Decoding(backend, layout, image_embeds, config):
        for row, token in pairs:
            answers[row].append(token)
    return answers
