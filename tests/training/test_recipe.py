from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from visualglm.errors import ConfigError
from visualglm.faults import first_fault
from visualglm.training.recipe import DataRecipe, RunRecipe, TuneRecipe, recipe_keys


def fault_of(part: type[Any], values: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as caught:
        part.model_validate(values)
    return first_fault(caught.value)


@pytest.mark.parametrize(
    ("layer_range", "num_hidden_layers", "layers"),
    [
        (None, 28, (0, 14)),
        (None, 4, (0, 2)),
        (None, 1, (0,)),
        ([14, 0], 28, (0, 14)),
        (3, 28, (0, 1, 2)),
        ("all", 4, (0, 1, 2, 3)),
        ("0,14", 28, (0, 14)),
        ("3,", 28, (3,)),
        ("3", 28, (0, 1, 2)),
    ],
)
def test_layers_with_lora(layer_range: object, num_hidden_layers: int, layers: tuple[int, ...]) -> None:
    assert TuneRecipe.model_validate({"layer_range": layer_range}).layers(num_hidden_layers) == layers


@pytest.mark.parametrize(("layer_range", "named"), [([0, 28], "layer 28"), (29, "the first 29")])
def test_layers_beyond_the_model_are_named(layer_range: object, named: str) -> None:
    with pytest.raises(ConfigError, match=f"names {named}, but the model has 28 layers, 0 to 27"):
        TuneRecipe.model_validate({"layer_range": layer_range}).layers(28)


@pytest.mark.parametrize("wrong", [0, -1, [], [0, -1], [0, "x"], "some", 1.5, True, {}, 10**7, [[0]]])
def test_a_layer_range_of_another_kind_is_told_in_one_sentence(wrong: object) -> None:
    assert "must be a list of layers such as [0, 14]" in fault_of(TuneRecipe, {"layer_range": wrong})


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"lora_rank": 0}, "lora_rank is 0, but must be above 0"),
        ({"lora_dropout": 1}, "lora_dropout is 1, but must be below 1"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf, but must be a finite number"),
        ({"methods": []}, "methods is [], but must be a list of at least 1"),
        ({"methods": "lora,full"}, "tune.methods names full and lora, but full trains everything"),
        ({"methods": ["lora", "qlora"]}, "tune.methods names lora and qlora, which is lora over a base in few bits"),
        ({"methods": ["lora", "lora"]}, "tune.methods names the same twice: lora, lora"),
        ({"layer_range": [3, 3]}, "tune.layer_range names the same twice: 3, 3"),
        ({"target_modules": "qkv,mlp"}, "target_modules (entry 2) is 'mlp', but must be 'qkv', 'proj', 'fc1' or 'fc2'"),
        ({"base_bits": 3}, "base_bits is 3, but must be 4 or 8"),
    ],
)
def test_what_to_tune_is_checked(values: dict[str, Any], sentence: str) -> None:
    assert fault_of(TuneRecipe, values).startswith(sentence)


def test_words_of_the_command_line_are_understood() -> None:
    tune = TuneRecipe.model_validate({"methods": "lora,qformer", "base_bits": "8", "target_modules": "qkv, fc1"})
    assert (tune.methods, tune.base_bits, tune.target_modules) == (("lora", "qformer"), 8, ("qkv", "fc1"))


def test_epochs_and_steps_exclude_each_other() -> None:
    assert "run.epochs and run.steps are both given" in fault_of(RunRecipe, {"epochs": 1, "steps": 10})


def test_rows_to_train_on_do_not_validate() -> None:
    values = {"train": "rows.jsonl", "validation": "./rows.jsonl"}
    assert "data.validation is the file that data.train is" in fault_of(DataRecipe, values)


def test_keys_are_those_of_all_parts() -> None:
    keys = list(recipe_keys())
    assert keys[:2] == ["model", "data.train"]
    assert {"tune.lora_rank", "optimizer.betas", "run.seed"} < set(keys)
    assert len({key.rpartition(".")[2] for key in keys}) == len(keys)


def shown(value: object) -> str:
    """A default as the guide has it."""
    if isinstance(value, tuple):
        return ", ".join(map(shown, value))
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def test_the_guide_has_every_key_with_its_default() -> None:
    guide = (Path(__file__).parents[2] / "docs/finetune.md").read_text("utf-8")
    rows = re.findall(r"^\| `([a-z_.]+)` \| ([^|]*?) ?\| ", guide, re.MULTILINE)
    keys = {key: "" if field.is_required() else shown(field.default) for key, field in recipe_keys().items()}
    assert {key: default for key, default in rows if key in keys} == keys
