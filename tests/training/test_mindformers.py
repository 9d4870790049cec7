from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from visualglm.errors import ConfigError
from visualglm.mindformers_yaml import is_mindformers
from visualglm.training.mindformers import translate
from visualglm.training.recipe import FinetuneRecipe
from visualglm.training.recipe_file import read_recipe

RECIPE = Path(__file__).with_name("mindformers_lora.yaml")
PET = "model.model_config.text_config.pet_config"


def changed(**values: Any) -> dict[str, Any]:
    """The recipe with some of its keys set: `a__b=1` sets a.b."""
    recipe: dict[str, Any] = yaml.safe_load(RECIPE.read_text("utf-8"))
    for key, value in values.items():
        *parts, name = key.split("__")
        holder = recipe
        for part in parts:
            holder = holder[part]
        holder[name] = value
    return recipe


def leaves(values: Any, prefix: str = "") -> list[str]:
    if isinstance(values, list) and values and isinstance(values[0], dict):
        values = {one["type"]: one for one in values}
    if not isinstance(values, dict):
        return [prefix]
    return [leaf for key, value in values.items() for leaf in leaves(value, f"{prefix}.{key}" if prefix else key)]


def test_the_recipe_is_what_it_was() -> None:
    recipe = read_recipe(RECIPE)
    assert recipe == FinetuneRecipe.model_validate(
        {
            "data": {"train": "/path_to_dataset/dataset.json", "max_length": 320, "workers": 8},
            "tune": {"methods": ["lora"], "lora_rank": 10, "lora_alpha": 128, "layer_range": [0, 14]},
            "optimizer": {"learning_rate": 1e-5, "schedule": "annealing-cosine", "decay_steps": 1500},
            "run": {"steps": 1500, "seed": 0, "checkpoint_every": 1500},
        }
    )


def test_every_key_is_taken_over_or_ignored_for_a_reason() -> None:
    done = translate(changed())
    assert sorted(done.taken | done.ignored) == sorted(leaves(changed()))
    assert not set(done.taken) & set(done.ignored)
    assert not [key for key, reason in done.ignored.items() if "knows no such key" in reason]


def test_what_is_taken_over_and_what_is_not_is_told() -> None:
    told: list[str] = []
    read_recipe(RECIPE, tell=told.append)
    assert told[0] == f"{RECIPE} is a recipe of MindFormers."
    assert f"{PET}.lora_rank (tune.lora_rank)" in told[1]
    assert "lr_schedule.num_iters (optimizer.decay_steps, run.steps)" in told[1]
    assert "Ignored, since the model has no experts: moe_config.{expert_num, capacity_factor, " in "\n".join(told)


def test_options_win() -> None:
    recipe = read_recipe(RECIPE, {"data.train": "/mine.jsonl", "run.epochs": "3"})
    assert (recipe.data.train, recipe.run.epochs, recipe.run.steps) == (Path("/mine.jsonl"), 3, None)


def test_an_epoch_has_as_many_steps_as_num_iters() -> None:
    assert translate(changed(runner_config__epochs=2)).values["run"]["steps"] == 3000


def test_another_schedule_counts_its_epochs() -> None:
    schedule = {"type": "CosineWithWarmUpLR", "learning_rate": 1e-4, "warmup_steps": 10}
    values = translate(changed(lr_schedule=schedule, runner_config__epochs=3)).values
    assert values["run"]["epochs"] == 3
    assert values["optimizer"]["schedule"] == "cosine"


def test_annealing_has_its_style_and_ratio() -> None:
    values = translate(changed(lr_schedule__decay_style="linear", lr_schedule__decay_ratio=0.2)).values["optimizer"]
    assert (values["schedule"], values["decay_ratio"]) == ("annealing-linear", 5)


def test_layers_of_the_mlp_get_lora_unless_they_are_excluded() -> None:
    done = translate(changed(model__model_config__text_config__pet_config__exclude_layers=["mixins"]))
    assert done.values["tune"]["target_modules"] == ["qkv", "proj", "fc1", "fc2"]


@pytest.mark.parametrize("excluded", [[".*mlp.*"], ["mixins", "m.p"], "mlp", ["layers.3.mlp"]])
def test_what_is_excluded_may_be_a_pattern(excluded: object) -> None:
    done = translate(changed(model__model_config__text_config__pet_config__exclude_layers=excluded))
    assert done.values["tune"]["target_modules"] == ["qkv", "proj"]
    assert not [key for key in done.ignored if "exclude_layers" in key]


def test_what_is_excluded_and_not_understood_is_named() -> None:
    done = translate(changed(model__model_config__text_config__pet_config__exclude_layers=["mlp", "[", "attention"]))
    assert done.values["tune"]["target_modules"] == ["qkv", "proj"]
    [note] = [note for note in done.notes() if "'attention'" in note]
    assert note.startswith("Ignored, since `mlp` alone is understood there; tune.target_modules") and "'['" in note


def test_ptuning_has_a_length() -> None:
    done = translate(changed(model__model_config__text_config__pet_config__pet_type="ptuning2"))
    assert (done.values["tune"]["methods"], done.values["tune"]["prefix_length"]) == (["ptuning"], 4)


def test_a_precision_of_every_device_is_taken_over() -> None:
    done = translate(changed(model__model_config__text_config__compute_dtype="bfloat16"))
    assert done.values["run"]["precision"] == "bfloat16"


def test_a_key_that_nobody_knows_is_named() -> None:
    done = translate(changed(runner_config__surprise=1, moonshine={"a": 1}))
    assert done.ignored["runner_config.surprise"] == done.ignored["moonshine.a"] == "this program knows no such key"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"lr_schedule__type": "PolynomialWithWarmUpLR"}, "lr_schedule.type is 'PolynomialWithWarmUpLR', which is not"),
        ({"lr_schedule__decay_style": "stairs"}, "lr_schedule.decay_style is 'stairs', which is not known"),
        ({"model__model_config__text_config__pet_config__pet_type": "prompt"}, "pet_type is 'prompt', which is not"),
    ],
)
def test_what_has_no_like_here_is_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        translate(changed(**values))


def test_values_are_checked_as_ours_are(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(changed(lr_schedule__num_iters="many")), "utf-8")
    with pytest.raises(ConfigError, match=r"optimizer\.decay_steps is 'many', but must be a whole number"):
        read_recipe(path)


def test_aliases_that_grow_without_end_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("run_mode: &a {b: *a}\n", "utf-8")
    with pytest.raises(ConfigError, match="nests keys more than 20 deep"):
        read_recipe(path)
    rows = ["l0: &l0 {a: 1, b: 2, c: 3, d: 4, e: 5, f: 6, g: 7, h: 8, i: 9}"]
    rows += [f"l{n}: &l{n} {{{', '.join(f'{c}: *l{n - 1}' for c in 'abcdefghi')}}}" for n in range(1, 12)]
    path.write_text("\n".join(["run_mode: finetune", *rows]), "utf-8")
    with pytest.raises(ConfigError, match="more than 10,000 keys"):
        read_recipe(path)


def test_our_own_recipes_are_not_taken_for_theirs() -> None:
    assert is_mindformers(changed())
    assert not is_mindformers({"model": "models/visualglm-6b", "data": {"train": "rows.jsonl"}, "optimizer": {}})
