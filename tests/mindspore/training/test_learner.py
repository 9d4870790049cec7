"""One step, apart from the model: what is not finite, what losses are scaled by, and sums over processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.processing.layout import pad_batch
from visualglm.training.batches import Batch
from visualglm.training.mindspore.distributed import Processes
from visualglm.training.mindspore.engine import MindSporeEngine
from visualglm.training.mindspore.learner import LossScale, MindSporeLearner
from visualglm.training.recipe import DataRecipe, FinetuneRecipe, RunRecipe, TuneRecipe


@pytest.fixture
def learner(tiny_model_dir: Path) -> MindSporeLearner:
    recipe = FinetuneRecipe(
        data=DataRecipe(train=Path("none")), tune=TuneRecipe(lora_rank=2), run=RunRecipe(precision="float32")
    )
    engine = MindSporeEngine("cpu", compiled=False)
    return engine.load(open_model_directory(tiny_model_dir), recipe, with_encoder=False).learner(9, (9, 9))


@pytest.fixture
def batch(learner: MindSporeLearner) -> Batch:
    text = learner.model.config.text
    rows = [[20, 21, text.gmask_token_id, text.bos_token_id, 40, 41], [22, text.gmask_token_id, text.bos_token_id, 42]]
    layout = pad_batch(rows, [None, None], pad_token_id=text.pad_token_id, bos_token_id=text.bos_token_id)
    labels = np.full(layout.input_ids.shape, -100)
    labels[:, -2:] = layout.input_ids[:, -2:]
    return Batch(layout, labels, None, None, (0, 1))


def weights(learner: MindSporeLearner) -> np.ndarray:
    return np.concatenate([parameter.asnumpy().ravel() for parameter in learner.parameters.values()])


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_that_is_not_finite_is_left_out(learner: MindSporeLearner, batch: Batch, scaled: bool) -> None:
    learner.scale = LossScale() if scaled else None
    before = weights(learner)
    embeds = np.full((1, 4, learner.model.config.text.hidden_size), np.inf, np.float32)
    starts = np.array([2, -1])
    ill = replace(batch, layout=replace(batch.layout, image_starts=starts), image_embeds=embeds)
    assert not np.isfinite(learner.learn([ill], 0.1).grad_norm)
    assert np.array_equal(weights(learner), before)
    assert learner.scale is None or learner.scale.scale == 32768
    assert np.isfinite(learner.learn([batch], 0.1).grad_norm)
    assert not np.array_equal(weights(learner), before)


def test_the_scale_of_losses_changes_nothing(learner: MindSporeLearner, batch: Batch) -> None:
    plain = learner.learn([batch], 0.0)
    learner.scale = LossScale()
    scaled = learner.learn([batch], 0.0)
    assert scaled.losses == pytest.approx(plain.losses, abs=1e-6)
    assert scaled.grad_norm == pytest.approx(plain.grad_norm, rel=1e-5)
    assert learner.state().values["scaler"]["_growth_tracker"] == 1


def test_losses_are_scaled_as_torch_scales_them() -> None:
    ours, theirs = LossScale(growth_interval=3), torch.amp.GradScaler("cpu", init_scale=65536.0, growth_interval=3)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], 0.0)
    for finite in (True, True, False, True, True, True, True, True, False, True):
        theirs.scale(parameter.sum())
        parameter.grad = torch.tensor([1.0 if finite else float("inf")])
        theirs.step(optimizer)
        theirs.update()
        ours.update(finite=finite)
        assert vars(ours) == theirs.state_dict()


def test_evaluation_learns_nothing(learner: MindSporeLearner, batch: Batch) -> None:
    before = weights(learner)
    together = learner.evaluate([[batch]])
    split = [
        replace(batch, layout=batch.layout.keep_rows(np.array([row])), labels=batch.labels[[row]]) for row in (0, 1)
    ]
    assert learner.evaluate([split[:1], split[1:]]) == pytest.approx(together, abs=1e-6)
    assert learner.evaluate([]) == {}
    assert np.array_equal(weights(learner), before)


def test_one_process_adds_up_alone() -> None:
    alone = Processes(0, 1, "cpu")
    assert alone.sums([1 / 3, 2.0**40]) == [1 / 3, 2.0**40]
    assert alone.first_does(lambda: "x") == "x"
