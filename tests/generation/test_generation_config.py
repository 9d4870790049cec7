"""Generation options: what they mean together, and which are refused in what words."""

import numpy as np
import pytest

from visualglm.errors import ConfigError
from visualglm.generation.config import DEFAULT_MAX_NEW_TOKENS, GenerationConfig


@pytest.mark.parametrize(
    ("options", "samples"),
    [
        ({}, False),
        ({"temperature": 0.7}, True),
        ({"temperature": 1}, True),
        ({"top_k": 5}, True),
        ({"top_p": 0.9}, True),
        ({"temperature": 0}, False),
        ({"temperature": 0, "top_p": 0.5, "top_k": 9}, False),
        ({"top_k": 1, "temperature": 2.0}, False),
        ({"seed": 3, "repetition_penalty": 1.3}, False),
    ],
)
def test_greedy_unless_told_to_sample(options: dict[str, float], samples: bool):
    assert GenerationConfig.from_options(**options).samples is samples


def test_options_are_taken_in_any_likely_form():
    config = GenerationConfig.from_options(
        max_new_tokens=np.int64(7), stop="end", suppress_tokens=range(3), temperature=np.float32(0.5)
    )
    assert (config.max_new_tokens, config.stop, config.suppress_tokens) == (7, ("end",), (0, 1, 2))
    assert GenerationConfig.from_options(stop=["a", "b"], suppress_tokens=np.arange(2)).stop == ("a", "b")
    assert GenerationConfig.from_options().max_new_tokens == DEFAULT_MAX_NEW_TOKENS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 4}, r"The generation option beams is unknown; the options are max_new_tokens, temperature, top_k,"),
        ({"max_new_tokens": 0}, r"max_new_tokens is 0, but must be at least 1\."),
        ({"max_new_tokens": 2.5}, r"max_new_tokens is 2\.5, but must be a whole number\."),
        ({"temperature": -0.1}, r"temperature is -0\.1, but must be at least 0\.$"),
        ({"temperature": float("nan")}, r"temperature is nan, but must be "),
        ({"temperature": "hot"}, r"temperature is 'hot', but must be a number\."),
        ({"top_k": -1}, r"top_k is -1, but must be "),
        ({"top_p": 0}, r"top_p is 0, but must be above 0\.$"),
        ({"top_p": 1.1}, r"top_p is 1\.1, but must be "),
        ({"top_p": float("nan")}, r"top_p is nan, but must be "),
        ({"repetition_penalty": 0}, r"repetition_penalty is 0, but must be at least 0\.01\."),
        ({"repetition_penalty": 1e9}, r"repetition_penalty is 1000000000\.0, but must be "),
        ({"seed": -1}, r"seed is -1, but must be "),
        ({"stop": ""}, r"stop holds an empty text, but a stop string must not be empty\."),
        ({"stop": ["a", ""]}, r"stop holds an empty text, but a stop string must not be empty\."),
        ({"stop": 5}, r"stop is 5, but must be a list\."),
        ({"eos_token_id": -1}, r"eos_token_id is -1, but must be "),
        ({"suppress_tokens": [4, -1]}, r"suppress_tokens \(entry 2\) is -1, but must be at least 0\."),
    ],
)
def test_faults_are_told_in_one_sentence(options: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        GenerationConfig.from_options(**options)
    assert "\n" not in str(caught.value)
