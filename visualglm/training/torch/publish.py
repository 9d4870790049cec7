"""From trained weights to a model directory."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from visualglm.checkpoint.contents import Checkpoint
from visualglm.checkpoint.manifest import Source
from visualglm.checkpoint.model_dir import ModelDirectory, write_model_directory
from visualglm.checkpoint.tensors import LazyTensor
from visualglm.config import VisualGLMConfig


def publish(
    state: Mapping[str, Tensor],
    config: VisualGLMConfig,
    tokenizer_path: Path,
    output: Path,
    *,
    source: str,
    license_text: str,
    force: bool = False,
) -> ModelDirectory:
    """Write `state` (float32 parameters by their names) in float16, with its tokenizer. Raises `CheckpointError`."""
    tensors = {
        name: LazyTensor("float16", tuple(tensor.shape), partial(_half, tensor)) for name, tensor in state.items()
    }
    checkpoint = Checkpoint(
        config.model_copy(update={"dtype": "float16"}),
        tensors,
        Source(format=source),
        tokenizer_path=tokenizer_path,
        license_text=license_text,
    )
    return write_model_directory(output, checkpoint, force=force)


def _half(tensor: Tensor) -> NDArray[Any]:
    return tensor.detach().numpy().astype(np.float16)
