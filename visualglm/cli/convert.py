"""`visualglm convert`: checkpoints from one format to another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from visualglm.checkpoint.adapter_dir import AdapterDirectory
from visualglm.checkpoint.convert import Conversion, Format
from visualglm.checkpoint.convert import convert as convert_checkpoint
from visualglm.checkpoint.files import checked_path
from visualglm.checkpoint.hf_lora import convert_hf_adapter, holds_hf_adapter, told_hf_base
from visualglm.checkpoint.instead import require_model_folder
from visualglm.checkpoint.mindformers_lora import (
    RECIPE_ALPHA,
    convert_mindformers_adapter,
    holds_mindformers_adapter,
    told_alpha,
)
from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.checkpoint.sat_lora import convert_sat_adapter, holds_sat_adapter
from visualglm.cli.adapters import adapter_facts
from visualglm.cli.messages import Messages, print_table
from visualglm.cli.options import Quiet
from visualglm.errors import ConfigError
from visualglm.memory import gib

_TITLES: dict[Format, str] = {
    "model": "model directory",
    "sat": "SAT archive",
    "hf": "Hugging Face checkpoint",
    "mindformers": "MindFormers checkpoint",
}
_LAYOUTS = {"thirds": "q, k and v one after the other", "per_head": "q, k and v head by head"}


@dataclass(frozen=True)
class _Adapters:
    """What one program leaves of fine-tuning: how it is recognised and converted, and what to tell of it."""

    by: str
    holds: Callable[[Path], bool]
    convert: Callable[..., AdapterDirectory]
    note: Callable[[Path], str | None] = lambda _: None


def _alpha_note(source: Path) -> str | None:
    if told_alpha(source) is not None:
        return None
    return (
        f"Taken is lora_alpha {RECIPE_ALPHA:g}, as the recipe has it; if yours was another, put your "
        f"run_visualglm_lora.yaml beside {source} and convert it again."
    )


def _base_note(source: Path) -> str:
    name = told_hf_base(source)
    return (
        f"Warning: PEFT noted {f'{name} as its model' if name else 'no name of its model'}; "
        "that it fits MODEL is all that could be checked."
    )


_ADAPTERS = (
    _Adapters("SAT", holds_sat_adapter, convert_sat_adapter),
    _Adapters("MindFormers", holds_mindformers_adapter, convert_mindformers_adapter, _alpha_note),
    _Adapters("PEFT on the Hugging Face model", holds_hf_adapter, convert_hf_adapter, _base_note),
)


def convert(
    source: Annotated[Path, Argument(metavar="SOURCE", help="Folder with a checkpoint; its format is recognised.")],
    output: Annotated[Path, Argument(metavar="OUT", help="Folder to be made.")],
    to: Annotated[Format, Option(help="Format to write: model directory, or that of another program.")] = "model",
    tokenizer: Annotated[
        Path | None, Option(metavar="FILE", help="ice_text.model; else the one beside the weights.")
    ] = None,
    base: Annotated[
        Path | None, Option("--base", metavar="MODEL", help="For LoRA: the model directory it was trained on.")
    ] = None,
    force: Annotated[bool, Option("--force", help="Replace OUT if it holds a checkpoint and nothing else.")] = False,
    quiet: Quiet = False,
) -> None:
    """Convert a checkpoint: SAT, Hugging Face, MindFormers or model directory, in any direction.

    Weights are kept bit by bit and read one tensor at a time; no code in a checkpoint is run. LoRA or prefixes that
    SAT fine-tuned, in an archive or a .pt file, LoRA of MindFormers, in a .ckpt file, and LoRA that PEFT trained on the
    Hugging Face model, in a folder, become an adapter directory.
    """
    messages = Messages(quiet)
    adapters = next((kind for kind in _ADAPTERS if kind.holds(checked_path(source))), None)
    if adapters:
        if to != "model" or tokenizer:
            raise ConfigError(f"{source} holds an adapter, which has one format here; leave --to and --tokenizer out.")
        _convert_adapter(adapters, source, output, base, force, messages)
        return
    if base:
        require_model_folder(checked_path(source))
        raise ConfigError(f"{source} holds no LoRA of another program, which is what --base is for; leave it out.")
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


def _convert_adapter(
    kind: _Adapters, source: Path, output: Path, base: Path | None, force: bool, messages: Messages
) -> None:
    model = None if base is None else open_model_directory(base)
    adapter = kind.convert(source, output, base=model, force=force)
    print_table([("source", f"{source}: fine-tuned by {kind.by}"), *adapter_facts(adapter)])
    note = kind.note(source)
    if note:
        messages.tell(note)
    if model is None:
        messages.tell("Warning: without --base MODEL the adapter does not know which model it belongs to.")


def _facts(done: Conversion) -> list[tuple[str, str]]:
    return [
        ("source", f"{done.source}: {_TITLES[done.source_format]}, {_LAYOUTS[done.layout]}"),
        ("weights", f"{done.parameter_count:,} parameters, {done.dtype}, {gib(done.size_bytes)}"),
        ("output", f"{done.output}: {_TITLES[done.output_format]}"),
    ]
