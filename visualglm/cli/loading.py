"""Loads the model that the options name, and says what is loaded."""

from __future__ import annotations

import time
from pathlib import Path

import visualglm
from visualglm.checkpoint.model_dir import ModelDirectory, open_model_directory
from visualglm.cli.messages import Messages
from visualglm.cli.options import ImageOptions, ModelOptions
from visualglm.loading import BUILTIN_NOTICE, builtin_path
from visualglm.memory import available_memory, estimate_memory, gib
from visualglm.model import VisualGLM
from visualglm.parameters import parameter_count

# Loading less takes no time worth a note.
_LARGE_BYTES = 2**30


def open_directory(path: Path | None, messages: Messages) -> ModelDirectory:
    """The model directory at `path`, or the built-in one; raises `CheckpointError` or `ConfigError`."""
    if path is None:
        messages.tell(BUILTIN_NOTICE)
    return open_model_directory(builtin_path() if path is None else path)


def load_model(options: ModelOptions, images: ImageOptions, messages: Messages) -> VisualGLM:
    """The loaded model, with the limits of `images`; raises a `VisualGLMError`."""
    return load_directory(open_directory(options.model, messages), options, images, messages)


def load_directory(
    directory: ModelDirectory, options: ModelOptions, images: ImageOptions, messages: Messages
) -> VisualGLM:
    """As `load_model`, for a directory that is open already."""
    config = directory.config
    # For "auto" the size is that of the weights' own precision, whichever is taken.
    estimate = estimate_memory(config, config.dtype if options.dtype == "auto" else options.dtype)
    if estimate.weights > _LARGE_BYTES:
        messages.tell(f"loading {directory.path}: takes {estimate}; {gib(available_memory())} of memory are free")
    start = time.perf_counter()
    model = visualglm.load(options.model, backend=options.backend, device=options.device, dtype=options.dtype)
    model.image_limits = images.limits()
    model.allow_urls = images.allow_urls
    seconds = time.perf_counter() - start
    size = f"{parameter_count(config):,} parameters, {gib(directory.checkpoint.size_bytes)} on disk"
    messages.tell(f"loaded {model.name}: {model.backend.description}; {size}; in {seconds:.1f} s")
    return model
