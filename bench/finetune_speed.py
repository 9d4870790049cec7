"""Fine-tuning against a plain loop: `bench/finetune_speed.py [--images 64] [--epochs 5]`.

A model of random weights, some 290 million of them in the proportions of the released one, learns the same rows about
drawn pictures twice, with LoRA, each time in a process of its own: by `finetune`, and by a loop as one writes it first,
which runs the image encoder at every step, pads every row to 320 tokens, and puts all of them through the output layer.
What is timed is all of it, from the rows to the last step, with loading, and for `finetune` the encoding of the images
and the writing of checkpoint, log and adapter. Tokens are those of the rows, without padding.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from finetune_memory import peak_memory
from visualglm.checkpoint.model_dir import write_model_directory
from visualglm.config import QFormerConfig, TextConfig, VisionConfig, VisualGLMConfig
from visualglm.loading import builtin_path
from visualglm.random_model import random_checkpoint
from visualglm.scenes.dataset import HELD_OUT_SEEDS
from visualglm.scenes.draw import draw_scene
from visualglm.scenes.questions import ask_about
from visualglm.scenes.scene import make_scene
from visualglm.training.recipe import FinetuneRecipe
from visualglm.training.recipe_file import read_recipe

PADDED = 320


@dataclass(frozen=True)
class Measured:
    """seconds: from the start to the last step; tokens: of all rows of all epochs; peak: resident memory in GiB."""

    seconds: float
    samples: int
    tokens: int
    peak: float
    last_loss: float

    def row(self, name: str) -> str:
        speed = f"{self.samples / self.seconds:.2f} | {self.tokens / self.seconds:.0f}"
        return f"| {name} | {self.seconds:.0f} | {speed} | {self.peak:.2f} | {self.last_loss:.3f} |"


def write_model(path: Path) -> None:
    """With the tokenizer of the built-in model."""
    builtin = VisualGLMConfig.from_file(builtin_path() / "config.json").text
    tokens = builtin.model_dump(include={name for name in TextConfig.model_fields if name.endswith("token_id")})
    config = VisualGLMConfig(
        vision=VisionConfig(hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8),
        qformer=QFormerConfig(
            hidden_size=384,
            intermediate_size=1536,
            num_hidden_layers=6,
            num_attention_heads=6,
            cross_attention_layers=(0, 2, 4),
        ),
        text=TextConfig(
            vocab_size=20480,
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=16,
            num_attention_heads=8,
            max_sequence_length=512,
            **tokens,
        ),
        dtype="bfloat16",
    )
    write_model_directory(path, replace(random_checkpoint(config), tokenizer_path=builtin_path() / "tokenizer.model"))


def write_rows(folder: Path, images: int) -> Path:
    """One question a picture, about all of it or about one thing."""
    random, rows = np.random.default_rng(0), []
    for number in range(images):
        scene = make_scene(HELD_OUT_SEEDS + number)
        draw_scene(scene).save(folder / f"{number}.png")
        asked = ask_about(scene, "describe" if number % 2 else "exists", "en" if number % 4 < 2 else "zh", random)
        if asked is not None:
            rows.append({"img": f"{number}.png", "prompt": asked.question, "label": asked.answer})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def run_finetune(recipe: FinetuneRecipe, folder: Path) -> float:
    """Returns the last loss."""
    from visualglm.training.finetune import finetune

    os.environ["VISUALGLM_CACHE"] = str(folder / "cache")
    finetune(recipe, folder / "run", device="cpu")
    lines = (folder / "run/log.jsonl").read_text("utf-8").splitlines()
    return float(json.loads(lines[-1])["losses"]["loss"])


def run_plain_loop(recipe: FinetuneRecipe, folder: Path) -> float:
    """The same rows in the same order, with the same workers, optimiser and clipping; returns the last loss."""
    import torch
    from torch.nn import functional

    from visualglm.checkpoint.model_dir import open_model_directory
    from visualglm.processing.tokenizer import Tokenizer
    from visualglm.training.run_data import RunData, plan_data
    from visualglm.training.torch.load import load_for_training
    from visualglm.training.torch.read_ahead import read_by_processes
    from visualglm.training.torch.trainable import make_trainable

    directory = open_model_directory(recipe.model or builtin_path())
    tokenizer = Tokenizer.for_model(directory.tokenizer_path or "", directory.config.text)
    planned = plan_data(recipe, tokenizer, directory.config)
    data = RunData(
        planned, recipe, tokenizer, directory.config, None, rank=0, world_size=1, read_ahead=read_by_processes
    )
    model = load_for_training(directory, recipe, torch.device("cpu"))
    parameters = list(make_trainable(model, recipe.tune, recipe.run.seed).parameters().values())
    optimizer = torch.optim.AdamW(parameters, recipe.optimizer.learning_rate, recipe.optimizer.betas)
    for (batch,) in data.batches(0):
        layout, extra = batch.layout, PADDED - batch.layout.sequence_length
        shifted = replace(
            layout,
            input_ids=np.pad(layout.input_ids, ((0, 0), (extra, 0)), constant_values=3),
            pad_lengths=layout.pad_lengths + extra,
            image_starts=layout.image_starts + extra,
        )
        labels = torch.from_numpy(np.pad(batch.labels, ((0, 0), (extra, 0)), constant_values=-100))
        with torch.no_grad():
            embeds = model.encode_images(torch.from_numpy(batch.pixels))
        hidden = model.hidden_states(
            torch.from_numpy(shifted.input_ids),
            embeds,
            torch.from_numpy(shifted.image_starts),
            torch.from_numpy(shifted.position_ids()),
            torch.from_numpy(shifted.attention_mask()).unsqueeze(1),
        )
        logits = model.text.lm_head(hidden[:, :-1]).float()
        loss = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, recipe.optimizer.max_grad_norm)
        optimizer.step()
    return float(loss.detach())


def timed(run: Callable[[FinetuneRecipe, Path], float], recipe: FinetuneRecipe, folder: Path, tokens: int) -> Measured:
    """In this process, which has done nothing before; libraries are imported beforehand."""
    import visualglm.training.finetune
    import visualglm.training.torch.engine  # noqa: F401

    started = time.perf_counter()
    loss = run(recipe, folder)
    seconds = time.perf_counter() - started
    rows = len((folder / "rows.jsonl").read_text("utf-8").splitlines())
    epochs = round(recipe.run.epochs or 1)
    return Measured(seconds, rows * epochs, tokens * epochs, peak_memory(), loss)


def count_tokens(recipe: FinetuneRecipe) -> int:
    """Of one epoch, without padding."""
    from visualglm.processing.tokenizer import Tokenizer
    from visualglm.training.run_data import plan_data

    path = recipe.model or builtin_path()
    config = VisualGLMConfig.from_file(path / "config.json")
    planned = plan_data(recipe, Tokenizer.for_model(path / "tokenizer.model", config.text), config)
    return int(planned.train.plan.lengths.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        recipe = read_recipe(
            None,
            {
                "model": folder / "model",
                "data.train": write_rows(folder, arguments.images),
                "data.held_out": 0,
                "run.epochs": arguments.epochs,
                "run.precision": arguments.precision,
                "optimizer.schedule": "constant",
                "optimizer.warmup_steps": 0,
            },
        )
        tokens = count_tokens(recipe)
        print("| | s | samples/s | tokens/s | peak RSS GiB | last loss |\n|---|---|---|---|---|---|", flush=True)
        found = []
        for title, run in (("plain loop", run_plain_loop), ("finetune", run_finetune)):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
                found.append(alone.submit(timed, run, recipe, folder, tokens).result())
            print(found[-1].row(title), flush=True)
    plain, ours = found
    print(f"{plain.seconds / ours.seconds:.1f} times the samples/s, {ours.peak / plain.peak:.2f} of the memory")


if __name__ == "__main__":
    main()
