"""Learned keys and values: what they do to attention, in prefill, in steps from a cache, and in padded batches."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import visualglm
from visualglm.backends.torch.backend import TorchBackend
from visualglm.backends.torch.prefix import random_prefixes, set_prefixes, with_prefix
from visualglm.model import VisualGLM
from visualglm.parameters import prefix_name

LENGTH = 5


@pytest.fixture
def tuned(tiny_model_dir: Path) -> Iterator[VisualGLM]:
    """A model with prefixes large enough to matter."""
    model = visualglm.load(tiny_model_dir, backend="torch", device="cpu")
    text = text_of(model)
    prefixes = random_prefixes(text, LENGTH, torch.Generator().manual_seed(0))
    set_prefixes(text, {name: 100 * prefix for name, prefix in prefixes.items()})
    yield model


def text_of(model: VisualGLM) -> torch.nn.Module:
    assert isinstance(model.backend, TorchBackend)
    return model.backend.model.text


def prompt(model: VisualGLM, *ids: int) -> list[int]:
    text = model.config.text
    return [20, *ids, text.gmask_token_id, text.bos_token_id]


def test_a_prefix_is_appended_and_visible_to_all() -> None:
    prefix = torch.arange(2 * 3 * LENGTH * 4.0).view(2, 3, LENGTH, 4)
    keys, values = torch.zeros(2, 2, 3, 7, 4, dtype=torch.bfloat16)
    mask = torch.zeros(2, 1, 6, 7, dtype=torch.bool)
    longer_keys, longer_values, longer_mask = with_prefix(prefix, keys, values, mask)
    assert longer_keys.shape == longer_values.shape == (2, 3, 7 + LENGTH, 4)
    assert longer_keys.dtype == torch.bfloat16
    for row in range(2):
        assert torch.equal(longer_keys[row, :, 7:], prefix[0].bfloat16())
        assert torch.equal(longer_values[row, :, 7:], prefix[1].bfloat16())
    assert longer_mask is not None
    assert longer_mask[..., 7:].all() and not longer_mask[..., :7].any()
    assert with_prefix(prefix, keys, values, None)[2] is None


def test_steps_from_a_cache_see_the_prefix(tuned: VisualGLM) -> None:
    ids = prompt(tuned, 30, 31, 32)
    answer = tuned.generate_ids(np.array([ids]), max_new_tokens=4, eos_token_id=0)[0]
    logits = tuned.logits(np.array([[*ids, *answer]]))[0]
    assert logits[len(ids) - 1 : -1].argmax(-1).tolist() == answer


def test_rows_of_a_padded_batch_are_what_they_are_alone(tuned: VisualGLM) -> None:
    short, long = prompt(tuned, 30), prompt(tuned, 31, 32, 33)
    pad = tuned.config.text.pad_token_id
    together = tuned.logits(np.array([[pad, pad, *short], long]))
    np.testing.assert_allclose(together[0, 2:], tuned.logits(np.array([short]))[0], atol=2e-5)
    np.testing.assert_allclose(together[1], tuned.logits(np.array([long]))[0], atol=2e-5)


def test_prefixes_can_be_taken_away(tuned: VisualGLM, tiny_model_dir: Path) -> None:
    ids = np.array([prompt(tuned, 30, 31)])
    plain = visualglm.load(tiny_model_dir, backend="torch", device="cpu").logits(ids)
    assert np.abs(tuned.logits(ids) - plain).max() > 0.01
    text = text_of(tuned)
    assert prefix_name(0).removeprefix("text.") in dict(text.named_parameters())
    set_prefixes(text, None)  # type: ignore[arg-type]
    assert not any("prefix" in name for name, _ in text.named_parameters())
    np.testing.assert_array_equal(tuned.logits(ids), plain)
