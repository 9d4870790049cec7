"""Whether the tensors found are the tensors wanted; used for every format."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from visualglm.checkpoint.files import readable
from visualglm.checkpoint.tensors import WEIGHT_DTYPES, Tensor
from visualglm.errors import CheckpointError
from visualglm.parameters import Shape

_MOST_LISTED = 10


def listed(names: Collection[str], most: int = _MOST_LISTED) -> str:
    """`names` with commas, at most `most` of them and the number of the rest."""
    shown = ", ".join(readable(name) for name in list(names)[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def check_tensors(where: Path, found: Mapping[str, Tensor], expected: Mapping[str, Shape]) -> None:
    """Raises one `CheckpointError` that lists what is missing, unexpected, of another shape, or not a float type."""
    misshapen = [
        f"{name} is {list(found[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    faults = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": misshapen,
        f"not {', '.join(WEIGHT_DTYPES)}": [
            f"{name} is {tensor.dtype}" for name, tensor in found.items() if tensor.dtype not in WEIGHT_DTYPES
        ],
    }
    text = "; ".join(f"{len(names)} {what} ({listed(names)})" for what, names in faults.items() if names)
    if text:
        raise CheckpointError(f"The tensors in {where} do not fit its configuration: {text}.")
