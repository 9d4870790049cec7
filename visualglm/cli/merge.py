"""`visualglm merge`: a model and its adapter as one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from visualglm.checkpoint.adapter_dir import open_adapter
from visualglm.checkpoint.instead import is_adapter
from visualglm.checkpoint.merge import Merge
from visualglm.checkpoint.merge import merge as merge_adapter
from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.cli.adapters import adapter_facts
from visualglm.cli.messages import Messages, print_table
from visualglm.cli.options import Quiet
from visualglm.errors import ConfigError
from visualglm.memory import gib


def merge(
    model: Annotated[Path, Argument(metavar="MODEL", help="Model directory that the adapter was trained on.")],
    adapter: Annotated[Path, Argument(metavar="ADAPTER", help="What fine-tuning made of it.")],
    output: Annotated[Path, Argument(metavar="OUT", help="Folder to be made.")],
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16", "stored"],
        Option(help="Of the weights that change; float32 loses nothing, stored: what each is in MODEL."),
    ] = "float32",
    force: Annotated[bool, Option("--force", help="Replace OUT if it holds a checkpoint and nothing else.")] = False,
    quiet: Quiet = False,
) -> None:
    """Merge an adapter into its model, a few rows at a time: a model directory that is used like any other.

    What was written is read back: each changed layer must give base(x) + Δ(x) for random x, up to rounding.
    """
    messages = Messages(quiet)
    if is_adapter(model):
        raise ConfigError(f"{model} is an adapter, which comes second; give the model first.")
    directory, opened = open_model_directory(model), open_adapter(adapter)
    if opened.warning:
        messages.tell(f"Warning: {opened.warning}")
    with messages.byte_progress("merging") as report:
        done = merge_adapter(
            directory, opened, output, dtype=None if dtype == "stored" else dtype, force=force, report=report
        )
    print_table([("model", str(model)), *adapter_facts(opened), *_facts(done)])


def _facts(done: Merge) -> list[tuple[str, str]]:
    facts = [("output", f"{done.output.path}: model directory, {gib(done.output.weights_bytes)}")]
    worst = max(done.deviations, key=lambda deviation: deviation.relative, default=None)
    if worst:
        facts.append(
            (
                "proof",
                f"merged(x) = base(x) + Δ(x) in {len(done.deviations)} layers, on random x; the largest deviation is "
                f"{worst.relative:.1e} of a layer's largest output, in {worst.module}",
            )
        )
    return facts
