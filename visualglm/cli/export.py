"""`visualglm export`: a model directory for ONNX Runtime, or for MindSpore."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from visualglm.backends.mindspore.environment import prepare_mindspore
from visualglm.checkpoint.adapter_dir import open_adapter
from visualglm.checkpoint.lite_dir import LiteDirectory
from visualglm.checkpoint.merge import merged
from visualglm.checkpoint.mindir_dir import MindirDirectory
from visualglm.checkpoint.model_dir import ModelDirectory, open_model_directory
from visualglm.cli.messages import Messages, print_table
from visualglm.cli.options import Quiet
from visualglm.errors import ConfigError
from visualglm.export_cache import require_export_tools
from visualglm.memory import gib
from visualglm.signals import held_signals

_ONNX, _MINDIR = "Rounding, with --format onnx", "Shape, with --format mindir"
_Precision = Literal["int4", "int8", "fp16", "fp32"]


@dataclass(frozen=True)
class RoundingOptions:
    """How the weights of an ONNX export become whole numbers."""

    block_size: Annotated[
        int | None,
        Option(
            metavar="N",
            help="Weights that share a scale; else 128 (int8: 512), in narrow models 32.",
            rich_help_panel=_ONNX,
        ),
    ] = None
    kv_cache: Annotated[
        Literal["auto", "float32", "int8"],
        Option(help="How keys and values are kept; auto: int8 with int4 and int8.", rich_help_panel=_ONNX),
    ] = "auto"
    method: Annotated[
        Literal["search", "rtn", "gptq"],
        Option(
            help="Look for the best scales; round to the nearest; or let examples tell which errors matter.",
            rich_help_panel=_ONNX,
        ),
    ] = "search"
    int8_layers: Annotated[
        str,
        Option(
            metavar="KINDS",
            help="With int4, layers that keep 8 bits: some of qkv,proj,fc1,fc2,lm_head.",
            rich_help_panel=_ONNX,
        ),
    ] = ""
    calibration: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="JSONL of img, prompt and label that gptq learns from; the built-in needs none.",
            rich_help_panel=_ONNX,
        ),
    ] = None
    evaluate: Annotated[
        int | None,
        Option(
            metavar="N",
            min=0,
            help="Scenes or rows to judge the export by; else 100 where there are some.",
            rich_help_panel=_ONNX,
        ),
    ] = None


@dataclass(frozen=True)
class ShapeOptions:
    """The one shape that the graphs of a MindIR export run in."""

    seq_length: Annotated[
        int | None,
        Option(
            metavar="N",
            min=1,
            help="Tokens of prompt and answer together; else 512, or the window if that is less.",
            rich_help_panel=_MINDIR,
        ),
    ] = None
    batch_size: Annotated[
        int | None, Option(metavar="N", min=1, help="Rows that are answered at once; else 1.", rich_help_panel=_MINDIR)
    ] = None


def export(
    model: Annotated[Path, Argument(metavar="MODEL", help="Model directory made by `visualglm convert`.")],
    output: Annotated[Path, Argument(metavar="OUT", help="Folder to be made.")],
    rounding: RoundingOptions,
    shape: ShapeOptions,
    adapter: Annotated[
        Path | None, Option("--adapter", metavar="DIR", help="What fine-tuning made of MODEL, to be merged into it.")
    ] = None,
    format: Annotated[
        Literal["onnx", "mindir"], Option(help="What the export is for: ONNX Runtime, or MindSpore.")
    ] = "onnx",
    precision: Annotated[
        _Precision | None,
        Option(help="Of the decoder's weights, else int8; fp16 is for GPUs. MindIR has fp16 and fp32, else fp32."),
    ] = None,
    no_use_past: Annotated[bool, Option("--no-use-past", help="The full graph only, without a KV cache.")] = False,
    force: Annotated[bool, Option("--force", help="Replace OUT if it holds an export and nothing else.")] = False,
    quiet: Quiet = False,
) -> None:
    """Export a model directory for ONNX Runtime, which runs it without torch; or as MindIR graphs for MindSpore.

    What rounding did to each layer, and to answers as far as they are known, is written to quantization.json in OUT.
    """
    _require_unused(shape if format == "onnx" else rounding, format)
    messages = Messages(quiet)
    directory = open_model_directory(model)
    if adapter:
        opened = open_adapter(adapter)
        directory = merged(directory, opened)
        if opened.warning:
            messages.tell(f"Warning: {opened.warning}")
    done: LiteDirectory | MindirDirectory
    judgement: list[tuple[str, str]] = []
    if format == "mindir":
        done = _to_mindir(directory, output, precision or "fp32", shape, not no_use_past, force, messages)
    else:
        done, judgement = _to_onnx(directory, output, precision or "int8", rounding, not no_use_past, force, messages)
    print_table(_facts(f"{model} with adapter {adapter}" if adapter else str(model), done) + judgement)
    messages.tell(f'Ask it with: visualglm ask --model {done.path} --image FILE "What is in the picture?"')


def _require_unused(options: RoundingOptions | ShapeOptions, format: str) -> None:
    """Raises `ConfigError` if an option is given that belongs to the other format."""
    other = "mindir" if format == "onnx" else "onnx"
    for field in fields(options):
        if getattr(options, field.name) != field.default:
            option = field.name.replace("_", "-")
            raise ConfigError(f"--{option} is for --format {other}, and the format is {format}; leave it out.")


def _to_onnx(
    directory: ModelDirectory,
    output: Path,
    precision: _Precision,
    rounding: RoundingOptions,
    use_past: bool,
    force: bool,
    messages: Messages,
) -> tuple[LiteDirectory, list[tuple[str, str]]]:
    """The export, and what was found when it was judged."""
    require_export_tools()
    from visualglm.export.onnx import ERRORS, ExportOptions, export_onnx

    options = ExportOptions(
        precision,
        use_past,
        rounding.block_size,
        rounding.kv_cache,
        rounding.method,
        tuple(kind.strip() for kind in rounding.int8_layers.split(",")) if rounding.int8_layers else (),
        rounding.calibration,
        rounding.evaluate,
    )
    with messages.byte_progress("exporting") as report:
        done = export_onnx(directory, output, options, force=force, report=report)
    return done, _judgement(done.path / ERRORS)


def _to_mindir(
    directory: ModelDirectory,
    output: Path,
    precision: _Precision,
    shape: ShapeOptions,
    use_past: bool,
    force: bool,
    messages: Messages,
) -> MindirDirectory:
    if precision == "int4" or precision == "int8":
        raise ConfigError(f"MindIR exports have no {precision}; give --precision fp32, or fp16 for Ascend.")
    prepare_mindspore("An export as MindIR")
    with held_signals():
        from visualglm.export.mindir import MindirOptions, export_mindir

    options = MindirOptions(precision, shape.seq_length, shape.batch_size or 1, use_past)
    with messages.byte_progress("exporting") as report:
        return export_mindir(directory, output, options, force=force, report=report)


def _facts(source: str, done: LiteDirectory | MindirDirectory) -> list[tuple[str, str]]:
    return [
        ("source", source),
        ("export", f"{done.path}: {done.manifest.title}"),
        ("size", gib(sum(record.size for record in done.manifest.files.values()))),
        ("memory", f"takes {done.memory}"),
    ]


def _judgement(report: Path) -> list[tuple[str, str]]:
    """What was found beside the model in float32, if it was looked for."""
    judged = json.loads(report.read_text("utf-8"))["judgement"] if report.is_file() else None
    if judged is None:
        return []
    logits, answers = judged["logits"], judged["answers"]
    found = (
        f"{judged['count']} {judged['examples']}: logits off by {logits['logit_error']:.2%}, "
        f"perplexity {logits['perplexity']:.4f}, in float32 {logits['float32_perplexity']:.4f}"
    )
    if answers is None:
        return [("judged by", found)]
    told = (
        f"{answers['exact_match']:.1%} of {answers['questions']} exact, in float32 "
        f"{answers['float32_exact_match']:.1%}; {answers['same_as_float32']:.1%} the same"
    )
    return [("judged by", found), ("answers", told)]
