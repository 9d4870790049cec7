"""`visualglm export`: a model directory for ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from visualglm.checkpoint.adapter_dir import open_adapter
from visualglm.checkpoint.lite_dir import LiteDirectory
from visualglm.checkpoint.merge import merged
from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.cli.messages import Messages, print_table
from visualglm.cli.options import Quiet
from visualglm.export_cache import require_export_tools
from visualglm.memory import gib


def export(
    model: Annotated[Path, Argument(metavar="MODEL", help="Model directory made by `visualglm convert`.")],
    output: Annotated[Path, Argument(metavar="OUT", help="Folder to be made.")],
    adapter: Annotated[
        Path | None, Option("--adapter", metavar="DIR", help="What fine-tuning made of MODEL, to be merged into it.")
    ] = None,
    format: Annotated[Literal["onnx"], Option(help="What the export is for.")] = "onnx",
    precision: Annotated[
        Literal["int4", "int8", "fp16", "fp32"], Option(help="Of the decoder's weights; fp16 is for GPUs.")
    ] = "int8",
    no_use_past: Annotated[bool, Option("--no-use-past", help="The full graph only, without a KV cache.")] = False,
    block_size: Annotated[
        int | None, Option(metavar="N", help="Weights that share a scale; else 128 (int8: 512), in narrow models 32.")
    ] = None,
    kv_cache: Annotated[
        Literal["auto", "float32", "int8"], Option(help="How keys and values are kept; auto: int8 with int4 and int8.")
    ] = "auto",
    method: Annotated[
        Literal["search", "rtn", "gptq"],
        Option(help="Look for the best scales; round to the nearest; or let examples tell which errors matter."),
    ] = "search",
    int8_layers: Annotated[
        str, Option(metavar="KINDS", help="With int4, layers that keep 8 bits: some of qkv,proj,fc1,fc2,lm_head.")
    ] = "",
    calibration: Annotated[
        Path | None,
        Option(metavar="FILE", help="JSONL of img, prompt and label that gptq learns from; the built-in needs none."),
    ] = None,
    evaluate: Annotated[
        int | None,
        Option(metavar="N", min=0, help="Scenes or rows to judge the export by; else 100 where there are some."),
    ] = None,
    force: Annotated[bool, Option("--force", help="Replace OUT if it holds an export and nothing else.")] = False,
    quiet: Quiet = False,
) -> None:
    """Export a model directory for ONNX Runtime, which runs it without torch.

    What rounding did to each layer, and to answers as far as they are known, is written to quantization.json in OUT.
    """
    messages = Messages(quiet)
    directory = open_model_directory(model)
    if adapter:
        opened = open_adapter(adapter)
        directory = merged(directory, opened)
        if opened.warning:
            messages.tell(f"Warning: {opened.warning}")
    require_export_tools()
    from visualglm.export.onnx import ERRORS, ExportOptions, export_onnx

    kinds = tuple(kind.strip() for kind in int8_layers.split(",")) if int8_layers else ()
    options = ExportOptions(precision, not no_use_past, block_size, kv_cache, method, kinds, calibration, evaluate)
    with messages.byte_progress("exporting") as report:
        done = export_onnx(directory, output, options, force=force, report=report)
    print_table(
        _facts(f"{model} with adapter {adapter}" if adapter else str(model), done) + _judgement(done.path / ERRORS)
    )
    messages.tell(f'Ask it with: visualglm ask --model {done.path} --image FILE "What is in the picture?"')


def _facts(source: str, done: LiteDirectory) -> list[tuple[str, str]]:
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
