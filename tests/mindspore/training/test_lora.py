"""The pairs that training begins with, and what dropout leaves of their inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.training.mindspore.engine import MindSporeEngine, MindSporeTuned
from visualglm.training.mindspore.lora import initial_pairs
from visualglm.training.recipe import DataRecipe, FinetuneRecipe, RunRecipe, TuneRecipe
from visualglm.training.torch.load import load_for_training
from visualglm.training.torch.trainable import make_trainable

TUNE = TuneRecipe(lora_rank=3, layer_range="all", target_modules=("fc2", "qkv", "proj", "fc1"), lora_dropout=0.25)


def recipe_of(tune: TuneRecipe) -> FinetuneRecipe:
    return FinetuneRecipe(data=DataRecipe(train=Path("none")), tune=tune, run=RunRecipe(seed=7))


def tuned(model: Path) -> MindSporeTuned:
    directory = open_model_directory(model)
    return MindSporeEngine("cpu", compiled=False).load(directory, recipe_of(TUNE), with_encoder=False)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_pairs_begin_with_the_bits_of_peft(tiny_model_dir: Path, seed: int) -> None:
    directory = open_model_directory(tiny_model_dir)
    model = load_for_training(directory, recipe_of(TUNE), torch.device("cpu"), ["text"])
    expected = make_trainable(model, TUNE, seed).parameters()
    found = dict(initial_pairs(TUNE, directory.config.text, seed))
    assert 2 * len(found) == len(expected)
    for module, a in found.items():
        np.testing.assert_array_equal(a, expected[f"{module}.lora_A.default.weight"].detach().numpy())
        assert not expected[f"{module}.lora_B.default.weight"].any()


def test_dropout_is_drawn_by_its_key_and_leaves_the_mean(tiny_model_dir: Path) -> None:
    pairs = tuned(tiny_model_dir).pairs
    pairs.reserve(8, 50)

    def kept() -> list[np.ndarray]:
        return [cell.kept.asnumpy().copy() for cell in pairs.cells.values()]

    pairs.drop((7, 0, 1))
    first = kept()
    assert all(set(np.unique(array)) == {0.0, np.float32(1 / 0.75)} for array in first)
    assert all(abs(array.mean() - 1) < 0.05 for array in first)
    assert not np.array_equal(first[0], first[4])  # of the next layer
    pairs.drop((7, 1, 1))
    assert not np.array_equal(first[0], kept()[0])
    pairs.drop((7, 0, 1))
    assert all(map(np.array_equal, first, kept()))
    pairs.drop(None)
    assert all((array == 1).all() for array in kept())
