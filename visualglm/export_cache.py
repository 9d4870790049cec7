"""Exports of model directories that were made on first use, kept for the next."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path

from visualglm import __version__
from visualglm.checkpoint.files import waiting_lock
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
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "visualglm"


def is_cached(directory: ModelDirectory, precision: Precision) -> bool:
    return is_lite_directory(_place(directory, precision))


def cached_export(directory: ModelDirectory, precision: Precision, exporting: Exporting | None = None) -> LiteDirectory:
    """The export of `directory`, made now if there is none or it is damaged.

    Where another process is making it, this one waits. Raises `DeviceError` if it would have to be made and the tools
    are missing, `CheckpointError` if it cannot be written.
    """
    place = _place(directory, precision)
    found = _whole_export(place, directory)
    if found is not None:
        return found
    require_export_tools(directory.path)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with waiting_lock(place.with_name(f".{place.name}.lock")):
            return _whole_export(place, directory) or _export(directory, place, precision, exporting)
    except OSError as error:
        raise _not_kept(directory, f"{place.parent} cannot be written ({error.strerror})") from error


def _export(directory: ModelDirectory, place: Path, precision: Precision, exporting: Exporting | None) -> LiteDirectory:
    from visualglm.export.onnx import ExportOptions, export_onnx

    try:
        with exporting(place) if exporting else nullcontext() as report:
            # What is there is damaged: it goes, unless it holds what is no part of an export.
            return export_onnx(directory, place, ExportOptions(precision), force=True, report=report)
    except CheckpointError as error:
        raise _not_kept(directory, str(error).removesuffix(".")) from error


def _not_kept(directory: ModelDirectory, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{directory.path} could not be exported on first use: {reason}; if it is the cache's fault, "
        f"set {CACHE_VARIABLE} to a folder that can be written, or run `visualglm export {directory.path} OUT`."
    )


def _whole_export(place: Path, directory: ModelDirectory) -> LiteDirectory | None:
    """The export of `directory` at `place`, None if it has to be made, for the first time or again."""
    try:
        found = open_lite_directory(place)
    except CheckpointError:
        return None
    # A configuration that was edited by hand has the fingerprint that it had before.
    return found if found.config == directory.config else None


def require_export_tools(model: Path | None = None) -> None:
    """Raises `DeviceError` if the package is missing that exports are made with."""
    if find_spec("onnx") is None:
        needed = "An export" if model is None else f"{model} has no export for ONNX Runtime yet; making one"
        raise DeviceError(
            f"{needed} needs the package onnx; run `pip install 'visualglm[export]'`, "
            f"or on another machine `visualglm export MODEL OUT`{_others() if model else ''}."
        )


def _others() -> str:
    """What else could run the model here."""
    installed = [name for name in ("torch", "mindspore") if find_spec(name) is not None]
    return f"; or give --backend {' or '.join(installed)}, which is here" if installed else ""


def _place(directory: ModelDirectory, precision: Precision) -> Path:
    return cache_folder() / f"{directory.fingerprint[:24]}-{precision}-{__version__}"
