"""The built-in model's training, end to end with a handful of steps: what comes out can be asked."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import visualglm
from visualglm.errors import ConfigError
from visualglm.scenes.draw import draw_scene
from visualglm.scenes.scene import make_scene
from visualglm.training.checkpoints import checkpoint_folders, load_checkpoint
from visualglm.training.torch.builtin import BuiltinRecipe, read_recipe, train

RECIPE = Path(__file__).parents[3] / "configs" / "builtin.yaml"


def short(recipe: BuiltinRecipe) -> BuiltinRecipe:
    """The same recipe with four steps a stage and small batches."""
    stages = []
    for stage in recipe.stages:
        loop = {"total_steps": 4, "warmup_steps": 2, "checkpoint_every": 2, "log_every": 1, "learning_rate": 1e-3}
        values = stage.model_dump() | {"loop": loop, "batches": stage.batches.model_dump() | {"scenes": 2}}
        stages.append(values)
    return BuiltinRecipe.model_validate(recipe.model_dump() | {"stages": stages})


def run(recipe: BuiltinRecipe, output: Path, report: Callable[[int, int], None] = lambda done, total: None) -> Path:
    path = train(recipe, output, workers=0, device="cpu", report=report, tell=lambda text: None)
    assert path is not None
    return path


def test_trains_a_model_that_can_be_asked_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    recipe = short(read_recipe(RECIPE))
    seen: list[tuple[int, int]] = []
    model = visualglm.load(run(recipe, tmp_path / "whole", lambda *pair: seen.append(pair)))
    assert isinstance(model.ask(draw_scene(make_scene(1)), "图里有什么？", max_new_tokens=4), str)
    steps = 4 * len(recipe.stages)
    assert seen == [(step, steps) for step in range(1, steps + 1)]
    last = recipe.stages[-1].name
    assert (tmp_path / "whole" / f"{last}.png").is_file()

    class StopHereError(Exception):
        pass

    def stop_in_the_third_stage(done: int, total: int) -> None:
        if done == 11:
            raise StopHereError

    with pytest.raises(StopHereError):
        run(recipe, tmp_path / "stopped", stop_in_the_third_stage)
    run(recipe, tmp_path / "stopped")
    whole, resumed = (
        load_checkpoint(checkpoint_folders(tmp_path / name / f"{len(recipe.stages)}-{last}")[-1]).tensors["weights"]
        for name in ("whole", "stopped")
    )
    assert whole.keys() == resumed.keys()
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)


def test_only_the_parts_of_a_stage_learn(tmp_path: Path) -> None:
    run(short(read_recipe(RECIPE)), tmp_path)
    see, speak = (
        load_checkpoint(checkpoint_folders(tmp_path / folder)[-1]).tensors["weights"] for folder in ("2-see", "3-speak")
    )
    changed = {name.split(".")[1] for name in see if not np.array_equal(see[name], speak[name])}
    assert changed == {"text"}


STAGE: dict[str, Any] = {
    "name": "see",
    "learns": ["vision"],
    "batches": {"scenes": 1},
    "loop": {"total_steps": 1, "learning_rate": 1},
}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sed": 1}, "the key sed is unknown."),
        ({"seed": "x"}, "seed is 'x', but must be a whole number."),
        ({"model": {"vision": {"image_size": 113}}}, "image_size 113 is not a multiple of vision.patch_size 14."),
        (
            {"stages": [STAGE | {"learns": ["nose"]}]},
            "stages.0.learns (entry 1) is 'nose', but must be 'vision', 'qformer'",
        ),
        ({"stages": [STAGE | {"loop": 4}]}, "stages.0.loop is 4, but must be a table of names and values."),
        ({"stages": [STAGE | {"loop": {}}]}, "stages.0.loop.total_steps is missing."),
        ({"stages": [STAGE | {"loop": STAGE["loop"] | {"steps": 1}}]}, "the key stages.0.loop.steps is unknown."),
    ],
)
def test_faults_of_a_recipe_are_named(tmp_path: Path, change: dict[str, object], sentence: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(RECIPE.read_text()) | change))
    with pytest.raises(ConfigError, match="recipe.yaml is not valid: .*" + re.escape(sentence)):
        read_recipe(path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"- 1", "does not hold keys and values"),
        (b"a: [", "is no valid YAML (line 1: "),
        (b"\xff\xfe\xff", "is no valid YAML ('utf-8' codec"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="recipe.yaml " + re.escape(sentence)):
        read_recipe(path)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read"):
        read_recipe(tmp_path / "none.yaml")
