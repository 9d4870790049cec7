"""Loads the model that the options name, and says what is loaded."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from visualglm.checkpoint.progress import Report
from visualglm.cli.messages import Messages
from visualglm.cli.options import ImageOptions, ModelOptions
from visualglm.errors import ConfigError
from visualglm.loading import BUILTIN_NAME, BUILTIN_NOTICE, Choice, adapter_name, choose
from visualglm.memory import available_memory, gib
from visualglm.model import VisualGLM
from visualglm.parameters import parameter_count

# Loading less takes no time worth a note.
_LARGE_BYTES = 2**30


def choose_model(options: ModelOptions, messages: Messages, *, switches: bool = False) -> Choice:
    """The model that the options name, found but not loaded; exported first if it has to be.

    switches: whether the command can do with several adapters. Raises a `VisualGLMError`.
    """
    adapters = _adapters(options.adapter or [])
    if len(adapters) > 1 and not switches:
        raise ConfigError(f"{len(adapters)} adapters are given and one can be used; only chat switches between them.")
    if options.model is None:
        messages.tell(BUILTIN_NOTICE)

    @contextmanager
    def exporting(place: Path) -> Iterator[Report]:
        what = " with adapter ".join([str(options.model or BUILTIN_NAME), *adapters.values()])
        messages.tell(f"{what} has no such export for ONNX Runtime yet; it is made once, as {place}")
        with messages.byte_progress("exporting") as report:
            yield report

    choice = choose(
        options.model,
        **options.runtime(),
        adapters=adapters,
        exporting=exporting,
    )
    for warning in choice.warnings:
        messages.tell(f"Warning: {warning}")
    return choice


def load_model(options: ModelOptions, images: ImageOptions, messages: Messages, *, switches: bool = False) -> VisualGLM:
    """The loaded model, with the limits of `images`; see `choose_model`. Raises a `VisualGLMError`."""
    return load_choice(choose_model(options, messages, switches=switches), images, messages)


def _adapters(given: Sequence[str]) -> dict[str, str]:
    """Folders by the names of adapters, each given as DIR or NAME=DIR."""
    adapters: dict[str, str] = {}
    for text in given:
        named, _, folder = text.partition("=")
        if not (named and folder) or Path(text).exists():
            named, folder = adapter_name(text), text
        if named in adapters:
            raise ConfigError(
                f"The adapters {adapters[named]} and {folder} are both called {named}; give one as NAME={folder}."
            )
        adapters[named] = folder
    return adapters


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
