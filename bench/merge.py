"""Measure merging at the sizes of the released model: `bench/merge.py [--layers N] [--folder DIR]`.

The model is of random weights, and the adapter has pairs beside every linear layer of the decoder. Time and peak of
resident memory are those of `visualglm merge` as users run it, proof included.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from visualglm.checkpoint.adapter_dir import AdapterDirectory, write_adapter
from visualglm.checkpoint.manifest import Source
from visualglm.checkpoint.model_dir import ModelDirectory
from visualglm.checkpoint.peft_config import peft_values
from visualglm.parameters import parameter_shapes
from visualglm.random_model import PRESETS, write_random_model

_LINEARS = ("attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2")


def write_random_adapter(path: Path, model: ModelDirectory, rank: int) -> AdapterDirectory:
    """Pairs for all linear layers of the decoder."""
    random, shapes = np.random.default_rng(0), parameter_shapes(model.config)
    layers = range(model.config.text.num_hidden_layers)
    modules = [f"text.layers.{layer}.{linear}" for layer in layers for linear in _LINEARS]
    lora = {}
    for module in modules:
        outputs, inputs = shapes[f"{module}.weight"]
        for part, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            values = random.normal(0, 0.02, shape).astype(np.float32)
            lora[f"base_model.model.{module}.lora_{part}.weight"] = values
    settings = peft_values(dict.fromkeys(modules, rank), rank=rank, alpha=2.0 * rank)
    return write_adapter(path, base=model, lora_settings=settings, lora=lora, source=Source(format="random"))


def merge_in_child(model: Path, adapter: Path, output: Path, dtype: str) -> tuple[float, float]:
    """Seconds, and peak of resident memory in GiB."""
    arguments = ["merge", str(model), str(adapter), str(output), "--dtype", dtype, "--force"]
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "visualglm.cli", *arguments])
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"The merge failed with {os.waitstatus_to_exitcode(status)}.")
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, help="of the decoder; else all 28, which takes 45 GB of disk")
    parser.add_argument("--rank", type=int, default=10)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "stored"])
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-merge"))
    arguments = parser.parse_args()
    config = PRESETS["full"]
    if arguments.layers:
        config = config.model_copy(
            update={"text": config.text.model_copy(update={"num_hidden_layers": arguments.layers})}
        )
    shutil.rmtree(arguments.folder, ignore_errors=True)
    arguments.folder.mkdir(parents=True)
    try:
        model = write_random_model(arguments.folder / "model", config)
        adapter = write_random_adapter(arguments.folder / "adapter", model, arguments.rank)
        rows = []
        for dtype in arguments.dtypes:
            seconds, gib = merge_in_child(model.path, adapter.path, arguments.folder / "merged", dtype)
            size = sum(file.stat().st_size for file in (arguments.folder / "merged").iterdir())
            rows.append(f"| {dtype} | {len(adapter.lora)} | {size / 1e9:.1f} | {seconds:.0f} | {gib:.2f} |")
            shutil.rmtree(arguments.folder / "merged")
        print("| merged weights | layers | GB | s | peak RSS GiB |\n|---|---|---|---|---|", *rows, sep="\n")
    finally:
        shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
