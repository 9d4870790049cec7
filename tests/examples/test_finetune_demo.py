"""`make finetune-demo`, with fewer questions: twenty pictures teach a new question, and old answers stay."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "finetune_demo.py"


def _demonstrate(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DEMO), *map(str, options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=500, env=environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a demonstration that ended with 0, which it does if its figures are reached."""
    path = tmp_path_factory.mktemp("demo") / "demo"
    done = _demonstrate("--output", path, "--unseen", 24, "--scenes", 8)
    assert done.returncode == 0, done.stdout + done.stderr
    return path


def test_the_new_question_is_answered_and_old_ones_still_are(folder: Path) -> None:
    def right(name: str) -> int:
        return sum(json.loads(line)["exact_match"] for line in (folder / name).read_text("utf-8").splitlines())

    assert right("unseen.before.jsonl") == 0 and right("unseen.after.jsonl") >= 22
    assert right("old.after.jsonl") >= right("old.before.jsonl") - 1 >= 50


def test_no_picture_is_both_learnt_and_asked_about(folder: Path) -> None:
    learnt = {path.read_bytes() for path in (folder / "train").iterdir()}
    asked = {path.read_bytes() for path in (folder / "unseen").iterdir()}
    assert (len(learnt), len(asked), len(learnt & asked)) == (20, 24, 0)


def test_there_are_pictures_to_look_at(folder: Path) -> None:
    assert (folder / "demo.png").stat().st_size > 50_000
    assert (folder / "run/curve.png").is_file() and "GRASS" in (folder / "unseen.html").read_text("utf-8")


def test_a_folder_that_is_there_is_left_alone(folder: Path) -> None:
    done = _demonstrate("--output", folder)
    assert done.returncode == 1 and "is there already; remove it, or name another folder" in done.stderr
    assert (folder / "demo.png").is_file()


@pytest.mark.parametrize("option", [("--seed", -1), ("--unseen", 0), ("--scenes", 0)])
def test_a_number_that_cannot_be_is_told_before_anything_is_drawn(tmp_path: Path, option: tuple[str, int]) -> None:
    done = _demonstrate("--output", tmp_path / "demo", *option)
    assert done.returncode == 2 and "--unseen and --scenes at least 1" in done.stderr
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    ("new", "old", "said"),
    [
        ((9, 90), (99, 97), []),
        ((10, 90), (99, 97), ["The new question was answered before, 10.0% of the time."]),
        ((0, 89), (99, 97), ["The new question is answered 89.0% of the time, and not 90%."]),
        ((0, 90), (99, 96), ["Old questions lost 3.0 points, and not at most 2."]),
    ],
)
def test_each_figure_that_is_missed_is_told(new: tuple[int, int], old: tuple[int, int], said: list[str]) -> None:
    """Of a hundred rows, before and after."""
    demo = runpy.run_path(str(DEMO))

    def asked(rights: tuple[int, int]) -> object:
        return demo["Asked"](*([{"exact_match": row < right} for row in range(100)] for right in rights))

    assert demo["faults"](asked(new), asked(old)) == said
