"""`visualglm bench`: speed and memory of a model on this machine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

from PIL import Image
from typer import Argument, Option

from visualglm.bandwidth import seconds_of
from visualglm.benchmark import Figure, Plan, Result, measure_model
from visualglm.checkpoint.files import replace_file
from visualglm.checkpoint.lite_dir import LiteDirectory, Precision, open_lite_directory
from visualglm.checkpoint.mindir_dir import MindirDirectory
from visualglm.checkpoint.model_dir import ModelDirectory
from visualglm.cli.loading import choose_model
from visualglm.cli.messages import Messages, print_table
from visualglm.cli.options import ModelOptions
from visualglm.errors import ConfigError
from visualglm.export_cache import Exporting, require_export_tools
from visualglm.loading import BackendName, Choice, Exporter, builtin_export, builtin_path, choose
from visualglm.random_model import PRESETS, write_random_model


def bench(
    directory: Annotated[
        Path | None, Argument(metavar="MODEL", help="Model directory or export, as --model; else the built-in.")
    ] = None,
    preset: Annotated[
        Literal["full", "medium", "tiny"] | None,
        Option(
            help="Random weights instead: full takes 15.6 GB of disk, medium 4.5, tiny nothing; exports come on top."
        ),
    ] = None,
    layers: Annotated[int | None, Option(metavar="N", min=1, help="Layers of the preset's decoder.")] = None,
    folder: Annotated[
        Path | None, Option(metavar="DIR", help="Where the preset's weights are written; else the temporary folder.")
    ] = None,
    keep: Annotated[bool, Option("--keep", help="Keep the preset's weights, to be measured again as MODEL.")] = False,
    threads: Annotated[int | None, Option(metavar="N", min=1, help="Threads that compute; else as for ask.")] = None,
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
    if preset and options.adapter:
        raise ConfigError("An adapter belongs to a model, not to random weights; leave --preset or --adapter out.")
    if preset:
        found: AbstractContextManager[Choice] = _random_model(preset, layers, folder, keep, options, messages)
    else:
        found = nullcontext(choose_model(replace(options, model=model), messages))
    with found as choice:
        if isinstance(choice.directory, MindirDirectory):
            raise ConfigError(
                f"{choice.name} runs in one shape only, and the benchmark has several; "
                "measure the model directory with --backend mindspore."
            )
        result = measure_model(choice, Plan(repeats=repeats), threads=threads, tell=messages.tell)
    messages.tell("the program itself")
    result = replace(result, figures=(*result.figures, *_program_figures(options.backend, repeats)))
    _show(result)
    if output:
        _write_json(output, result)


@contextmanager
def _random_model(
    preset: str, layers: int | None, folder: Path | None, keep: bool, options: ModelOptions, messages: Messages
) -> Iterator[Choice]:
    """A model of random weights, which is deleted behind the block unless it is to be kept."""
    # What is missing to run it is told before gigabytes are written: found out with the built-in model in its place.
    _choose(builtin_path(), options, _check_export_tools)
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
        yield _choose(path, options, partial(_export_beside, messages))
    finally:
        if keep and path.exists():
            messages.tell(f"kept: {', '.join(str(kept) for kept in sorted(scratch.iterdir()))}")
        else:
            shutil.rmtree(scratch, ignore_errors=True)


def _choose(path: Path, options: ModelOptions, exporter: Exporter) -> Choice:
    return choose(path, **options.runtime(), exporter=exporter)


def _check_export_tools(model: ModelDirectory, precision: Precision, exporting: Exporting | None) -> LiteDirectory:
    require_export_tools()
    return open_lite_directory(builtin_export())


def _export_beside(
    messages: Messages, model: ModelDirectory, precision: Precision, exporting: Exporting | None
) -> LiteDirectory:
    """Not in the cache: nobody will ask random weights again. Nor are they worth more than plain rounding."""
    from visualglm.export.onnx import ExportOptions, export_onnx

    path = model.path.with_name(f"{model.path.name}-{precision}")
    messages.tell(f"exporting it to {path}")
    with messages.byte_progress("exporting") as report:
        return export_onnx(model, path, ExportOptions(precision, method="rtn"), report=report)


def _program_figures(backend: BackendName, repeats: int) -> list[Figure]:
    """How long this program takes from its start to the list of its commands, and to the first token of an answer."""
    chosen = () if backend == "auto" else ("--backend", backend)
    ask = ("ask", *chosen, "--quiet", "--max-new-tokens", "1", "--image", _picture_url(), "图里有什么？")
    asking = " ".join(("visualglm ask", *chosen))
    commands = {"visualglm --help": ("--help",), f"{asking}, built-in model, first token": ask}
    return [
        Figure(name, median(_command_seconds(arguments) for _ in range(repeats)), "s")
        for name, arguments in commands.items()
    ]


def _command_seconds(arguments: Sequence[str]) -> float:
    command = [sys.executable, "-P", "-m", "visualglm.cli", *arguments]
    return seconds_of(lambda: subprocess.run(command, stdout=subprocess.DEVNULL, check=True))


def _picture_url() -> str:
    file = BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"


def _show(result: Result) -> None:
    facts = [
        ("model", f"{result.model}, {result.parameters:,} parameters"),
        ("backend", result.backend),
        ("threads", str(result.threads)),
    ]
    print_table([*facts, *((figure.name, f"{figure.value:.4g} {figure.unit}") for figure in result.figures)])


def _write_json(output: Path, result: Result) -> None:
    replace_file(output, [json.dumps(asdict(result), indent=2, ensure_ascii=False).encode()])
