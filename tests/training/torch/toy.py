"""A task small enough to be exact about, with dropout; as a program it is one process of a run.

`python -m tests.training.torch.toy FOLDER STEPS [MISHAP]` trains in as many processes as are launched.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import torch
from torch import Tensor, nn

from visualglm.errors import DataError
from visualglm.training.launch import faults_told_once
from visualglm.training.loop import Course, LoopConfig, Trainer
from visualglm.training.torch.distributed import Processes, join_processes, shard
from visualglm.training.torch.learner import Task, TorchLearner

ROWS = 8


def batches(processes: Processes, accumulation: int, first_step: int) -> Iterator[Sequence[Tensor]]:
    """The same rows of each step for any number of processes and batches: of unequal size in every other step."""
    for step in count(first_step):
        rows = torch.randn(ROWS - step % 2, 4, generator=torch.Generator().manual_seed(step))
        yield rows[processes.rank :: processes.world_size].tensor_split(accumulation)


def make_trainer(
    folder: Path,
    *,
    recipe: str = "a",
    steps: int = 12,
    dropout: float = 0.0,
    accumulation: int = 1,
    sharded: bool = False,
    scaled: bool = False,
    processes: Processes | None = None,
    keep: int = 2,
) -> Trainer[Tensor]:
    here = processes or join_processes("cpu")
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(4, 9), nn.GELU(), nn.Dropout(dropout), nn.Linear(9, 1)])
    model = _Stack(layers)
    torch.manual_seed(here.rank)
    if sharded:
        shard(model, here)
    task = Task(
        model,
        lambda module, batch: {"fit": (module(batch)[:, 0] - batch.sum(1)).square().sum()},
        len,
        sharded=sharded,
        scaled=scaled,
    )
    config = LoopConfig(total_steps=steps, checkpoint_every=5, keep_checkpoints=keep)
    course = Course(
        lambda first_step: batches(here, accumulation, first_step), lambda step: 0.05 * min(1.0, (step + 1) / 3)
    )
    learner = TorchLearner(config, task, here)
    return Trainer(config, learner, course, here, folder, {"recipe": recipe, "processes": here.world_size})


class _Stack(nn.Module):
    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def main(folder: Path, steps: int, mishap: str) -> None:
    """Mishaps befall the last process, in its third step."""
    processes = join_processes("cpu")
    trainer = make_trainer(folder, steps=steps, dropout=0.2, sharded=mishap == "shard", processes=processes)
    trainer.resume()
    unlucky = processes.rank == processes.world_size - 1
    for report in trainer.run():
        if unlucky and report.step == 3:
            _befall(mishap)
    processes.leave()


def _befall(mishap: str) -> None:
    if mishap == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if mishap == "fails":
        raise DataError("rows.jsonl, line 7 is gone.")
    if mishap == "alone":
        Path(os.environ["MARK"]).touch()
        time.sleep(60)


if __name__ == "__main__":
    with faults_told_once():
        main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "")
