"""Exports of model directories that were made on first use, kept for the next."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path

from visualglm import __version__
from visualglm.checkpoint.lite_dir import LiteDirectory, Precision, is_lite_directory, open_lite_directory
from visualglm.checkpoint.model_dir import ModelDirectory
from visualglm.checkpoint.progress import Report
from visualglm.errors import CheckpointError, DeviceError

CACHE_VARIABLE = "VISUALGLM_CACHE"
Exporting = Callable[[Path], AbstractContextManager[Report]]
"""Given the folder of an export that is about to be made: the context in which its progress is shown."""


def cache_folder() -> Path:
    """Where exports are kept: VISUALGLM_CACHE, or `visualglm` in the user's cache."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "visualglm"


def is_cached(directory: ModelDirectory, precision: Precision) -> bool:
    return is_lite_directory(_place(directory, precision))


def cached_export(directory: ModelDirectory, precision: Precision, exporting: Exporting | None = None) -> LiteDirectory:
    """The export of `directory`, made now if there is none or it is damaged.

    Raises `DeviceError` if it would have to be made and the tools are missing, `CheckpointError` if it cannot be
    written.
    """
    place = _place(directory, precision)
    found = _whole_export(place)
    # A configuration that was edited by hand has the fingerprint that it had before.
    if found is not None and found.config == directory.config:
        return found
    require_export_tools(directory.path)
    from visualglm.export.onnx import ExportOptions, export_onnx

    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"{place.parent} cannot be made for the export of {directory.path} ({error.strerror}); "
            f"set {CACHE_VARIABLE} to a folder that can be written, or make one yourself: "
            f"visualglm export {directory.path} OUT."
        ) from error
    with exporting(place) if exporting else nullcontext() as report:
        return export_onnx(directory, place, ExportOptions(precision), report=report)


def _whole_export(place: Path) -> LiteDirectory | None:
    try:
        return open_lite_directory(place)
    except CheckpointError:
        return None  # Not there, or damaged: it is made again.


def require_export_tools(model: Path | None = None) -> None:
    """Raises `DeviceError` if the package is missing that exports are made with."""
    if find_spec("onnx") is None:
        needed = "An export" if model is None else f"{model} has no export for ONNX Runtime yet; making one"
        raise DeviceError(
            f"{needed} needs the package onnx; run `pip install 'visualglm[export]'`, "
            "or on another machine `visualglm export MODEL OUT`."
        )


def _place(directory: ModelDirectory, precision: Precision) -> Path:
    return cache_folder() / f"{directory.fingerprint[:24]}-{precision}-{__version__}"
