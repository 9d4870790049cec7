"""The loop on a model small enough to be exact about: resumed and uninterrupted runs end in the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from visualglm.errors import CheckpointError, ConfigError
from visualglm.training.checkpoints import TrainingState, checkpoint_folders, load_checkpoint, save_checkpoint
from visualglm.training.curve import draw_curve
from visualglm.training.loop import LoopConfig, Trainer, append_log

STEPS = 12


def batches(first_step: int) -> Iterator[Tensor]:
    for step in count(first_step):
        yield torch.randn(8, 4, generator=torch.Generator().manual_seed(step))


def make_trainer(folder: Path, *, recipe: str = "a", **changes: float) -> Trainer[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))

    def losses(batch: Tensor) -> dict[str, Tensor]:
        return {"fit": (model(batch)[:, 0] - batch.sum(1)).square().mean()}

    options = {"total_steps": STEPS, "learning_rate": 0.05, "warmup_steps": 3, "checkpoint_every": 5, **changes}
    config = LoopConfig(**options)  # type: ignore[arg-type]
    return Trainer(config, {"model": model}, losses, batches, folder, {"recipe": recipe})


def weights(trainer: Trainer[Tensor]) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.parameters])


def test_learns_and_keeps_the_newest_checkpoints(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    reports = list(trainer.run())
    assert reports[-1].losses["fit"] < 0.5 * reports[0].losses["fit"]
    assert [report.step for report in reports] == list(range(1, STEPS + 1))
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["step-00000010", "step-00000012"]


def test_a_resumed_run_is_bit_equal_to_one_never_stopped(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole")
    list(whole.run())
    stopped = make_trainer(tmp_path / "stopped")
    list(islice(stopped.run(), 7))  # two steps after the checkpoint of step 5
    resumed = make_trainer(tmp_path / "stopped")
    assert resumed.resume()
    assert resumed.step == 5
    list(resumed.run())
    assert torch.equal(weights(resumed), weights(whole))


def test_nothing_to_resume_in_a_new_folder(tmp_path: Path) -> None:
    assert not make_trainer(tmp_path).resume()


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    list(make_trainer(tmp_path).run())
    with pytest.raises(ConfigError, match="another recipe"):
        make_trainer(tmp_path, recipe="b").resume()


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    list(make_trainer(tmp_path).run())
    newest = checkpoint_folders(tmp_path)[-1]
    (newest / "optimizer.safetensors").write_bytes(b"not tensors")
    with pytest.raises(CheckpointError, match=f"{newest.name} is damaged"):
        make_trainer(tmp_path).resume()


def test_gradients_are_clipped_and_steps_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    before = weights(trainer)
    trainer.batches = lambda first_step: iter([torch.full((8, 4), float("inf"))] * STEPS)
    reports = list(trainer.run())
    assert all(report.skipped for report in reports)
    assert trainer.skipped_steps == STEPS
    assert torch.equal(weights(trainer), before)


def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    script = f"""
import resource, sys
import torch
from pathlib import Path
from visualglm.errors import CheckpointError
from visualglm.training.checkpoints import TrainingState, save_checkpoint
folder = Path({str(tmp_path)!r})
save_checkpoint(folder, TrainingState(1, {{"model": {{"w": torch.ones(10)}}}}, {{}}))
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    save_checkpoint(folder, TrainingState(2, {{"model": {{"w": torch.ones(100_000)}}}}, {{}}))
except CheckpointError as error:
    sys.exit(str(error))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 1
    assert "step-00000002 could not be written" in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert torch.equal(load_checkpoint(tmp_path / "step-00000001").tensors["model"]["w"], torch.ones(10))


def test_kill_minus_nine_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    script = f"""
import torch
from itertools import count
from pathlib import Path
from visualglm.training.checkpoints import TrainingState, save_checkpoint
for step in count(1):
    state = TrainingState(step, {{"model": {{"w": torch.full((200_000,), float(step))}}}}, {{}})
    save_checkpoint(Path({str(tmp_path)!r}), state)
    print(step, flush=True)
"""
    for attempt in range(3):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        if process.stdout is None:
            raise AssertionError
        for _ in range(3 + attempt):
            process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        for folder in checkpoint_folders(tmp_path):
            state = load_checkpoint(folder)
            assert torch.equal(state.tensors["model"]["w"], torch.full((200_000,), float(state.step)))


def test_state_round_trips(tmp_path: Path) -> None:
    state = TrainingState(3, {"model": {"w": torch.arange(6.0).view(2, 3)}}, {"note": "x"})
    loaded = load_checkpoint(save_checkpoint(tmp_path, state))
    assert (loaded.step, loaded.values) == (3, {"note": "x"})
    assert torch.equal(loaded.tensors["model"]["w"], state.tensors["model"]["w"])


def test_log_and_curve(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    for report in make_trainer(tmp_path / "run").run():
        append_log(log, report)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    draw_curve(log, tmp_path / "curve.png", title="a run")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
