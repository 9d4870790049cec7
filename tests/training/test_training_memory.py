"""What training is said to take, and what a run that does not fit is told to change."""

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from visualglm.config import VisualGLMConfig
from visualglm.errors import DeviceError
from visualglm.parameters import parameter_count, parameter_shapes
from visualglm.training.recipe import DataRecipe, FinetuneRecipe, RunRecipe, TuneRecipe
from visualglm.training.training_memory import TrainingCase, added_parameters, require_training_memory

FULL = VisualGLMConfig()
GIB = 2**30


def case(methods: tuple[str, ...] = ("lora",), tune: dict[str, Any] | None = None, **run: Any) -> TrainingCase:
    recipe = FinetuneRecipe(
        data=DataRecipe(train=Path("rows.jsonl")),
        tune=TuneRecipe(methods=methods, **(tune or {})),
        run=RunRecipe(**{"batch_size": 1, **run}),
    )
    return TrainingCase(FULL, recipe, "bfloat16", length=128, labels=32, image_encoder=True)


def test_lora_on_the_released_model() -> None:
    """The default recipe: rank 10 on qkv and proj of two layers."""
    added = 2 * 10 * ((4096 + 3 * 4096) + (4096 + 4096))
    assert added_parameters(TuneRecipe(), FULL) == added
    estimate = case().estimate()
    assert estimate.weights == 2 * 7_802_193_408 + 4 * added
    assert (estimate.gradients, estimate.optimizer) == (4 * added, 8 * added)
    assert estimate.total < 20 * GIB
    assert str(estimate).startswith("16.")


def test_a_base_of_few_bits() -> None:
    decoder = 28 * 12 * 4096**2
    four, eight = (case(("qlora",), {"base_bits": bits}).estimate().weights for bits in (4, 8))
    whole = case().estimate().weights
    assert eight - four == decoder // 2
    assert whole - four == 2 * decoder - decoder // 2 - 5 * decoder // 64
    assert case(("qlora",)).estimate().total < 10 * GIB


def test_what_is_trained_as_a_whole_is_counted_in_float32() -> None:
    estimate = case(("full",)).estimate()
    parameters = parameter_count(FULL)
    assert (estimate.weights, estimate.gradients, estimate.optimizer) == (
        4 * parameters,
        4 * parameters,
        8 * parameters,
    )
    shared = replace(case(("full",)), shards=4).estimate()
    assert (shared.weights, shared.optimizer) == (parameters, 2 * parameters)
    assert shared.activations == estimate.activations


def test_prefixes() -> None:
    assert added_parameters(TuneRecipe(methods=("ptuning",), prefix_length=5), FULL) == 2 * 28 * 5 * 4096


def test_what_activations_depend_on() -> None:
    def activations(changed: TrainingCase) -> int:
        return changed.estimate().activations

    plain = case()
    assert activations(case(batch_size=3)) == 3 * activations(plain)
    assert activations(replace(plain, length=256)) > 1.5 * activations(plain)
    assert activations(replace(plain, labels=100)) > activations(plain)
    assert activations(case(activation_checkpointing=True)) < 0.6 * activations(plain)
    upper = case(tune={"layer_range": (27,)})
    assert activations(upper) < 0.6 * activations(plain), "nothing is kept below the lowest layer"
    assert activations(case(("lora", "vit"))) > activations(plain)


def test_without_the_image_encoder() -> None:
    """Where all images are cached."""
    encoder = sum(prod(shape) for name, shape in parameter_shapes(FULL).items() if not name.startswith("text."))
    without = replace(case(), image_encoder=False).estimate().weights
    assert case().estimate().weights - without == 2 * encoder


def test_what_fits_is_let_through() -> None:
    estimate = require_training_memory(case(), 20 * GIB, "cpu")
    assert estimate == case().estimate()


@pytest.mark.parametrize(
    ("changed", "available", "remedy"),
    [
        (replace(case(batch_size=4), length=512), 20, "give --set run.activation_checkpointing=true."),
        (
            replace(case(batch_size=8, accumulation=2, activation_checkpointing=True), length=2000, labels=1000),
            19.9,
            "give --set run.batch_size=1 --set run.accumulation=16.",
        ),
        (replace(case(), dtype="float32"), 20, "give --set run.precision=bfloat16."),
        (case(), 10, "give --set tune.methods=qlora."),
        (case(("lora", "ptuning")), 10, "give --set tune.methods=qlora,ptuning."),
        (case(), 4, "no setting makes it fit: use a machine with more memory, or a smaller model."),
        (case(("full",)), 40, "no setting makes it fit: use a machine with more memory, or a smaller model."),
    ],
)
def test_what_does_not_fit_is_told_what_would(changed: TrainingCase, available: float, remedy: str) -> None:
    with pytest.raises(DeviceError) as caught:
        require_training_memory(changed, int(available * GIB), "cpu")
    message = str(caught.value)
    assert message.startswith(f"Training takes {changed.estimate()}, but cpu has ")
    assert message.endswith(remedy)
