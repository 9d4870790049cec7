"""LoRA that the MindFormers recipe trained, one pair for each linear layer, as an adapter directory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visualglm.checkpoint.adapter_dir import AdapterDirectory, write_adapter
from visualglm.checkpoint.checks import listed
from visualglm.checkpoint.files import checked_path, readable
from visualglm.checkpoint.manifest import Source
from visualglm.checkpoint.mindformers import NAME, is_same, mindformers_tensors
from visualglm.checkpoint.mindformers_config import recipe_beside
from visualglm.checkpoint.mindspore_ckpt import read_mindspore
from visualglm.checkpoint.model_dir import ModelDirectory
from visualglm.checkpoint.peft_config import peft_values
from visualglm.checkpoint.tensors import WEIGHT_DTYPES, Tensor, as_float32
from visualglm.errors import CheckpointError
from visualglm.faults import brief

RECIPE_ALPHA = 128.0
"""What the recipe has as lora_alpha; the files do not tell it."""

# `tk` in older versions of the library, which is now mindpet.
_PAIR = re.compile(
    r"(llm_model\.)?transformer\.layers\.(?P<layer>\d{1,4})\.attention\.(?P<linear>query_key_value|dense)"
    r"\.(mindpet|tk)_delta_lora_(?P<part>[abAB])"
)
_ADDED = re.compile(r".*_delta_lora_[abAB]")
_LINEARS = {"query_key_value": "qkv", "dense": "proj"}
# The language model inside the whole one.
_WITHIN = "llm_model."


def holds_mindformers_adapter(source: Path) -> bool:
    """Whether a `.ckpt` file holds LoRA; raises `CheckpointError` if it is damaged."""
    return source.is_file() and source.suffix == ".ckpt" and any(map(_ADDED.fullmatch, read_mindspore(source)))


def told_alpha(source: Path) -> float | None:
    """The lora_alpha in the recipe beside a file; None if none tells it.

    Raises `ConfigError` if the recipe cannot be read, `CheckpointError` if it is no number.
    """
    alpha = _pet_config(source).get("lora_alpha")
    if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, int | float)):
        raise CheckpointError(f"The recipe beside {source} has the lora_alpha {brief(alpha)}; give it a number.")
    return alpha


def convert_mindformers_adapter(
    source: Path | str, output: Path | str, *, base: ModelDirectory | None = None, force: bool = False
) -> AdapterDirectory:
    """Convert the LoRA in a `.ckpt` file of MindFormers to an adapter directory.

    base: the model that was fine-tuned; the file's own copy of it, if it has one, must be the same. Without it the
    adapter does not know where it belongs. lora_alpha is that of the recipe beside the file, or else `RECIPE_ALPHA`.
    Raises `CheckpointError` if the file is damaged or does not fit the base, and if `output` cannot be written.
    """
    source = checked_path(source)
    found = read_mindspore(source)
    if base is not None:
        _require_same_base(source, {name: t for name, t in found.items() if not _ADDED.fullmatch(name)}, base)
    pairs = _pairs(source, found)
    ranks = {module: len(matrices["A"]) for module, matrices in pairs.items()}
    rank = _common_rank(source, set(ranks.values()))
    alpha = told_alpha(source)
    return write_adapter(
        output,
        base=base,
        lora_settings=peft_values(ranks, rank=rank, alpha=RECIPE_ALPHA if alpha is None else alpha),
        lora={
            f"base_model.model.{module}.lora_{part}.weight": matrix
            for module, matrices in pairs.items()
            for part, matrix in matrices.items()
        },
        source=Source(format=NAME),
        force=force,
    )


def _pet_config(source: Path) -> Mapping[str, object]:
    values = recipe_beside(source.parent).get("text_config", {}).get("pet_config")
    return values if isinstance(values, dict) else {}


def _pairs(source: Path, found: Mapping[str, Tensor]) -> dict[str, dict[str, NDArray[np.float32]]]:
    """The matrices A [rank, in] and B [out, rank] of each module."""
    pairs: dict[str, dict[str, NDArray[np.float32]]] = {}
    unknown = []
    for name in filter(_ADDED.fullmatch, found):
        match, tensor = _PAIR.fullmatch(name), found[name]
        if not match:
            unknown.append(name)
            continue
        if tensor.dtype not in WEIGHT_DTYPES or len(tensor.shape) != 2:
            raise CheckpointError(
                f"{source} has {readable(name)} as {tensor.dtype} {list(tensor.shape)}, and a matrix of "
                f"{', '.join(WEIGHT_DTYPES)} is needed; get it again."
            )
        module = f"text.layers.{int(match['layer'])}.attention.{_LINEARS[match['linear']]}"
        matrix = as_float32(np.ascontiguousarray(tensor.array()), tensor.dtype)
        pairs.setdefault(module, {})[match["part"].upper()] = matrix
    if unknown:
        raise CheckpointError(
            f"{source} adapts layers other than the attention of the text part, which is not supported: "
            f"{listed(unknown)}."
        )
    halves = [module for module, matrices in pairs.items() if len(matrices) != 2]
    if halves or not pairs:
        raise CheckpointError(f"{source} lacks matrices of {listed(halves) or 'LoRA'}; get it again.")
    return pairs


def _common_rank(source: Path, ranks: set[int]) -> int:
    """The rank of the matrices, which the recipe beside them may state too."""
    stated = _pet_config(source).get("lora_rank")
    ranks |= {stated} if isinstance(stated, int) else set()
    if len(ranks) != 1 or 0 in ranks:
        said = listed([str(rank) for rank in sorted(ranks)])
        raise CheckpointError(
            f"{source} and the recipe beside it have LoRA of the ranks {said}, and should have one that is above 0; "
            "put the recipe there that it was trained with."
        )
    return ranks.pop()


def _require_same_base(source: Path, others: Mapping[str, Tensor], base: ModelDirectory) -> None:
    """Raises `CheckpointError` if the file has a copy of its base, and it is another, or holds what no base has."""
    theirs = {name: tensor for file in mindformers_tensors(base.checkpoint).values() for name, tensor in file.items()}
    held = {name.removeprefix(_WITHIN): tensor for name, tensor in others.items() if prod(tensor.shape) != 1}
    unknown = [name for name in held if name not in theirs]
    if unknown:
        raise CheckpointError(f"{source} holds tensors that {base.path} does not have: {listed(unknown)}.")
    for name, tensor in held.items():
        if not is_same(tensor, theirs[name]):
            raise CheckpointError(
                f"{source} was made from another model than {base.path}: {name} differs; "
                "give its own base with --base MODEL."
            )
