"""What commands say where a package is missing that the base install does not have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from visualglm.errors import ConfigError

_OF_TRAIN = ("accelerate", "matplotlib", "peft", "tensorboard", "torch", "transformers", "yaml")


@contextmanager
def needs_training() -> Iterator[None]:
    """Turns the failed import of a package of the extra "train" into a `ConfigError`."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _OF_TRAIN:
            raise
        raise ConfigError(f"Training needs {error.name}; `pip install 'visualglm[train]'` adds it.") from error
