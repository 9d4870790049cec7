"""What commands say where packages are missing that the base install does not have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

from visualglm.errors import ConfigError
from visualglm.training.engine import TrainingBackend


@dataclass(frozen=True)
class _Extra:
    """What training with a library needs: modules, and the extra that brings their packages."""

    library: str
    name: str
    modules: tuple[str, ...]


_EXTRAS: dict[TrainingBackend, _Extra] = {
    "torch": _Extra(
        "PyTorch", "train", ("accelerate", "matplotlib", "peft", "tensorboard", "torch", "transformers", "yaml")
    ),
    "mindspore": _Extra("MindSpore", "mindspore", ("matplotlib", "mindspore", "yaml")),
}
# Packages that are not called as the module is.
_PACKAGES = {"yaml": "pyyaml"}


@contextmanager
def needs_training(backend: TrainingBackend = "torch") -> Iterator[None]:
    """Turns the failed import of a package that training needs into a `ConfigError` that names all that are missing."""
    extra = _EXTRAS[backend]
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in extra.modules:
            raise
        missing = [_PACKAGES.get(name, name) for name in extra.modules if find_spec(name) is None]
        raise ConfigError(
            f"Training with {extra.library} needs {', '.join(missing) or error.name}; "
            f"`pip install 'visualglm[{extra.name}]'` adds what is missing."
        ) from error
