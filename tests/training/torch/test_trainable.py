"""What is trained, how it is named, and that nothing else is."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from visualglm.backends.torch.joined import VisualGLMModel
from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.config import VisualGLMConfig
from visualglm.errors import CheckpointError, ConfigError
from visualglm.parameters import parameter_shapes
from visualglm.processing.layout import pad_batch
from visualglm.training.batches import Batch
from visualglm.training.recipe import DataRecipe, FinetuneRecipe, TuneRecipe
from visualglm.training.torch.load import load_for_training
from visualglm.training.torch.trainable import Trainable, make_trainable

CPU = torch.device("cpu")


@pytest.fixture
def model(tiny_model_dir: Path) -> VisualGLMModel:
    recipe = FinetuneRecipe(data=DataRecipe(train=Path("rows.jsonl")))
    return load_for_training(open_model_directory(tiny_model_dir), recipe, CPU)


def batch_of(config: VisualGLMConfig, lengths: tuple[int, ...] = (5, 8)) -> Batch:
    """Rows with an image, of prompts of unequal length and answers of three tokens."""
    text, queries = config.text, config.qformer.num_query_tokens
    rows = [
        [20, *[text.pad_token_id] * queries, *range(30, 30 + length), text.gmask_token_id, text.bos_token_id, 40, 41]
        for length in lengths
    ]
    layout = pad_batch(rows, [1] * len(rows), pad_token_id=text.pad_token_id, bos_token_id=text.bos_token_id)
    labels = np.full_like(layout.input_ids, -100)
    labels[:, -3:] = layout.input_ids[:, -3:]
    size = config.vision.image_size
    pixels = np.random.default_rng(0).normal(size=(len(rows), 3, size, size)).astype(np.float32)
    return Batch(layout, labels, pixels, None, tuple(range(len(rows))))


def gradients(trainable: Trainable, batch: Batch) -> dict[str, Tensor]:
    loss, count = trainable.loss(batch)
    (loss / count).backward()
    return {name: p.grad for name, p in trainable.parameters().items() if p.grad is not None}


@pytest.mark.parametrize(
    ("methods", "starts"),
    [
        (("lora",), ("text.layers.1.attention.qkv.lora_", "text.layers.1.attention.proj.lora_")),
        (("ptuning",), ("text.layers.0.attention.prefix", "text.layers.1.attention.prefix")),
        (("qformer",), ("qformer.", "projection.")),
        (("vit",), ("vision.",)),
        (("full",), ("vision.", "qformer.", "projection.", "text.")),
        (("lora", "ptuning", "vit"), ("text.layers.1.attention", "text.layers.0.attention.prefix", "vision.")),
    ],
)
def test_what_is_named_is_trained_and_nothing_else(
    model: VisualGLMModel, methods: tuple[str, ...], starts: tuple[str, ...]
) -> None:
    trainable = make_trainable(model, TuneRecipe(methods=methods, layer_range=(1,)), seed=0)
    names = trainable.parameters().keys()
    assert all(name.startswith(starts) for name in names)
    assert all(any(name.startswith(start) for name in names) for start in starts)
    assert gradients(trainable, batch_of(model.config)).keys() == names
    assert sum(row.parameters for row in trainable.summary()) == sum(p.numel() for p in trainable.parameters().values())
    frozen = {name for name, _ in trainable.loss.named_parameters()} - {f"model.{name}" for name in names}
    assert set(trainable.frozen_names()) == frozen | {"model.text.rotary"}


def test_the_whole_model_is_trained(model: VisualGLMModel) -> None:
    trainable = make_trainable(model, TuneRecipe(methods=("full",)), seed=0)
    assert trainable.parameters().keys() == parameter_shapes(model.config).keys() == trainable.whole_tensors().keys()
    assert trainable.trains_vision and trainable.lowest_layer == 0


def test_lora_in_the_names_of_peft(model: VisualGLMModel) -> None:
    tune = TuneRecipe(lora_rank=3, lora_alpha=6, target_modules=("qkv", "fc2"), layer_range=(1,))
    trainable = make_trainable(model, tune, seed=0)
    width, inner = model.config.text.hidden_size, model.config.text.intermediate_size
    start = "base_model.model.text.layers.1"
    tensors = trainable.adapter_tensors()
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        f"{start}.attention.qkv.lora_A.weight": (3, width),
        f"{start}.attention.qkv.lora_B.weight": (3 * width, 3),
        f"{start}.mlp.fc2.lora_A.weight": (3, inner),
        f"{start}.mlp.fc2.lora_B.weight": (width, 3),
    }
    assert not any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
    settings = trainable.lora_settings()
    assert settings is not None
    assert (settings["r"], settings["lora_alpha"]) == (3, 6)
    assert settings["target_modules"] == ["text.layers.1.attention.qkv", "text.layers.1.mlp.fc2"]
    assert trainable.summary()[0][:2] == ("LoRA on qkv, fc2 (rank 3, alpha 6)", "1")
    assert (trainable.lowest_layer, trainable.trains_vision) == (1, False)


def test_the_seed_decides_what_training_starts_from(tiny_model_dir: Path, model: VisualGLMModel) -> None:
    again = load_for_training(
        open_model_directory(tiny_model_dir), FinetuneRecipe(data=DataRecipe(train=Path("rows.jsonl"))), CPU
    )
    tune = TuneRecipe(methods=("lora", "ptuning"))
    before = torch.get_rng_state()
    first, second = (make_trainable(each, tune, seed=5) for each in (model, again))
    assert torch.equal(torch.get_rng_state(), before), "all else that is drawn stays as it would be"
    for name, tensor in first.adapter_tensors().items():
        assert torch.equal(second.adapter_tensors()[name], tensor)
    for name, tensor in first.prefix_tensors().items():
        assert torch.equal(second.prefix_tensors()[name], tensor)


def test_what_was_taken_can_be_put_back(model: VisualGLMModel) -> None:
    trainable = make_trainable(model, TuneRecipe(methods=("lora", "ptuning", "qformer")), seed=0)
    taken = {**trainable.adapter_tensors(), **trainable.prefix_tensors(), **trainable.whole_tensors()}
    assert len(taken) == len(trainable.parameters())
    with torch.no_grad():
        for parameter in trainable.parameters().values():
            parameter.zero_()
    trainable.load_adapter_tensors(taken)
    for name, tensor in {**trainable.adapter_tensors(), **trainable.prefix_tensors()}.items():
        assert torch.equal(tensor, taken[name])
    assert torch.equal(trainable.whole_tensors()["projection.weight"], taken["projection.weight"])


def test_tensors_of_another_recipe_are_refused(model: VisualGLMModel) -> None:
    trainable = make_trainable(model, TuneRecipe(layer_range=(1,), target_modules=("proj",)), seed=0)
    tensors = trainable.adapter_tensors()
    name = "base_model.model.text.layers.1.attention.proj.lora_A.weight"
    for others, message in (
        ({name: tensors[name]}, r"lacks the tensor .*proj\.lora_B.*"),
        ({**tensors, "text.norm.weight": torch.zeros(1)}, r"has the tensor text\.norm\.weight, but .* not train it"),
        ({**tensors, name: torch.zeros(2, 2)}, r"proj\.lora_A\.weight has the shape \[2, 2\], but .* \[10, 32\]"),
    ):
        with pytest.raises(CheckpointError, match=message):
            trainable.load_adapter_tensors(others)


def test_a_layer_the_model_does_not_have(model: VisualGLMModel) -> None:
    with pytest.raises(ConfigError, match=r"layer 2, but the model has 2 layers"):
        make_trainable(model, TuneRecipe(layer_range=(0, 2)), seed=0)


def test_a_rank_above_the_width_of_the_layers(model: VisualGLMModel) -> None:
    with pytest.raises(
        ConfigError, match=r"tune\.lora_rank is 100,000, but .* are 32 wide; give at most 32 \(--rank\)"
    ):
        make_trainable(model, TuneRecipe(lora_rank=100_000), seed=0)
    make_trainable(model, TuneRecipe(lora_rank=32), seed=0)


def test_nothing_is_kept_below_the_lowest_trained_layer(model: VisualGLMModel) -> None:
    trainable = make_trainable(model, TuneRecipe(layer_range=(1,)), seed=0)
    outputs = []
    for module in (model.projection, *model.text.layers):
        module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output.requires_grad))
    trainable.loss(batch_of(model.config))
    assert outputs == [False, False, True]


def test_only_the_columns_before_labels_go_through_the_head(model: VisualGLMModel) -> None:
    trainable = make_trainable(model, TuneRecipe(), seed=0)
    rows = []
    model.text.lm_head.register_forward_hook(lambda _module, inputs, _output: rows.append(inputs[0].shape))
    _, count = trainable.loss(batch_of(model.config))
    assert (rows, count) == ([(6, model.config.text.hidden_size)], 6)


def test_the_loss_of_rows_together_is_the_sum_of_each_ones(model: VisualGLMModel) -> None:
    trainable = make_trainable(model, TuneRecipe(), seed=0)
    batch = batch_of(model.config)
    together, count = trainable.loss(batch)
    singles = [trainable.loss(single_row(model.config, batch, row)) for row in range(2)]
    assert count == sum(own for _, own in singles)
    assert together.item() == pytest.approx(sum(loss.item() for loss, _ in singles), rel=1e-6)


def single_row(config: VisualGLMConfig, batch: Batch, row: int) -> Batch:
    alone = batch_of(config, (5,) if row == 0 else (8,))
    return Batch(alone.layout, alone.labels, batch.pixels[row : row + 1], None, (row,))  # type: ignore[index]


def test_embeddings_that_were_computed_before_give_the_same_loss(model: VisualGLMModel) -> None:
    trainable = make_trainable(model, TuneRecipe(), seed=0)
    batch = batch_of(model.config)
    with torch.no_grad():
        embeds = model.encode_images(torch.from_numpy(batch.pixels)).numpy()
    cached = Batch(batch.layout, batch.labels, None, embeds, batch.rows)
    assert torch.equal(trainable.loss(cached)[0], trainable.loss(batch)[0])


def test_a_batch_without_labels_has_a_loss_of_zero_and_no_gradient(model: VisualGLMModel) -> None:
    trainable = make_trainable(model, TuneRecipe(), seed=0)
    batch = batch_of(model.config)
    empty = Batch(batch.layout, np.full_like(batch.labels, -100), batch.pixels, None, ())
    loss, count = trainable.loss(empty)
    loss.backward()
    assert (loss.item(), count) == (0.0, 0)
    assert all(p.grad is None or not p.grad.any() for p in trainable.parameters().values())


@pytest.mark.parametrize("methods", [("lora", "ptuning"), ("full",)])
def test_recomputed_activations_give_the_same_gradients(
    tiny_model_dir: Path, model: VisualGLMModel, methods: tuple[str, ...]
) -> None:
    tune, batch = TuneRecipe(methods=methods, lora_dropout=0.5 * ("lora" in methods)), batch_of(model.config)
    expected = []
    for recompute in (False, True):
        recipe = FinetuneRecipe(data=DataRecipe(train=Path("rows.jsonl")))
        fresh = load_for_training(open_model_directory(tiny_model_dir), recipe, CPU)
        trainable = make_trainable(fresh, tune, seed=0, activation_checkpointing=recompute)
        torch.manual_seed(3)
        expected.append(gradients(trainable, batch))
    assert expected[0].keys() == expected[1].keys()
    assert all(torch.equal(expected[0][name], gradient) for name, gradient in expected[1].items())


def test_peft_is_not_imported_before_lora_is_made() -> None:
    script = "import sys, visualglm.training.torch.engine; sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[3]).returncode == 0
