"""`visualglm convert`: checkpoints from one format to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from visualglm.checkpoint.convert import Conversion, Format
from visualglm.checkpoint.convert import convert as convert_checkpoint
from visualglm.cli.messages import Messages, print_table
from visualglm.cli.options import Quiet
from visualglm.memory import gib

_TITLES: dict[Format, str] = {"model": "model directory", "sat": "SAT archive", "hf": "Hugging Face checkpoint"}
_LAYOUTS = {"thirds": "q, k and v one after the other", "per_head": "q, k and v head by head"}


def convert(
    source: Annotated[Path, Argument(metavar="SOURCE", help="Folder with a checkpoint; its format is recognised.")],
    output: Annotated[Path, Argument(metavar="OUT", help="Folder to be made.")],
    to: Annotated[Format, Option(help="Format to write: model directory, SAT archive or Hugging Face.")] = "model",
    tokenizer: Annotated[
        Path | None, Option(metavar="FILE", help="ice_text.model; else the one beside the weights.")
    ] = None,
    force: Annotated[bool, Option("--force", help="Replace OUT if it holds a checkpoint and nothing else.")] = False,
    quiet: Quiet = False,
) -> None:
    """Convert a checkpoint: SAT, Hugging Face or model directory, in any direction.

    Weights are kept bit by bit and read one tensor at a time; no code in a checkpoint is run.
    """
    messages = Messages(quiet)
    with messages.byte_progress("converting") as report:
        done = convert_checkpoint(source, output, to=to, tokenizer=tokenizer, force=force, report=report)
    print_table(_facts(done))
    if done.dropped:
        messages.tell(f"left out, since {_TITLES[to]}s have no place for it: {', '.join(done.dropped)}")
    if to == "model" and not done.has_tokenizer:
        messages.tell(
            "Warning: there is no tokenizer, so this model can be converted back but not asked; "
            "convert it again with --tokenizer ice_text.model."
        )
    if done.license_text:
        messages.tell(f"\n{done.license_text.strip()}")


def _facts(done: Conversion) -> list[tuple[str, str]]:
    return [
        ("source", f"{done.source}: {_TITLES[done.source_format]}, {_LAYOUTS[done.layout]}"),
        ("weights", f"{done.parameter_count:,} parameters, {done.dtype}, {gib(done.size_bytes)}"),
        ("output", f"{done.output}: {_TITLES[done.output_format]}"),
    ]
