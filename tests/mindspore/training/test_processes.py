"""Runs of several processes: they learn what one learns, and one that dies takes the others with it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.mindspore.training.test_finetune import furthest, losses
from tests.training.test_finetune import Make, recipe, rows  # noqa: F401
from visualglm.errors import DeviceError
from visualglm.training.finetune import finetune
from visualglm.training.launch import launch
from visualglm.training.recipe import FinetuneRecipe
from visualglm.training.recipe_file import recipe_to_yaml

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.usefixtures("all_cores")


def command(recipe: FinetuneRecipe, output: Path) -> list[str]:  # noqa: F811
    path = output.with_suffix(".yaml")
    path.write_text(recipe_to_yaml(recipe))
    return ["finetune", str(path), "--output", str(output), "--backend", "mindspore", "--device", "cpu"]


@pytest.fixture(scope="module")
def by_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("one") / "run"


@pytest.mark.parametrize("launched", ["nproc", "msrun"])
def test_two_processes_and_batches_of_one_are_as_one_process(
    tmp_path: Path,
    by_one: Path,
    recipe: Make,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    launched: str,
) -> None:
    monkeypatch.chdir(ROOT)
    if not by_one.exists():
        single = recipe(run__batch_size=1, run__accumulation=4, run__steps=8)
        finetune(single, by_one, backend="mindspore", device="cpu")
    arguments = command(recipe(run__batch_size=2, run__steps=8), tmp_path / "two")
    if launched == "nproc":
        assert launch(["-m", "visualglm.cli", *arguments], 2) == 0
    else:
        run_by_msrun([*arguments, "--graph-mode", "1"], tmp_path)
    assert len(losses(tmp_path / "two")) == 8
    assert losses(tmp_path / "two") == pytest.approx(losses(by_one), abs=1e-6)
    assert furthest(tmp_path / "two", by_one) < 1e-5


def run_by_msrun(arguments: list[str], folder: Path) -> None:
    script = folder / "main.py"
    script.write_text("from visualglm.cli.main import main\nmain()\n")
    programs = Path(sys.executable).parent
    ours = ["--worker_num=2", "--local_worker_num=2", "--master_port=8231", f"--log_dir={folder}", "--join=True"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{programs}:{os.environ['PATH']}"}
    subprocess.run([programs / "msrun", *ours, script, *arguments], check=True, env=environment)


def test_the_process_that_died_is_named_and_the_others_stop(
    tmp_path: Path,
    recipe: Make,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    output = tmp_path / "out"
    script = tmp_path / "deadly.py"
    script.write_text(
        "import os, signal, threading, time\n"
        "from pathlib import Path\n"
        "from visualglm.cli.main import main\n"
        "def die():\n"
        f"    while not Path({str(output / 'log.jsonl')!r}).exists():\n"
        "        time.sleep(0.05)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "if os.environ['RANK'] == '1':\n"
        "    threading.Thread(target=die, daemon=True).start()\n"
        "main()\n"
    )
    asked = recipe(run__batch_size=2, run__steps=100_000, run__validate_every=100_000)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TEST_MARK", str(tmp_path))
    with pytest.raises(DeviceError, match=r"Process 1 of 2 was killed by signal 9 \(Killed\); the others were stopped"):
        launch([str(script), *command(asked, output), "--graph-mode", "1"], 2)
    ended = time.time() - (output / "log.jsonl").stat().st_mtime
    assert ended < 60
    assert not _left_over(tmp_path)


def _left_over(mark: Path) -> list[str]:
    """Processes that a run with this mark in its environment has left, two seconds after it."""
    time.sleep(2)
    found = []
    for process in psutil.process_iter(["cmdline"]):
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get("TEST_MARK") == str(mark):
                found.append(" ".join(process.cmdline()))
    return found
