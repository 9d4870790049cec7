from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from visualglm.errors import ConfigError
from visualglm.training.recipe import recipe_keys
from visualglm.training.recipe_file import override, read_recipe, recipe_to_yaml

CONFIGS = Path(__file__).parents[2] / "configs"


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, "utf-8")
    return path


def test_paths_in_a_file_are_relative_to_it(tmp_path: Path) -> None:
    path = write(tmp_path, "model: ../model\ndata: {train: rows.jsonl, validation: /other.jsonl}\n")
    recipe = read_recipe(path)
    assert recipe.model == tmp_path / "../model"
    assert (recipe.data.train, recipe.data.validation) == (tmp_path / "rows.jsonl", Path("/other.jsonl"))


def test_options_are_relative_to_the_current_folder_and_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "data: {train: rows.jsonl}\noptimizer: {learning_rate: 1e-5}\ntune:\n")
    monkeypatch.chdir("/")
    recipe = read_recipe(path, {"data.train": "mine.jsonl", "optimizer.learning_rate": "2e-4", "tune.lora_rank": "4"})
    assert recipe.data.train == Path("/mine.jsonl")
    assert (recipe.optimizer.learning_rate, recipe.tune.lora_rank) == (2e-4, 4)


def test_a_file_is_not_needed() -> None:
    recipe = read_recipe(None, {"data.train": "/rows.jsonl"})
    assert recipe.tune.layers(28) == (0, 14)
    assert (recipe.tune.methods, recipe.tune.lora_rank, recipe.tune.lora_alpha) == (("lora",), 10, 128)


def test_every_key_can_be_set_by_a_word() -> None:
    words = {
        "model": "/model",
        "data.train": "/rows.jsonl",
        "data.validation": "/held.jsonl",
        "data.loss_on": "last",
        "tune.methods": "lora",
        "tune.target_modules": "qkv",
        "tune.layer_range": "0,1",
        "tune.base_bits": "8",
        "optimizer.betas": "0.9,0.99",
        "optimizer.schedule": "linear",
        "run.precision": "float32",
        "run.epochs": "none",
    }
    shares = dict.fromkeys(("data.held_out", "tune.lora_dropout"), "0.5")
    settings = {key: words.get(key, shares.get(key, "1")) for key in recipe_keys()}
    recipe = read_recipe(None, settings)
    assert (recipe.optimizer.betas, recipe.run.epochs, recipe.run.steps) == ((0.9, 0.99), None, 1)


def test_steps_take_the_place_of_epochs(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {train: rows.jsonl}\nrun: {epochs: 3}\n")
    recipe = read_recipe(path, {"run.steps": "20"})
    assert (recipe.run.epochs, recipe.run.steps) == (None, 20)
    with pytest.raises(ConfigError, match=r"run\.epochs and run\.steps are both given"):
        read_recipe(path, {"run.steps": "20", "run.epochs": "3"})


def test_what_is_written_is_read_back_wherever_it_lies(tmp_path: Path) -> None:
    recipe = read_recipe(None, {"data.train": "行.jsonl", "tune.layer_range": "all", "run.epochs": "2.5"})
    assert read_recipe(write(tmp_path, recipe_to_yaml(recipe))) == recipe
    assert set(yaml.safe_load(recipe_to_yaml(recipe))) == {"model", "data", "tune", "optimizer", "run"}


def test_override_checks_again() -> None:
    recipe = read_recipe(None, {"data.train": "/rows.jsonl"})
    assert override(recipe, {"tune.methods": ("qlora", "qformer")}).tune.methods == ("qlora", "qformer")
    with pytest.raises(ConfigError, match=r"tune\.lora_rank is 0, but must be above 0"):
        override(recipe, {"tune.lora_rank": 0})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("data: {train: a}\ntune: {rank: 8}\n", r"the key tune\.rank is unknown; write tune\.lora_rank\."),
        ("data: {train: a}\nlearning_rate: 1\n", r"write optimizer\.learning_rate\."),
        ("data: {train: a}\nzzz: 1\n", r"the key zzz is unknown; docs/finetune\.md lists those there are\."),
        ("data: {train: a}\ntune: {lora_rank: 0}\n", r"recipe\.yaml is not valid: tune\.lora_rank is 0"),
        ("data: {train: a}\ntune: 5\n", r"tune is 5, but must be a table of names and values"),
        ("data: 5\n", r"data is 5, but must be a table"),
        ("data: {train: 5}\n", r"data\.train is 5, but must be a path"),
        ("data: {train: ''}\n", r"data\.train is '', which is no path"),
        ('data: {train: "a\\0b"}\n', r"data\.train is 'a\\x00b', which is no path"),
        ("tune: {lora_rank: 8}\n", "names no rows to train on; give --train FILE"),
        ("", "names no rows to train on"),
        ("- a\n- b\n", "does not hold keys and values"),
        ("just words\n", "does not hold keys and values"),
        ("data: {train: a\n", r"is no valid YAML \(line 2: .*\)"),
        ("run: {steps: 1}\nrun: {steps: 2}\n", r"the key run is there again in line 2"),
        ("data: !!python/object/apply:os.getcwd []\n", "is no valid YAML"),
        ("data: {train: a}\nrun: &run {steps: *run}\n", "is not valid|is no valid YAML"),
        ("data: {train: a}\nrun: {steps: " + "9" * 5000 + "}\n", "is no valid YAML"),
    ],
)
def test_faults_are_told_in_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read_recipe(write(tmp_path, text))


def test_a_file_that_is_none_of_ours_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recipe(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recipe(tmp_path)
    (tmp_path / "large.yaml").write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        read_recipe(tmp_path / "large.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="no valid YAML"):
        read_recipe(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("tune.methods", "lora,x", r"tune\.methods \(entry 2\) is 'x', but must be 'lora', "),
        ("data.held_out", "1", r"data\.held_out is 1, but must be below 1\."),
        ("tune.lora_rank", "-3", r"tune\.lora_rank is -3, but must be above 0\."),
        ("tune.lora_rank", "many", r"tune\.lora_rank is 'many', but must be a whole number\."),
        ("tune.target_modules", "none", r"tune\.target_modules is none, but must be a list\."),
    ],
)
def test_a_setting_is_told_as_it_was_written(key: str, value: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read_recipe(None, {"data.train": "a", key: value})


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(ConfigError, match=r"the key optimizer\.lr is unknown; write optimizer\.learning_rate or"):
        read_recipe(None, {"data.train": "a", "optimizer.lr": "1"})


@pytest.mark.parametrize(
    ("name", "methods"), [("lora", ("lora",)), ("qlora", ("qlora",)), ("ptuning", ("ptuning",)), ("full", ("full",))]
)
def test_the_recipes_that_come_along_are_valid(name: str, methods: tuple[str, ...]) -> None:
    recipe = read_recipe(CONFIGS / f"{name}.yaml", {"data.train": "rows.jsonl"})
    assert recipe.tune.methods == methods
