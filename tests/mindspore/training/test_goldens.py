"""LoRA against what the original computed: the loss and every gradient, operator by operator and as a graph.

The original has three pairs of rank r for q, k and v. As one standard pair its A are stacked and its B lie on the
diagonal of blocks; the gradients of the blocks are those of the pairs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mindspore import Tensor, ops
from numpy.typing import NDArray

from visualglm.checkpoint.convert import convert
from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.checkpoint.pickle_reader import read_torch_archive
from visualglm.checkpoint.tensors import as_float32
from visualglm.processing.layout import layout_from_ids
from visualglm.training.batches import Batch
from visualglm.training.mindspore.engine import MindSporeEngine, MindSporeTuned
from visualglm.training.recipe import DataRecipe, FinetuneRecipe, RunRecipe, TuneRecipe

GOLDENS = Path(__file__).parents[2] / "goldens"
BOUND = 1e-5
NAMES = {"attention.query_key_value": "attention.qkv", "attention.dense": "attention.proj", "transformer.": "text."}
Floats = NDArray[np.float32]
Pairs = dict[str, tuple[list[Floats], list[Floats]]]


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("name", ["a_image_b1", "c_text_only"])
def test_loss_and_every_gradient(tmp_path: Path, name: str, compiled: bool, recompute: bool) -> None:
    meta = json.loads((GOLDENS / name / "meta.json").read_text("utf-8"))
    arrays = dict(np.load(GOLDENS / name / "golden.npz"))
    convert(GOLDENS / name, tmp_path / "model")
    batch, pairs = golden_batch(tmp_path / "model", arrays, meta), original_pairs(name)
    tuned = with_lora(tmp_path / "model", pairs, meta, compiled=compiled, recompute=recompute)
    columns, count = batch.layout.sequence_length, batch.token_count
    # Room for more than there is: what fills it up must change nothing.
    learner = tuned.learner(1, (columns + 5, count + 3))
    loss, flat = learner._gradients(batch, 1 / count)
    assert abs(loss / count - float(arrays["lora_train_loss"])) < BOUND
    named = dict(zip(learner.parameters, (part.asnumpy() for part in learner._split(flat)), strict=True))
    found = blocks(named, pairs, meta["lora"]["rank"])
    expected = {key.removeprefix("lora_grad/"): array for key, array in arrays.items() if key.startswith("lora_grad/")}
    assert found.keys() == expected.keys()
    assert max(np.abs(array).max() for array in expected.values()) > 10 * BOUND
    for key, array in expected.items():
        assert np.abs(found[key] - array).max() < BOUND, key


def golden_batch(model: Path, arrays: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]) -> Batch:
    text, pixels = open_model_directory(model).config.text, arrays.get("image")
    layout = layout_from_ids(
        arrays["train_input_ids"],
        pad_token_id=text.pad_token_id,
        bos_token_id=text.bos_token_id,
        image_start=None if pixels is None else int(meta["pre_image"]),
    )
    return Batch(layout, arrays["train_labels"], pixels, None, (0,))


def original_pairs(name: str) -> Pairs:
    """Of each adapted layer, by the names of the original: its A and its B."""
    pairs: Pairs = {}
    for key, stored in read_torch_archive(GOLDENS / name / "lora_only_state.pt", "module").items():
        layer, kind, _ = key.rsplit(".", 2)
        pairs.setdefault(layer, ([], []))[kind == "matrix_B"].append(as_float32(stored.array(), stored.dtype))
    return pairs


def with_lora(model: Path, pairs: Pairs, meta: Mapping[str, Any], *, compiled: bool, recompute: bool) -> MindSporeTuned:
    """The model with the original's LoRA, all pairs filled up with zeros to one rank."""
    info = meta["lora"]
    rank = 3 * info["rank"]
    tune = TuneRecipe(lora_rank=rank, lora_alpha=info["scaling"] * rank, layer_range=tuple(info["layer_range"]))
    run = RunRecipe(batch_size=2, activation_checkpointing=recompute)
    recipe = FinetuneRecipe(data=DataRecipe(train=model), tune=tune, run=run)
    tuned = MindSporeEngine("cpu", compiled=compiled).load(open_model_directory(model), recipe, with_encoder=True)
    for layer, (a, b) in pairs.items():
        cell, own = tuned.pairs.cells[our_name(layer)], info["rank"]
        down, up = np.zeros(cell.lora_a.shape, np.float32), np.zeros(cell.lora_b.shape, np.float32)
        for index, (one_a, one_b) in enumerate(zip(a, b, strict=True)):
            part = slice(index * own, (index + 1) * own)
            down[part] = one_a
            up[index * len(one_b) : (index + 1) * len(one_b), part] = one_b
        ops.assign(cell.lora_a, Tensor(down))
        ops.assign(cell.lora_b, Tensor(up))
    return tuned


def our_name(layer: str) -> str:
    for theirs, ours in NAMES.items():
        layer = layer.replace(theirs, ours)
    return layer


def blocks(gradients: Mapping[str, Floats], pairs: Pairs, rank: int) -> dict[str, Floats]:
    """Of the parts of our pairs that stand for the original's, by its names."""
    found = {}
    for layer, (a, b) in pairs.items():
        down, up = (gradients[f"model.{our_name(layer)}.lora_{part}.default.weight"] for part in "AB")
        rows = len(b[0])
        for index in range(len(a)):
            own = slice(index * rank, (index + 1) * rank)
            found[f"{layer}.matrix_A.{index}"] = down[own]
            found[f"{layer}.matrix_B.{index}"] = up[index * rows : (index + 1) * rows, own]
    return found
