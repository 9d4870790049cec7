"""A model and an adapter as one model: weights that are added up when they are read, a few rows at a time."""

from __future__ import annotations

from visualglm.checkpoint.adapter_dir import AdapterDirectory
from visualglm.checkpoint.model_dir import ModelDirectory


def merged(directory: ModelDirectory, adapter: AdapterDirectory) -> ModelDirectory:
    """`directory` as it is with `adapter`: a view whose tensors are computed when they are read.

    Raises `CheckpointError` if the adapter belongs to another model, or has prefixes, which no weights can hold.
    """
    raise NotImplementedError
