"""The recipe on the built-in model: the losses of MindSpore are those of torch, step by step."""

import json
from pathlib import Path

import pytest

from tests.training.test_finetune import FAST, log
from visualglm.scenes.held_out import picture_of, questions_about
from visualglm.training.finetune import finetune
from visualglm.training.recipe_file import read_recipe

RECIPE = Path(__file__).parents[3] / "configs/lora.yaml"
SCENES, STEPS = 6, 20


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is asked about each picture, with the answers about the next one, which the model would not give."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = []
    for scene in range(SCENES):
        picture_of(scene).save(path.with_name(f"{scene}.png"))
        lines += [
            {"img": f"{scene}.png", "prompt": asked.question, "label": other.answer}
            for asked, other in zip(questions_about(scene), questions_about(scene + 1), strict=False)
        ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def losses(rows: Path, output: Path, **how: object) -> list[float]:
    recipe = read_recipe(RECIPE, {"data.train": rows, "run.steps": STEPS, "run.log_every": 1, **FAST})
    finetune(recipe, output, device="cpu", **how)  # type: ignore[arg-type]
    return [row["losses"]["loss"] for row in log(output)]


@pytest.fixture(scope="module")
def by_torch(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(rows, tmp_path_factory.mktemp("torch") / "run")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "graph"])
def test_twenty_steps_of_the_recipe_are_those_of_torch(
    rows: Path, tmp_path: Path, by_torch: list[float], compiled: bool
) -> None:
    found = losses(rows, tmp_path / "run", backend="mindspore", compiled=compiled)
    assert len(found) == STEPS and sum(by_torch[:5]) - sum(by_torch[-5:]) > 5
    assert found == pytest.approx(by_torch, abs=1e-5)
