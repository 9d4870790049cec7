"""`visualglm export`: a model directory for ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from visualglm.checkpoint.lite_dir import LiteDirectory
from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.cli.messages import Messages, print_table
from visualglm.cli.options import Quiet
from visualglm.export_cache import require_export_tools
from visualglm.memory import gib


def export(
    model: Annotated[Path, Argument(metavar="MODEL", help="Model directory made by `visualglm convert`.")],
    output: Annotated[Path, Argument(metavar="OUT", help="Folder to be made.")],
    format: Annotated[Literal["onnx"], Option(help="What the export is for.")] = "onnx",
    precision: Annotated[
        Literal["int4", "int8", "fp16", "fp32"], Option(help="Of the decoder's weights; fp16 is for GPUs.")
    ] = "int8",
    no_use_past: Annotated[bool, Option("--no-use-past", help="The full graph only, without a KV cache.")] = False,
    block_size: Annotated[
        int | None, Option(metavar="N", help="Weights that share a scale; else 128, in narrow models 32.")
    ] = None,
    kv_cache: Annotated[
        Literal["auto", "float32", "int8"], Option(help="How keys and values are kept; auto: int8 with int4 and int8.")
    ] = "auto",
    method: Annotated[
        Literal["search", "rtn"], Option(help="Look for the best scales, or round to the nearest.")
    ] = "search",
    force: Annotated[bool, Option("--force", help="Replace OUT if it holds an export and nothing else.")] = False,
    quiet: Quiet = False,
) -> None:
    """Export a model directory for ONNX Runtime, which runs it without torch.

    What rounding did to each layer is written to quantization.json in OUT.
    """
    messages = Messages(quiet)
    directory = open_model_directory(model)
    require_export_tools()
    from visualglm.export.onnx import ExportOptions, export_onnx

    options = ExportOptions(precision, not no_use_past, block_size, kv_cache, method)
    with messages.byte_progress("exporting") as report:
        done = export_onnx(directory, output, options, force=force, report=report)
    print_table(_facts(model, done))
    messages.tell(f'Ask it with: visualglm ask --model {done.path} --image FILE "What is in the picture?"')


def _facts(model: Path, done: LiteDirectory) -> list[tuple[str, str]]:
    return [
        ("source", str(model)),
        ("export", f"{done.path}: {done.manifest.title}"),
        ("size", gib(sum(record.size for record in done.manifest.files.values()))),
        ("memory", f"takes {done.memory}"),
    ]
