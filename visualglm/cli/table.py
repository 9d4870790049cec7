"""The table of commands. None of them is imported until it is called, so that `--help` is there at once."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from visualglm import __version__
from visualglm.cli.main import EXIT_INTERRUPTED
from visualglm.signals import held_signals

# The function `name` in the module `visualglm.cli.name`, with _ for -.
COMMANDS = {
    "ask": "Ask one question, about an image or without one.",
    "chat": "Talk about an image, question by question.",
    "caption": "Answer a folder or a JSONL of images into a JSONL; goes on where it was stopped.",
    "evaluate": "Measure how well a model answers the questions of a data set.",
    "convert": "Convert a checkpoint: SAT, Hugging Face, MindFormers or model directory, in any direction.",
    "merge": "Merge an adapter into its model.",
    "export": 'Export a model directory for ONNX Runtime; needs the extra "export".',
    "finetune": 'Train a model on your own pictures; needs the extra "train".',
    "rank-table": "Write which Ascend card has which rank, for processes that train together.",
    "check": "Check a model: files, hashes, tensors, tokenizer, memory.",
    "info": "Show version, machine, devices, and what a model is.",
    "train-builtin": 'Train the built-in model from nothing; needs the extra "train".',
    "bench": "Measure speed and memory of a model on this machine.",
}


class CommandTable(TyperGroup):
    """A group that knows its commands by name and help line, and makes one when it is asked for it."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            ctx.fail(f"No such command {cmd_name!r}; the commands are {', '.join(COMMANDS)}.")
        return _make_command(cmd_name)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            # Said here, because versions of Typer differ in what they make of it.
            raise SystemExit(EXIT_INTERRUPTED) from None


def command_table() -> Any:
    """The whole program as a click command."""
    app = typer.Typer(
        cls=CommandTable,
        rich_markup_mode=None,
        no_args_is_help=True,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    return get_command(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"visualglm {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """VisualGLM-6B, usable everywhere: ask a picture questions in Chinese and English."""


def _make_command(name: str) -> Any:
    symbol = name.replace("-", "_")
    # The threads of what is imported here are to leave signals to this one.
    with held_signals():
        from visualglm.cli.options import spread

        module = import_module(f"visualglm.cli.{symbol}")
    app = typer.Typer(add_completion=False)
    app.command(name)(spread(getattr(module, symbol)))
    return get_command(app)
