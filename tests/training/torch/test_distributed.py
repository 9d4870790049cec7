"""Two processes are as one, and when one of them dies the run ends soon and says which."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.training.torch.toy import make_trainer
from visualglm.errors import ConfigError, DeviceError
from visualglm.training.checkpoints import checkpoint_folders, load_checkpoint
from visualglm.training.launch import launch

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def toy(folder: Path, *arguments: str) -> list[str]:
    return ["-m", "tests.training.torch.toy", str(folder), *arguments]


def final(folder: Path, rank: int = 0) -> dict[str, NDArray[Any]]:
    state = load_checkpoint(checkpoint_folders(folder)[-1], rank)
    return dict({**state.tensors, **state.own}["weights"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that was never stopped. Do not write."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert launch(toy(folder, "8"), 2) == 0
    return folder


def test_two_processes_resume_to_the_same_bits(tmp_path: Path, whole: Path) -> None:
    shutil.copytree(whole / "step-00000005", tmp_path / "step-00000005")
    assert launch(toy(tmp_path, "8"), 2) == 0
    expected, resumed = final(whole), final(tmp_path)
    assert all(np.array_equal(expected[name], resumed[name]) for name in expected)


def test_a_run_of_two_processes_is_not_resumed_by_one(whole: Path) -> None:
    with pytest.raises(ConfigError, match="by a run of --nproc 2, and this is one of 1; resume with as many"):
        make_trainer(whole).resume()


def test_shards_are_put_back_where_they_were(tmp_path: Path) -> None:
    assert launch(toy(tmp_path, "8", "shard"), 2) == 0
    whole = [final(tmp_path, rank) for rank in range(2)]
    assert whole[0]["layers.0.weight"].shape == (5, 4)
    assert whole[1]["layers.0.weight"].shape == (4, 4)
    checkpoint_folders(tmp_path)[-1].rename(tmp_path / "gone")
    assert launch(toy(tmp_path, "8", "shard"), 2) == 0
    for rank in range(2):
        again = final(tmp_path, rank)
        assert all(np.array_equal(again[name], whole[rank][name]) for name in again)


@pytest.mark.parametrize(
    ("mishap", "sentence"),
    [
        ("killed", "Process 1 of 2 was killed by signal 9 (Killed); the others were stopped, and --resume goes on"),
        ("fails", "Process 1 of 2 failed: rows.jsonl, line 7 is gone; the others were stopped"),
    ],
)
def test_the_process_that_died_is_named_and_the_others_stop(tmp_path: Path, mishap: str, sentence: str) -> None:
    started = time.monotonic()
    with pytest.raises(DeviceError, match=re.escape(sentence)):
        launch(toy(tmp_path, "1000000", mishap), 2)
    assert time.monotonic() - started < 60


def test_processes_end_when_their_launcher_is_killed(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    script = f"from visualglm.training.launch import launch; launch({toy(tmp_path, '9', 'alone')!r}, 2)"
    launcher = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "MARK": str(mark)})
    while not mark.exists():
        time.sleep(0.05)
    children = _children_of(launcher.pid)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    deadline = time.monotonic() + 10
    while any(_is_alive(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(children) == 2


def _children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"
