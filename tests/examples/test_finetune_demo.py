"""`make finetune-demo`, with fewer questions: twenty pictures teach a new question, and old answers stay."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "examples" / "finetune_demo.py"


def _demonstrate(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DEMO), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)


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
