"""`visualglm bench`: speed and memory of a model on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Argument, Option

from visualglm.checkpoint.files import write_file
from visualglm.cli.messages import Messages, print_table
from visualglm.cli.options import ModelOptions
from visualglm.errors import ConfigError
from visualglm.loading import builtin_path

if TYPE_CHECKING:
    # Imports torch: not for the help of this command.
    from visualglm.benchmark import Result


def bench(
    directory: Annotated[
        Path | None, Argument(metavar="MODEL", help="Model directory, as --model; else the built-in model.")
    ] = None,
    preset: Annotated[
        Literal["full", "medium", "tiny"] | None,
        Option(help="Random weights instead: full takes 15.6 GB of disk and memory, medium 4.5, tiny nothing."),
    ] = None,
    layers: Annotated[int | None, Option(metavar="N", min=1, help="Layers of the preset's decoder.")] = None,
    folder: Annotated[
        Path | None, Option(metavar="DIR", help="Where the preset's weights are written; else the temporary folder.")
    ] = None,
    keep: Annotated[bool, Option("--keep", help="Keep the preset's weights, to be measured again as MODEL.")] = False,
    threads: Annotated[int | None, Option(metavar="N", min=1, help="Threads that compute; else one a core.")] = None,
    repeats: Annotated[int, Option(metavar="N", min=1, help="Figures are medians of so many repeats.")] = 5,
    output: Annotated[Path | None, Option("--json", metavar="FILE", help="Write the figures to FILE too.")] = None,
    *,
    options: ModelOptions,
) -> None:
    """Measure speed and memory of a model on this machine; nothing else should be running."""
    messages = Messages(options.quiet)
    model = directory or options.model
    if model and preset:
        raise ConfigError(f"Both the model {model} and the preset {preset} are given; leave one of them out.")
    if not preset and (layers or folder or keep):
        raise ConfigError("--layers, --folder and --keep are about random weights; give --preset with them.")
    for needed in (folder, output and output.parent):
        if needed and not needed.is_dir():
            raise ConfigError(f"The folder {needed} does not exist; create it, or give another.")
    if preset:
        with _random_model(preset, layers, folder, keep, messages) as path:
            result = _measure(path, threads, repeats, options, messages)
    else:
        result = _measure(model or builtin_path(), threads, repeats, options, messages)
    _show(result)
    if output:
        _write_json(output, result)


@contextmanager
def _random_model(
    preset: str, layers: int | None, folder: Path | None, keep: bool, messages: Messages
) -> Iterator[Path]:
    """A model directory of random weights, which is deleted behind the block unless it is to be kept."""
    from visualglm.benchmark import PRESETS, write_random_model

    config = PRESETS[preset]
    if layers:
        text = config.text.model_copy(update={"num_hidden_layers": layers})
        config = config.model_copy(update={"text": text})
    scratch = Path(tempfile.mkdtemp(prefix="visualglm-bench-", dir=folder))
    path = scratch / preset
    try:
        messages.tell(f"writing random weights to {path}")
        with messages.byte_progress("writing") as report:
            write_random_model(path, config, report)
        yield path
    finally:
        if keep and path.exists():
            messages.tell(f"kept: {path}")
        else:
            shutil.rmtree(scratch, ignore_errors=True)


def _measure(path: Path, threads: int | None, repeats: int, options: ModelOptions, messages: Messages) -> Result:
    from visualglm.benchmark import Figure, Plan, measure_model

    result = measure_model(
        path, Plan(repeats=repeats), device=options.device, dtype=options.dtype, threads=threads, tell=messages.tell
    )
    seconds = Figure("visualglm --help", median(_help_seconds() for _ in range(repeats)), "s")
    return replace(result, figures=(*result.figures, seconds))


def _help_seconds() -> float:
    """How long this program takes to show its commands."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "visualglm.cli", "--help"], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def _show(result: Result) -> None:
    facts = [
        ("model", f"{result.model}, {result.parameters:,} parameters"),
        ("backend", f"{result.backend}, {result.threads} threads"),
    ]
    print_table([*facts, *((figure.name, f"{figure.value:.4g} {figure.unit}") for figure in result.figures)])


def _write_json(output: Path, result: Result) -> None:
    beside = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        write_file(beside, [json.dumps(asdict(result), indent=2, ensure_ascii=False).encode()])
        os.replace(beside, output)
    finally:
        beside.unlink(missing_ok=True)
