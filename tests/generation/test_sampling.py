"""Sampling against brute-force definitions, on vocabularies small enough for that."""

from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from visualglm.errors import VisualGLMError
from visualglm.generation.config import GenerationConfig
from visualglm.generation.sampling import Sampler, nucleus, softmax, top_tokens

LOGITS = np.array([1.2, -0.4, 2.5, 2.1, -3.0, 0.3, 2.5 - 1e-3], np.float32)
DRAWS = 1500


def sampler(prompt_ids: tuple[int, ...] = (), **options: object) -> Sampler:
    return Sampler(GenerationConfig.from_options(**options), prompt_ids)


def distribution(logits: NDArray[np.float32], temperature: float, top_k: int, top_p: float) -> NDArray[np.float64]:
    """By definition: temperature, then the k likeliest, then the fewest likeliest that reach p."""
    shares = np.exp(logits.astype(np.float64) / temperature)
    ranked = sorted(range(len(logits)), key=lambda token: -shares[token])
    kept = ranked[:top_k] if top_k else ranked
    total, nucleus = sum(shares[token] for token in kept), []
    for token in kept:
        nucleus.append(token)
        if sum(shares[token] for token in nucleus) >= top_p * total:
            break
    found = np.zeros(len(logits))
    found[nucleus] = shares[nucleus]
    return found / found.sum()


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [*product((0.5, 2.0), (0, 2, 4), (1.0, 0.8, 0.3))])
def test_draws_follow_the_definition(temperature: float, top_k: int, top_p: float):
    chosen = sampler(temperature=temperature, top_k=top_k, top_p=top_p, seed=11)
    counts = np.bincount([chosen.next_token(LOGITS) for _ in range(DRAWS)], minlength=len(LOGITS))
    expected = distribution(LOGITS, temperature, top_k, top_p)
    assert not counts[expected == 0].any(), "tokens outside top_k and top_p are never drawn"
    deviation = np.sqrt(DRAWS * expected * (1 - expected))
    assert (np.abs(counts - DRAWS * expected) <= 4 * deviation + 1e-9).all()


def test_softmax_and_its_temperature():
    scores = LOGITS.astype(np.float64)
    for temperature in (0.1, 1.0, 100.0):
        shares = np.exp(scores / temperature)
        np.testing.assert_allclose(softmax(scores, temperature), shares / shares.sum(), rtol=1e-12)
    np.testing.assert_allclose(softmax(scores + 1e5, 1.0), softmax(scores, 1.0), rtol=1e-9)


@pytest.mark.parametrize("temperature", [1e-9, 1e-300, 5e-324])
def test_a_temperature_near_zero_is_greedy(temperature: float):
    chosen = sampler(temperature=temperature, seed=1)
    assert {chosen.next_token(LOGITS) for _ in range(50)} == {2}


@pytest.mark.parametrize("top_k", [0, 1, 3, 7, 99])
def test_top_tokens_are_the_highest(top_k: int):
    random = np.random.default_rng(0)
    for _ in range(20):
        scores = random.normal(size=7).astype(np.float32)
        expected = sorted(range(7), key=lambda token: -scores[token])[: top_k or 7]
        assert top_tokens(scores, top_k).tolist() == sorted(expected)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (1.0, [0, 1, 2, 3]),
        (0.999, [0, 1, 2, 3]),
        (0.95, [0, 1, 3]),
        (0.7501, [0, 1, 3]),
        (0.75, [1, 3]),
        (0.5, [3]),
        (1e-9, [3]),
    ],
)
def test_the_nucleus_is_the_fewest_that_reach_top_p(top_p: float, kept: list[int]):
    assert nucleus(np.array([0.2, 0.25, 0.05, 0.5]), top_p).tolist() == kept


def test_the_nucleus_of_a_large_vocabulary():
    random = np.random.default_rng(3)
    for spread in (0.1, 1.0, 5.0):
        probabilities = softmax(spread * random.normal(size=5000), 1.0)
        ranked = np.argsort(-probabilities)
        for top_p in (0.1, 0.7, 0.95, 0.999):
            size = int((probabilities[ranked].cumsum() < top_p).sum()) + 1
            assert nucleus(probabilities, top_p).tolist() == sorted(ranked[:size].tolist())


def test_a_seed_gives_the_same_draws_and_another_seed_others():
    def draws(seed: int | None) -> list[int]:
        chosen = sampler(temperature=1.5, seed=seed)
        return [chosen.next_token(LOGITS) for _ in range(30)]

    assert draws(4) == draws(4)
    assert draws(4) != draws(5)
    assert draws(None) != draws(None)


def test_greedy_takes_the_highest_and_of_equals_the_first():
    assert sampler().next_token(LOGITS) == 2
    assert sampler().next_token(np.array([1, 3, 3], np.float32)) == 1
    assert sampler(top_k=1, temperature=5.0).next_token(LOGITS) == 2


def test_a_penalty_lowers_seen_tokens_whatever_their_sign():
    above, below = np.array([1.0, 0.6, -5.0], np.float32), np.array([-1.0, -1.5, -5.0], np.float32)
    for logits in (above, below):
        assert sampler().next_token(logits) == 0
        assert sampler((0,), repetition_penalty=2.0).next_token(logits) == 1
        assert sampler((0, 1), repetition_penalty=2.0).next_token(logits) == 0
        assert sampler((1,), repetition_penalty=0.5).next_token(logits) == 1, "below 1 it raises them"
    assert above.tolist() == pytest.approx([1.0, 0.6, -5.0]), "the logits given are left as they are"


def test_the_answers_own_tokens_are_penalised_once_each():
    logits = np.array([4.0, 3.0, 2.5, 1.0], np.float32)
    chosen = sampler(repetition_penalty=1.5)
    # 4, 3, 2.5 → 2.67, 3 → 2.67, 2, 2.5 → 2.67 stays ahead: a token seen twice is not penalised twice.
    assert [chosen.next_token(logits) for _ in range(4)] == [0, 1, 0, 0]


def test_a_penalty_shifts_the_draws_by_definition():
    seen = (2, 4)
    penalised = LOGITS.copy()
    penalised[2] /= 1.7
    penalised[4] *= 1.7
    first = [
        sampler(seen, repetition_penalty=1.7, temperature=1.0, seed=seed).next_token(LOGITS) for seed in range(2000)
    ]
    expected = distribution(penalised, 1.0, 0, 1.0)
    deviation = np.sqrt(2000 * expected * (1 - expected))
    assert (np.abs(np.bincount(first, minlength=7) - 2000 * expected) <= 4 * deviation).all()


def test_suppressed_tokens_are_never_chosen():
    assert sampler(suppress_tokens=[2, 6]).next_token(LOGITS) == 3
    chosen = sampler(suppress_tokens=[2, 3, 6], temperature=50.0, seed=0)
    assert {chosen.next_token(LOGITS) for _ in range(300)} == {0, 1, 4, 5}
    # More than are left may be asked for.
    chosen = sampler(suppress_tokens=[2, 3, 6, 0, 1], top_k=6, seed=0)
    assert {chosen.next_token(LOGITS) for _ in range(300)} == {4, 5}


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"top_p": 0.5}, {"top_k": 3}, {"suppress_tokens": [0]}])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 1, slice(None)])
def test_output_that_is_not_finite_is_an_error(options: dict[str, object], value: float, where: int | slice):
    logits = LOGITS.copy()
    logits[where] = value
    with pytest.raises(
        VisualGLMError,
        match=r"not a finite number: in float16 .* load it in another precision; else weights",
    ):
        sampler(**options).next_token(logits)
