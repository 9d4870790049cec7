"""The rotary frequencies that foreign checkpoints store: computed anew by every backend, and only checked here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visualglm.checkpoint.tensors import LazyTensor, Tensor, as_float32, rounded
from visualglm.config import TextConfig
from visualglm.errors import CheckpointError


def rotary_tensor(config: TextConfig, dtype: str) -> LazyTensor:
    """The frequencies of `config`, rounded from float32 to `dtype`."""
    frequencies = _frequencies(config)
    return LazyTensor(dtype, frequencies.shape, lambda: rounded(frequencies, dtype))


def check_rotary(where: Path, stored: Mapping[str, Tensor], config: TextConfig) -> None:
    """Raises `CheckpointError` unless each tensor holds base^(-2i/d) in float32, or rounded to 16 bits at some time."""
    exact = _frequencies(config)
    # Libraries differ in the last bit of a float32 power.
    allowed = [exact, np.nextafter(exact, np.float32(0)), np.nextafter(exact, np.float32(2))]
    for name, tensor in stored.items():
        values = as_float32(tensor.array(), tensor.dtype)
        fits = any(
            values.shape == exact.shape and _among(values, [_round(choice, dtype) for choice in allowed])
            for dtype in ("float32", "float16", "bfloat16")
        )
        if not fits:
            raise CheckpointError(
                f"{where}: {name} does not hold the rotary frequencies of base {config.rotary_base:g} and head width "
                f"{config.head_dim}, so this model computes something else; it cannot be converted."
            )


def _frequencies(config: TextConfig) -> NDArray[np.float32]:
    half = config.head_dim // 2
    exponents = np.arange(0, half, 2, dtype=np.float64) / half
    return (config.rotary_base**-exponents).astype(np.float32)


def _among(values: NDArray[np.float32], choices: list[NDArray[np.float32]]) -> bool:
    return bool(np.all(np.any([values == choice for choice in choices], axis=0)))


def _round(values: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    return as_float32(rounded(values, dtype), dtype)
