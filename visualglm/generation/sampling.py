"""From logits to the next token: penalties, temperature, top-k, top-p and the draw, for one row at a time."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from visualglm.errors import VisualGLMError
from visualglm.generation.config import GenerationConfig


class Sampler:
    """Chooses the tokens of one row.

    Each row draws from a generator of its own, seeded alike, so that its answer does not depend on the batch it is in.
    `prompt_ids` are the ids of the prompt's text; they and the answer's own count for the repetition penalty.
    """

    def __init__(self, config: GenerationConfig, prompt_ids: Iterable[int]) -> None:
        self._config = config
        self._seen = set(prompt_ids)
        self._rng = np.random.default_rng(config.seed)

    def next_token(self, logits: NDArray[np.float32]) -> int:
        """The token that follows, from float32 logits [vocab]. Raises `VisualGLMError` if they are not finite."""
        if not np.isfinite(logits).all():
            raise VisualGLMError(
                "The model's output is not a finite number: in float16 numbers overflowed, so load it in another "
                "precision; else weights (`visualglm check` tells) or pixels are damaged, so get them again."
            )
        scores = self._penalised(logits)
        token = self._draw(scores) if self._config.samples else int(scores.argmax())
        self._seen.add(token)
        return token

    def _penalised(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Suppressed tokens, and the repetition penalty (Keskar et al. 2019): lower scores for seen tokens."""
        penalty = self._config.repetition_penalty
        if penalty == 1.0 and not self._config.suppress_tokens:
            return logits
        scores = logits.copy()
        seen = np.fromiter(self._seen, np.int64, len(self._seen))
        scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
        scores[list(self._config.suppress_tokens)] = -np.inf
        return scores

    def _draw(self, scores: NDArray[np.float32]) -> int:
        temperature = 1.0 if self._config.temperature is None else self._config.temperature
        tokens = top_tokens(scores, self._config.top_k)
        probabilities = softmax(scores[tokens].astype(np.float64), temperature)
        kept = nucleus(probabilities, self._config.top_p)
        cumulative = probabilities[kept].cumsum()
        return int(tokens[kept][np.searchsorted(cumulative, self._rng.random() * cumulative[-1])])


def top_tokens(scores: NDArray[np.float32], top_k: int) -> NDArray[np.int64]:
    """The tokens of the `top_k` highest scores (all, where top_k is 0), in the order of their ids."""
    if not 0 < top_k < len(scores):
        return np.arange(len(scores))
    return np.sort(np.argpartition(scores, -top_k)[-top_k:])


def softmax(scores: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """Probabilities of `scores` divided by a temperature above 0, however small."""
    with np.errstate(over="ignore"):  # a quotient of -inf is a probability of 0
        exponentials = np.exp((scores - scores.max()) / temperature)
    probabilities: NDArray[np.float64] = exponentials / exponentials.sum()
    return probabilities


def nucleus(probabilities: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """Indices, ascending, of the fewest and largest probabilities that reach `top_p` (Holtzman et al. 2020)."""
    if top_p >= 1:
        return np.arange(len(probabilities))
    # All smaller ones together do not reach 1 - top_p: leaving them out first saves sorting a whole vocabulary.
    candidates = np.flatnonzero(probabilities >= (1 - top_p) / len(probabilities))
    largest_first = candidates[np.argsort(-probabilities[candidates], kind="stable")]
    size = int(np.searchsorted(probabilities[largest_first].cumsum(), top_p)) + 1
    return np.sort(largest_first[:size])
