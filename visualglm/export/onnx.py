"""Exports a model directory for ONNX Runtime: three graphs and their weights, streamed from file to file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from visualglm.checkpoint.lite_dir import LiteDirectory, LiteForm, write_lite_directory
from visualglm.checkpoint.model_dir import ModelDirectory
from visualglm.checkpoint.progress import Report
from visualglm.checkpoint.tensors import tensor_bytes
from visualglm.errors import ConfigError
from visualglm.export.accuracy import judge
from visualglm.export.examples import ExampleSource, examples_for
from visualglm.export.graphs import write_graphs
from visualglm.export.layerwise import LayerwiseModel
from visualglm.export.options import ExportOptions
from visualglm.export.rounding import Rounding, bits_of

__all__ = ["ERRORS", "ExportOptions", "expected_bytes", "export_onnx"]

ERRORS = "quantization.json"
_GRAPH_BYTES = 4_000_000
_JUDGED_BY = 100


def export_onnx(
    directory: ModelDirectory,
    output: Path | str,
    options: ExportOptions,
    *,
    force: bool = False,
    report: Report | None = None,
) -> LiteDirectory:
    """Export a model directory to `output`, which appears whole or not at all.

    `report` is told the bytes done of those to be written and hashed. Raises `ConfigError` for options that
    contradict one another, `CheckpointError` if weights are not finite, or `output` cannot be written, `DataError` for
    rows to calibrate on that are malformed, `DeviceError` if the memory does not suffice to.
    """
    form = options.form(directory.config)
    source = _examples(directory, options) if form.block_size else None
    needed = expected_bytes(directory, form)
    progress = _TwoPhases(needed, report)

    def fill(folder: Path) -> LiteForm:
        if form.block_size is None:
            write_graphs(folder, directory, form, wrote=progress.wrote)
        else:
            found = _write_rounded(folder, directory, form, options, source, progress.wrote)
            (folder / ERRORS).write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        return form

    return write_lite_directory(
        output, directory, fill, needed_bytes=needed, force=force, report=progress.hashed if report else None
    )


def expected_bytes(directory: ModelDirectory, form: LiteForm) -> int:
    """About how much an export takes on the disk."""
    total = _GRAPH_BYTES
    for name, tensor in directory.tensors.items():
        size = tensor_bytes(tensor)
        if form.block_size is not None and len(tensor.shape) == 2 and name.endswith(".weight"):
            is_decoder = name.startswith("text.") and name != "text.word_embeddings.weight"
            bits = bits_of(form, name.removesuffix(".weight")) if is_decoder else 8
            size = prod(tensor.shape) * (bits + 40 / form.block_size) / 8  # type: ignore[assignment]
        total += int(size)
    return total


def _examples(directory: ModelDirectory, options: ExportOptions) -> ExampleSource | None:
    """What the export is calibrated on and judged by; raises `ConfigError` if there has to be something and is nothing,
    or there is and nothing has to be."""
    is_calibrated = options.method == "gptq"
    if not is_calibrated and options.evaluate == 0:
        if options.calibration is not None:
            raise ConfigError(
                f"Nothing is done with the rows of {options.calibration}: only gptq learns from some, and by none is "
                "judged; leave --calibration out, or give --method gptq or --evaluate N."
            )
        return None
    source = examples_for(directory, options.calibration)
    if source is None and (is_calibrated or options.evaluate):
        raise ConfigError(
            f"{directory.path} is not the built-in model, for which scenes are drawn: gptq and judging need rows; "
            'give --calibration FILE with {"img": FILE, "prompt": TEXT, "label": TEXT} on each line.'
        )
    return source


def _write_rounded(
    folder: Path,
    directory: ModelDirectory,
    form: LiteForm,
    options: ExportOptions,
    source: ExampleSource | None,
    wrote: Callable[[int], None],
) -> dict[str, Any]:
    """Write the graphs with weights rounded, and judge them; returns the report of what that did."""
    report: dict[str, Any] = {"method": options.method, "block_size": form.block_size, "int8_layers": form.int8_layers}
    with TemporaryDirectory(dir=folder) as name:
        scratch, hessians = Path(name), None
        count = _JUDGED_BY if options.evaluate is None else options.evaluate
        if source is not None and options.method == "gptq":
            beside = expected_bytes(directory, form) if count else 0
            hessians = LayerwiseModel(directory, source.to_calibrate(), scratch, calibrates=True, beside=beside)
            report["calibration"] = {"examples": source.name, "rows": hessians.rows}
        layers = write_graphs(folder, directory, form, Rounding(form, options.method, hessians), wrote)
        del hessians  # and the memory that it takes
        judgement = judge(folder, directory, form, source, count, scratch) if source is not None and count else None
    report["judgement"] = None if judgement is None else asdict(judgement)
    report["layers"] = [asdict(layer) for layer in layers]
    return report


class _TwoPhases:
    """Progress of writing and then hashing the same bytes, as one."""

    def __init__(self, size: int, report: Report | None) -> None:
        self._size, self._report, self._written = size, report, 0

    def wrote(self, count: int) -> None:
        self._written += count
        if self._report:
            self._report(min(self._written, self._size), 2 * self._size)

    def hashed(self, done: int, total: int) -> None:
        if self._report:
            self._report(self._size + self._size * done // max(1, total), 2 * self._size)
