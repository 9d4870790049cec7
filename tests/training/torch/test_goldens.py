"""LoRA and P-tuning against what the original computed: logits, loss, and every gradient.

The original has three pairs of rank r for q, k and v. As one standard pair its A are stacked and its B lie on the
diagonal of blocks; the gradients of the blocks are those of the pairs.
"""

import json
from collections.abc import Callable, Mapping
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.backends.conftest import GOLDEN_NAMES, GOLDENS, Golden, load_golden  # noqa: F401
from tests.backends.test_goldens import layout_of, model_of
from visualglm.backends.torch.backend import TorchBackend
from visualglm.backends.torch.prefix import set_prefixes
from visualglm.checkpoint.keys import sat_name
from visualglm.model import VisualGLM
from visualglm.parameters import prefix_name
from visualglm.training.batches import Batch
from visualglm.training.recipe import TuneRecipe
from visualglm.training.torch.trainable import Trainable, make_trainable

BOUND = 1e-5
NAMES = {"attention.query_key_value": "attention.qkv", "attention.dense": "attention.proj"}


@pytest.fixture(params=GOLDEN_NAMES)
def golden(request: pytest.FixtureRequest, load_golden: Callable[[str], Golden]) -> Golden:  # noqa: F811
    return load_golden(request.param)


def original_pairs(golden: Golden) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """Of each adapted layer, by the names of the original: its A and its B."""
    folder = GOLDENS / golden.meta["name"]
    state = torch.load(folder / "lora_only_state.pt", weights_only=True)["module"]
    pairs: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for name, tensor in state.items():
        layer, kind, _ = name.rsplit(".", 2)
        pairs.setdefault(layer, ([], []))[kind == "matrix_B"].append(tensor)
    return pairs


def our_name(layer: str) -> str:
    for theirs, ours in NAMES.items():
        layer = layer.replace(theirs, ours)
    return layer.replace("transformer.", "base_model.model.text.")


def with_lora(golden: Golden, **options: bool) -> Trainable:
    """The golden's model with its LoRA, all pairs filled up with zeros to one rank."""
    info, pairs = golden.meta["lora"], original_pairs(golden)
    rank = 3 * info["rank"]
    tune = TuneRecipe(lora_rank=rank, lora_alpha=info["scaling"] * rank, layer_range=tuple(info["layer_range"]))
    trainable = make_trainable(deepcopy(model_of(golden)), tune, seed=0, **options)
    tensors = {}
    for layer, (a, b) in pairs.items():
        tensors[f"{our_name(layer)}.lora_A.weight"] = zero_padded(torch.cat(a), rank, dim=0)
        tensors[f"{our_name(layer)}.lora_B.weight"] = zero_padded(torch.block_diag(*b), rank, dim=1)
    trainable.load_adapter_tensors(tensors)
    return trainable


def zero_padded(tensor: Tensor, size: int, dim: int) -> Tensor:
    missing = list(tensor.shape)
    missing[dim] = size - missing[dim]
    return torch.cat([tensor, tensor.new_zeros(missing)], dim)


def train_batch(golden: Golden) -> Batch:
    layout = layout_of(golden, golden.arrays["train_input_ids"])
    return Batch(layout, golden.arrays["train_labels"], golden.pixels, None, (0,))


def logits(trainable: Trainable, golden: Golden) -> np.ndarray:
    model = VisualGLM(TorchBackend(trainable.model), None)
    return model.logits(golden.arrays["input_ids"], golden.pixels, golden.image_start)


def test_lora_logits(golden: Golden) -> None:
    assert np.abs(logits(with_lora(golden), golden) - golden.arrays["lora_logits"]).max() < BOUND


def test_merged_logits(golden: Golden) -> None:
    trainable = with_lora(golden)
    for module in trainable.model.modules():
        if hasattr(module, "lora_A") and hasattr(module, "merge"):
            module.merge()
    merged = trainable.model.text.layers[0].attention.qkv.base_layer.weight
    assert np.abs(merged.detach().numpy() - golden.arrays["lora_merged_qkv_weight_layer0"]).max() < BOUND
    assert np.abs(logits(trainable, golden) - golden.arrays["lora_merged_logits"]).max() < BOUND


@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_every_gradient(golden: Golden, recompute: bool) -> None:
    trainable = with_lora(golden, activation_checkpointing=recompute)
    loss, count = trainable.loss(train_batch(golden))
    assert count == int((golden.arrays["train_labels"] >= 0).sum())
    mean = loss / count
    assert abs(mean.item() - float(golden.arrays["lora_train_loss"])) < BOUND
    mean.backward()
    found = blocks_of_gradients(trainable, golden)
    expected = {
        name.removeprefix("lora_grad/"): a for name, a in golden.arrays.items() if name.startswith("lora_grad/")
    }
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.abs(found[name] - array).max() < BOUND, name


def blocks_of_gradients(trainable: Trainable, golden: Golden) -> Mapping[str, np.ndarray]:
    """Of the parts of our pairs that stand for the original's, by its names."""
    gradients = {
        name.removesuffix(".default.weight"): p.grad.numpy()
        for name, p in trainable.parameters().items()
        if p.grad is not None
    }
    blocks, rank = {}, golden.meta["lora"]["rank"]
    for layer, (a, _) in original_pairs(golden).items():
        ours = our_name(layer).removeprefix("base_model.model.")
        down, up = gradients[f"{ours}.lora_A"], gradients[f"{ours}.lora_B"]
        rows = len(up) // len(a)
        for i in range(len(a)):
            own = slice(i * rank, (i + 1) * rank)
            blocks[f"{layer}.matrix_A.{i}"] = down[own]
            blocks[f"{layer}.matrix_B.{i}"] = up[i * rows : (i + 1) * rows, own]
    return blocks


def test_prefixes(load_golden: Callable[[str], Golden]) -> None:  # noqa: F811
    golden = load_golden("a_image_b1")
    model = deepcopy(model_of(golden))
    prefixes = {
        prefix_name(layer): torch.from_numpy(golden.arrays[f"ptuning/mixins.ptuning.prefix.{layer}"])
        for layer in range(len(model.text.layers))
    }
    set_prefixes(model.text, prefixes)
    tuned = VisualGLM(TorchBackend(model), None)
    found = tuned.logits(golden.arrays["input_ids"], golden.pixels, golden.image_start)
    assert np.abs(found - golden.arrays["ptuning_logits"]).max() < BOUND
    set_prefixes(model.text, None)
    plain = tuned.logits(golden.arrays["input_ids"], golden.pixels, golden.image_start)
    assert np.abs(plain - golden.arrays["logits"]).max() < BOUND


def test_gradients_of_the_whole_model(golden: Golden) -> None:
    """The norm of each weight's, which is what the original left."""
    trainable = make_trainable(deepcopy(model_of(golden)), TuneRecipe(methods=("full",)), seed=0)
    loss, count = trainable.loss(train_batch(golden))
    (loss / count).backward()
    found = {sat_name(name): float(p.grad.norm()) for name, p in trainable.parameters().items() if p.grad is not None}
    expected = json.loads((GOLDENS / golden.meta["name"] / "full_grad_norms.json").read_text("utf-8"))
    assert found == pytest.approx(expected, rel=2e-5)
