"""In which precision weights are loaded for training, and which are not loaded at all."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.torch.test_trainable import batch_of, gradients
from visualglm.backends.torch.quantized_linear import QuantizedLinear
from visualglm.checkpoint.model_dir import ModelDirectory, open_model_directory
from visualglm.checkpoint.tensors import tensor_bytes
from visualglm.config import VisualGLMConfig
from visualglm.errors import DeviceError
from visualglm.training.recipe import DataRecipe, FinetuneRecipe, RunRecipe, TuneRecipe
from visualglm.training.torch.load import load_for_training, training_dtype
from visualglm.training.torch.trainable import make_trainable

CPU = torch.device("cpu")


@pytest.fixture
def directory(tiny_model_dir: Path) -> ModelDirectory:
    return open_model_directory(tiny_model_dir)


def recipe_of(*methods: str, precision: str = "auto", bits: int = 4) -> FinetuneRecipe:
    return FinetuneRecipe(
        data=DataRecipe(train=Path("rows.jsonl")),
        tune=TuneRecipe(methods=methods, base_bits=bits, layer_range="all"),
        run=RunRecipe(precision=precision),
    )


def test_a_frozen_base_is_in_the_precision_asked_for(directory: ModelDirectory) -> None:
    model = load_for_training(directory, recipe_of("lora", precision="bfloat16"), CPU)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    trainable = make_trainable(model, recipe_of("lora").tune, seed=0)
    assert {parameter.dtype for parameter in trainable.parameters().values()} == {torch.float32}
    found = gradients(trainable, batch_of(model.config))
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in found.values())


def test_parts_trained_as_a_whole_are_in_float32(directory: ModelDirectory) -> None:
    model = load_for_training(directory, recipe_of("lora", "qformer", precision="bfloat16"), CPU)
    kinds = {
        part: {tensor.dtype for name, tensor in model.state_dict().items() if name.startswith(part)}
        for part in ("vision", "qformer", "projection", "text")
    }
    assert kinds == {
        "vision": {torch.bfloat16},
        "qformer": {torch.float32},
        "projection": {torch.float32},
        "text": {torch.bfloat16},
    }
    trainable = make_trainable(model, recipe_of("lora", "qformer").tune, seed=0, dtype="bfloat16")
    assert gradients(trainable, batch_of(model.config)).keys() == trainable.parameters().keys()


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_gradients_in_half_precision_are_near_those_in_float32(directory: ModelDirectory, precision: str) -> None:
    exact, half = (
        gradients(
            make_trainable(load_for_training(directory, recipe_of("ptuning", precision=own), CPU), TUNE, seed=0),
            batch_of(directory.config),
        )
        for own in ("float32", precision)
    )
    for name, gradient in exact.items():
        assert float((half[name] - gradient).norm() / gradient.norm()) < 0.06


TUNE = TuneRecipe(methods=("ptuning",))


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.02), (4, 0.3)])
def test_a_base_in_whole_numbers(directory: ModelDirectory, bits: int, bound: float) -> None:
    """The decoder's linear layers only; loss and gradients are near those of the whole base, nearer in 8 bits."""
    recipe = recipe_of("qlora", precision="float32", bits=bits)
    model = load_for_training(directory, recipe, CPU)
    quantized = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    layers = ("attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2")
    assert quantized == {f"text.layers.{index}.{layer}" for index in range(2) for layer in layers}
    weight = directory.tensors["text.layers.0.mlp.fc2.weight"].array().astype(np.float32)
    meant = model.text.layers[0].mlp.fc2.rows(slice(None)).numpy()  # type: ignore[union-attr]
    assert np.linalg.norm(meant - weight) / np.linalg.norm(weight) < bound / 2
    whole = load_for_training(directory, recipe_of("lora"), CPU)
    found, expected = (
        gradients(make_trainable(each, recipe.tune, seed=0), batch_of(model.config)) for each in (model, whole)
    )
    assert found.keys() == expected.keys()
    assert all(
        float((found[name] - gradient).norm()) <= bound * float(gradient.norm()) for name, gradient in expected.items()
    )


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_how_far_loading_has_come_is_reported(directory: ModelDirectory, method: str) -> None:
    seen: list[tuple[int, int]] = []
    load_for_training(directory, recipe_of(method), CPU, ("text",), lambda *pair: seen.append(pair))
    sizes = [tensor_bytes(tensor) for name, tensor in directory.tensors.items() if name.startswith("text.")]
    assert [done for done, _ in seen] == sorted({done for done, _ in seen}) and len(seen) == len(sizes)
    assert seen[-1] == (sum(sizes), sum(sizes)) and {total for _, total in seen} == {sum(sizes)}


def test_what_is_left_out_takes_no_memory(directory: ModelDirectory) -> None:
    text = load_for_training(directory, recipe_of("lora"), CPU, parts=("text",))
    assert {name.split(".")[0] for name, _ in text.named_parameters()} == {"text"}
    image = load_for_training(directory, recipe_of("lora"), CPU, parts=("image",))
    assert {name.split(".")[0] for name, _ in image.named_parameters()} == {"vision", "qformer", "projection"}
    whole, batch = load_for_training(directory, recipe_of("lora"), CPU), batch_of(directory.config)
    with torch.no_grad():
        pixels = torch.from_numpy(batch.pixels)
        assert torch.equal(image.encode_images(pixels), whole.encode_images(pixels))
    trainable = make_trainable(text, recipe_of("lora").tune, seed=0)
    embeds = np.zeros((2, 4, directory.config.text.hidden_size), np.float32)
    loss, _ = trainable.loss(type(batch)(batch.layout, batch.labels, None, embeds, batch.rows))
    assert loss.isfinite()


def test_which_precision_is_chosen(tiny_config: VisualGLMConfig) -> None:
    assert training_dtype("auto", tiny_config, CPU) == "float32"
    assert training_dtype("auto", VisualGLMConfig(), CPU) == "bfloat16"
    assert training_dtype("float16", VisualGLMConfig(), CPU) == "float16"
    with pytest.raises(DeviceError, match="'half' is unknown"):
        training_dtype("half", tiny_config, CPU)  # type: ignore[arg-type]
