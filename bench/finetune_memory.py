"""Memory and time of steps of training on random weights: `bench/finetune_memory.py [--preset full] [--methods lora]`.

Each method runs in a process of its own: the weights are made in its memory (nothing is written), and then trained on
one row, with its picture going through the ViT at every step. The peak of resident memory includes the loading.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TypedDict

METHODS = ("lora", "qlora", "ptuning")


class Measured(TypedDict):
    """Seconds to load, seconds of each step, and the highest resident memory in GiB."""

    load: float
    steps: list[float]
    peak: float


class Case(TypedDict):
    """What is measured; `length` in tokens, a quarter of which are the answer."""

    preset: str
    method: str
    bits: int
    layers: list[int]
    length: int
    steps: int
    recompute: bool


def train(case: Case, results: multiprocessing.Queue[Measured]) -> None:
    import torch

    from visualglm.random_model import PRESETS, random_checkpoint
    from visualglm.training.recipe import DataRecipe, FinetuneRecipe, RunRecipe, TuneRecipe
    from visualglm.training.torch.load import load_for_training
    from visualglm.training.torch.trainable import make_trainable

    config = PRESETS[case["preset"]]
    tune = TuneRecipe(methods=(case["method"],), base_bits=case["bits"], layer_range=tuple(case["layers"]) or None)
    recipe = FinetuneRecipe(data=DataRecipe(train=Path("none")), tune=tune, run=RunRecipe(precision="bfloat16"))
    started = time.perf_counter()
    model = load_for_training(random_checkpoint(config), recipe, torch.device("cpu"))
    trainable = make_trainable(model, tune, seed=0, activation_checkpointing=case["recompute"])
    loaded = time.perf_counter() - started
    optimizer = torch.optim.AdamW(trainable.parameters().values(), lr=1e-4)
    step_of = step_on_one_row(trainable.loss, optimizer, config, case["length"])
    seconds = [timed(step_of) for _ in range(case["steps"])]
    results.put({"load": loaded, "steps": seconds, "peak": peak_memory()})


def step_on_one_row(loss_of, optimizer, config, length: int) -> Callable[[], None]:  # type: ignore[no-untyped-def]
    import numpy as np

    from visualglm.processing.layout import pad_batch
    from visualglm.training.batches import Batch

    text, queries, answer = config.text, config.qformer.num_query_tokens, length // 4
    ids = [100 + column % 500 for column in range(length)]
    ids[1 : 1 + queries] = [text.pad_token_id] * queries
    ids[-answer - 2 : -answer] = [text.gmask_token_id, text.bos_token_id]
    layout = pad_batch([ids], [1], pad_token_id=text.pad_token_id, bos_token_id=text.bos_token_id)
    labels = np.where(np.arange(length) >= length - answer - 1, layout.input_ids, -100)
    pixels = np.zeros((1, 3, config.vision.image_size, config.vision.image_size), np.float32)
    batch = Batch(layout, labels, pixels, None, (0,))

    def step() -> None:
        loss, count = loss_of(batch)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def peak_memory() -> float:
    """The most that this process has had in main memory, in GiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def measure(case: Case) -> Measured:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    child = context.Process(target=train, args=(case, results))
    child.start()
    child.join()
    if child.exitcode:
        sys.exit(f"Training with {case['method']} failed with {child.exitcode}.")
    measured: Measured = results.get()
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=("full", "medium", "tiny"), default="medium")
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=["lora", "qlora"])
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4, help="of the base of qlora")
    parser.add_argument("--layers", type=int, nargs="+", default=[], help="with LoRA; else the first and a middle one")
    parser.add_argument("--length", type=int, default=128, help="tokens of the row, a quarter of them the answer")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing")
    options = vars(parser.parse_args())
    print("| method | tokens | load s | s/step | peak RSS GiB |\n|---|---|---|---|---|")
    for method in options.pop("methods"):
        case: Case = {**options, "method": method}  # type: ignore[typeddict-item]
        found = measure(case)
        name = f"qlora int{case['bits']}" if method == "qlora" else f"{method} bf16"
        numbers = f"{found['load']:.0f} | {median(found['steps']):.1f} | {found['peak']:.1f}"
        print(f"| {name} | {case['length']} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
