"""The loop on a model small enough to be exact about: resumed and uninterrupted runs end in the same bits."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from tests.training.torch.toy import make_trainer
from visualglm.errors import CheckpointError, ConfigError
from visualglm.training.checkpoints import checkpoint_folders, load_checkpoint
from visualglm.training.loop import StepReport, Trainer
from visualglm.training.run_log import RunLog
from visualglm.training.torch.learner import TorchLearner

STEPS = 12


def learner(trainer: Trainer[Tensor]) -> TorchLearner[Tensor]:
    assert isinstance(trainer.learner, TorchLearner)
    return trainer.learner


def weights(trainer: Trainer[Tensor]) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in learner(trainer).parameters.values()])


def test_learns_and_keeps_the_newest_checkpoints(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, steps=40)
    reports = list(trainer.run())
    assert reports[-1].losses["fit"] < 0.5 * reports[0].losses["fit"]
    assert [report.step for report in reports] == list(range(1, 41))
    assert [report.weight for report in reports[:2]] == [8, 7]
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["step-00000035", "step-00000040"]


def test_a_resumed_run_is_bit_equal_to_one_never_stopped_also_with_dropout(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole", dropout=0.5)
    list(whole.run())
    stopped = make_trainer(tmp_path / "stopped", dropout=0.5)
    list(islice(stopped.run(), 7))  # two steps after the checkpoint of step 5
    torch.manual_seed(99)
    resumed = make_trainer(tmp_path / "stopped", dropout=0.5)
    assert resumed.resume()
    assert resumed.step == 5
    list(resumed.run())
    assert torch.equal(weights(resumed), weights(whole))
    assert not torch.equal(weights(resumed), weights(stopped))


def test_batches_that_make_a_step_count_as_one(tmp_path: Path) -> None:
    whole, split = make_trainer(tmp_path / "1"), make_trainer(tmp_path / "3", accumulation=3)
    for one, three in zip(whole.run(), split.run(), strict=True):
        assert three.losses["fit"] == pytest.approx(one.losses["fit"], abs=1e-6)
        assert three.grad_norm == pytest.approx(one.grad_norm, abs=1e-5)
    assert torch.allclose(weights(whole), weights(split), atol=1e-6, rtol=0)


def test_what_the_user_of_the_loop_notes_comes_back(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    for report in trainer.run():
        trainer.notes["best"] = report.step
    resumed = make_trainer(tmp_path)
    assert resumed.resume()
    assert resumed.notes == {"best": STEPS}


def test_nothing_to_resume_in_a_new_folder(tmp_path: Path) -> None:
    assert not make_trainer(tmp_path).resume()


def test_a_checkpoint_of_another_recipe_is_refused_by_what_differs(tmp_path: Path) -> None:
    list(make_trainer(tmp_path).run())
    with pytest.raises(ConfigError, match=r"step-00000012 was written by another recipe \(recipe was a and is b\);"):
        make_trainer(tmp_path, recipe="b").resume()


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    list(make_trainer(tmp_path).run())
    newest = checkpoint_folders(tmp_path)[-1]
    (newest / "optimizer.safetensors").write_bytes(b"not tensors")
    with pytest.raises(CheckpointError, match=f"{newest.name} is damaged"):
        make_trainer(tmp_path).resume()
    (newest / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"{newest.name} is damaged .optimizer.safetensors is missing"):
        make_trainer(tmp_path).resume()


@pytest.mark.parametrize("scaled", [False, True])
def test_steps_that_are_not_finite_are_left_out_and_counted(tmp_path: Path, scaled: bool) -> None:
    trainer = make_trainer(tmp_path, scaled=scaled)
    before = weights(trainer)
    trainer.course = replace(trainer.course, batches=lambda first_step: [[torch.full((8, 4), float("inf"))]] * STEPS)
    reports = list(trainer.run())
    assert all(report.skipped for report in reports)
    assert trainer.skipped_steps == STEPS
    assert torch.equal(weights(trainer), before)
    assert learner(trainer).scaler.get_scale() == (65536 / 2**STEPS if scaled else 1)


def test_the_scale_of_losses_changes_nothing_and_is_kept(tmp_path: Path) -> None:
    plain, scaled = make_trainer(tmp_path / "plain"), make_trainer(tmp_path / "scaled", scaled=True)
    list(plain.run())
    list(scaled.run())
    assert torch.allclose(weights(plain), weights(scaled), atol=1e-6, rtol=0)
    assert load_checkpoint(tmp_path / "scaled" / "step-00000012").values["scaler"]["scale"] == 65536


def test_evaluation_learns_nothing_and_draws_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, dropout=0.5)
    before, drawn = weights(trainer), torch.get_rng_state()
    rows = torch.ones(6, 4)
    evaluate = trainer.learner.evaluate
    together = evaluate([[rows]])
    assert evaluate([[rows[:1]], [rows[1:3], rows[3:]]]) == pytest.approx(together)
    assert evaluate([]) == {}
    assert torch.equal(weights(trainer), before)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert learner(trainer).task.module.training


def test_log_and_curve(tmp_path: Path) -> None:
    scalars = SummaryWriter(str(tmp_path / "runs"))
    log = RunLog(tmp_path / "log.jsonl", tmp_path / "curve.png", title="a run", scalars=scalars)
    for report in make_trainer(tmp_path / "run").run():
        log.append(report, {"fit": 1.0} if report.step % 4 == 0 else None)
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if "validation" in row] == [4, 8, 12]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "runs").glob("events.out.tfevents.*"))


def test_a_log_is_cut_back_to_the_checkpoint_a_run_goes_on_from(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 5, "losses": {}}\n{"step": 6, "losses": {}}\n{"step": 7, "los')
    RunLog(path, tmp_path / "curve.png", title="a run", first_step=5)
    assert path.read_text() == '{"step": 5, "losses": {}}\n'


def test_what_is_not_finite_is_none_in_the_log(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl", tmp_path / "curve.png", title="a run")
    log.append(StepReport(1, {"fit": float("nan")}, float("inf"), 0.1, skipped=True), {"fit": float("nan")})
    log.append(StepReport(2, {"fit": 0.5}, 1.0, 0.1))
    log.close()
    row = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert (row["losses"], row["grad_norm"], row["validation"]) == ({"fit": None}, None, {"fit": None})
    assert (tmp_path / "curve.png").is_file()
