"""Kills fine-tuning at random moments: `bench/finetune_resume.py [--kills 50]`.

A run is killed with signal 9, resumed, killed again … until it ends; then the next one begins, until as many have been
killed as were asked for. After each kill the newest checkpoint must be whole, and each run that ends must leave the
very bits of one that was never stopped. Dropout is on, rows are read by workers, and steps are short, so that a fair
part of the moments lies within the writing of checkpoints, of the best adapter and of the log.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

import visualglm.training.torch.engine  # noqa: F401 - so that processes that are forked need not import it
from visualglm.training.checkpoints import checkpoint_folders, load_checkpoint
from visualglm.training.finetune import finetune
from visualglm.training.recipe import FinetuneRecipe
from visualglm.training.recipe_file import read_recipe
from visualglm.training.run_folder import RunFolder

SETTINGS: dict[str, object] = {
    "data.workers": 1,
    "tune.lora_dropout": 0.1,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
    "run.steps": 40,
    "run.batch_size": 2,
    "run.checkpoint_every": 2,
    "run.validate_every": 5,
    "run.log_every": 1,
}
ROWS = 12


@dataclass
class Tally:
    """What was seen: kills by the last whole step before them, runs that ended, and what was wrong."""

    kills: list[int] = field(default_factory=list)
    ended: int = 0
    faults: list[str] = field(default_factory=list)


def write_rows(folder: Path) -> Path:
    """Rows of text alone, of unequal length: what is killed is the run, not the drawing of pictures."""
    rows = [{"prompt": f"{number} + 1?", "label": f"{number + 1} " * (1 + number)} for number in range(ROWS)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def run(recipe: FinetuneRecipe, output: Path) -> None:
    """One run, in a process that was forked: everything is imported already."""
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        finetune(recipe, output, resume=True, device="cpu")


def start(recipe: FinetuneRecipe, output: Path) -> multiprocessing.context.ForkProcess:
    process = multiprocessing.get_context("fork").Process(target=run, args=(recipe, output))
    process.start()
    return process


def kill_until_it_ends(recipe: FinetuneRecipe, output: Path, seconds: float, kills: int, tally: Tally) -> None:
    """seconds: what a run takes that is not stopped. With no kill left, the run is let go on to its end."""
    while True:
        process = start(recipe, output)
        if len(tally.kills) < kills:
            process.join(random.uniform(0.02, seconds))
        else:
            process.join()
        if not process.is_alive():
            if process.exitcode:
                tally.faults.append(f"a run ended with exit code {process.exitcode}")
            tally.ended += 1
            return
        kill(process)
        tally.kills.append(newest_whole_step(output))


def kill(process: multiprocessing.context.ForkProcess) -> None:
    """With its workers, which else would look only after seconds whether it still lives."""
    family = psutil.Process(process.pid)
    workers = family.children(recursive=True)
    for member in (family, *workers):
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.join()


def newest_whole_step(output: Path) -> int:
    """Raises `CheckpointError` if what bears the name of a checkpoint is not whole."""
    steps = [load_checkpoint(path).step for path in checkpoint_folders(RunFolder(output).checkpoints)]
    return max(steps, default=0)


def files_of(output: Path) -> dict[str, bytes]:
    folder = RunFolder(output)
    return {
        str(path.relative_to(output)): path.read_bytes() for path in (*folder.adapter.iterdir(), *folder.best.iterdir())
    }


def measure(kills: int, folder: Path) -> Tally:
    recipe = read_recipe(None, {**SETTINGS, "data.train": write_rows(folder)})
    started = time.perf_counter()
    whole = start(recipe, folder / "whole")
    whole.join()
    seconds = time.perf_counter() - started
    expected, tally = files_of(folder / "whole"), Tally()
    while len(tally.kills) < kills:
        output = folder / f"killed-{tally.ended}"
        kill_until_it_ends(recipe, output, seconds, kills, tally)
        tally.faults += [
            f"{output.name}/{name} differs" for name, data in files_of(output).items() if data != expected[name]
        ]
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        tally = measure(arguments.kills, Path(folder))
    print(f"killed {len(tally.kills)} times, with the last whole checkpoint at step {tally.kills}")
    print(f"{tally.ended} runs ended; what differs from the run that was never stopped: {tally.faults or 'nothing'}")
    sys.exit(bool(tally.faults))


if __name__ == "__main__":
    main()
