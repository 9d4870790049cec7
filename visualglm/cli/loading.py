"""Loads the model that the options name, and says what is loaded."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from visualglm.checkpoint.progress import Report
from visualglm.cli.messages import Messages
from visualglm.cli.options import ImageOptions, ModelOptions
from visualglm.loading import BUILTIN_NAME, BUILTIN_NOTICE, Choice, choose
from visualglm.memory import available_memory, gib
from visualglm.model import VisualGLM
from visualglm.parameters import parameter_count

# Loading less takes no time worth a note.
_LARGE_BYTES = 2**30


def choose_model(options: ModelOptions, messages: Messages) -> Choice:
    """The model that the options name, found but not loaded; exported first if it has to be.

    Raises a `VisualGLMError`.
    """
    if options.model is None:
        messages.tell(BUILTIN_NOTICE)

    @contextmanager
    def exporting(place: Path) -> Iterator[Report]:
        messages.tell(
            f"{options.model or BUILTIN_NAME} has no such export for ONNX Runtime yet; it is made once, as {place}"
        )
        with messages.byte_progress("exporting") as report:
            yield report

    return choose(
        options.model, backend=options.backend, device=options.device, dtype=options.dtype, exporting=exporting
    )


def load_model(options: ModelOptions, images: ImageOptions, messages: Messages) -> VisualGLM:
    """The loaded model, with the limits of `images`; raises a `VisualGLMError`."""
    return load_choice(choose_model(options, messages), images, messages)


def load_choice(choice: Choice, images: ImageOptions, messages: Messages) -> VisualGLM:
    """As `load_model`, for a model that was found already."""
    if choice.memory.weights > _LARGE_BYTES:
        messages.tell(f"loading {choice.name}: takes {choice.memory}; {gib(available_memory())} of memory are free")
    start = time.perf_counter()
    model = choice.load()
    model.image_limits = images.limits()
    model.allow_urls = images.allow_urls
    seconds = time.perf_counter() - start
    size = f"{parameter_count(choice.config):,} parameters, {gib(choice.directory.weights_bytes)} on disk"
    messages.tell(f"loaded {model.name}: {model.backend.description}; {size}; in {seconds:.1f} s")
    return model
