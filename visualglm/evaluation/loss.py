"""The loss of answers on any backend, at the positions where training has labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from visualglm.backends.base import Backend, ImageEmbeds
from visualglm.processing.layout import pad_batch
from visualglm.training.examples import IGNORED_LABEL, Example

AnswerLoss = tuple[float, int]
"""Negative log-likelihood in nats, summed over the labels, and how many these are."""

# Of the logits of one pass: they come for every column, and a vocabulary is large.
_LOGITS_BYTES = 2**28


def answer_losses(
    backend: Backend, examples: Sequence[Example], embeds: Sequence[ImageEmbeds | None]
) -> list[AnswerLoss]:
    """The loss of each example; `embeds` has the image of each, None without one.

    Costs a pass over prompt and answer, without a cache: about what the prompt of the question itself costs.
    """
    losses: dict[int, AnswerLoss] = {}
    for chosen in _batches(examples, backend.config.text.vocab_size):
        images = [image for image in (embeds[index] for index in chosen) if image is not None]
        losses.update(zip(chosen, _losses(backend, [examples[index] for index in chosen], images), strict=True))
    return [losses[index] for index in range(len(examples))]


def _batches(examples: Sequence[Example], vocab_size: int) -> Iterator[list[int]]:
    """Examples of like length, as many at once as their logits leave room for; the longest first."""
    by_length = sorted(range(len(examples)), key=lambda index: -len(examples[index].input_ids))
    while by_length:
        row_bytes = 4 * vocab_size * len(examples[by_length[0]].input_ids)
        size = max(1, _LOGITS_BYTES // row_bytes)
        yield by_length[:size]
        by_length = by_length[size:]


def _losses(backend: Backend, examples: Sequence[Example], images: Sequence[ImageEmbeds]) -> Iterator[AnswerLoss]:
    text = backend.config.text
    layout = pad_batch(
        [example.input_ids.tolist() for example in examples],
        [example.image_start for example in examples],
        pad_token_id=text.pad_token_id,
        bos_token_id=text.bos_token_id,
    )
    logits = backend.logits(layout, images)
    for scores, pads, example in zip(logits, layout.pad_lengths, examples, strict=True):
        columns = np.flatnonzero(example.labels != IGNORED_LABEL)
        # A label is predicted from the column before it.
        yield _nll(scores[pads + columns - 1], example.labels[columns]), len(columns)


def _nll(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The sum over labels [n] of the negative log of their softmax in `logits` [n, vocab]."""
    largest = logits.max(axis=1)
    log_sums = np.log(np.exp(logits - largest[:, None]).sum(axis=1, dtype=np.float64)) + largest
    return float((log_sums - logits[np.arange(len(labels)), labels]).sum())
