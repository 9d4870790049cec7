"""Checkpoints are whole or not there: after a full disk, and after kill -9 at any moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from visualglm.errors import CheckpointError
from visualglm.training.checkpoints import (
    TrainingState,
    checkpoint_folders,
    load_checkpoint,
    read_values,
    save_checkpoint,
)


def test_state_round_trips(tmp_path: Path) -> None:
    state = TrainingState(3, {"model": {"w": np.arange(6.0).reshape(2, 3)}}, {"note": "x"})
    path = save_checkpoint(tmp_path, state)
    loaded = load_checkpoint(path)
    assert (loaded.step, loaded.values) == (3, {"note": "x"})
    assert np.array_equal(loaded.tensors["model"]["w"], state.tensors["model"]["w"])
    assert read_values(path) == {"step": 3, "note": "x"}


def test_each_process_gets_back_its_own(tmp_path: Path) -> None:
    meet = threading.Barrier(3)

    def save(rank: int) -> None:
        state = TrainingState(1, {"all": {"w": np.array(7)}}, {}, {"random": {"cpu": np.array(rank)}})
        save_checkpoint(tmp_path, state, rank=rank, wait=lambda: meet.wait() and None)

    threads = [threading.Thread(target=save, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(3):
        state = load_checkpoint(tmp_path / "step-00000001", rank)
        assert (int(state.tensors["all"]["w"]), int(state.own["random"]["cpu"])) == (7, rank)


def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    script = f"""
import resource, sys
import numpy as np
from pathlib import Path
from visualglm.errors import CheckpointError
from visualglm.training.checkpoints import TrainingState, save_checkpoint
folder = Path({str(tmp_path)!r})
save_checkpoint(folder, TrainingState(1, {{"model": {{"w": np.ones(10)}}}}, {{}}))
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    save_checkpoint(folder, TrainingState(2, {{"model": {{"w": np.ones(100_000)}}}}, {{}}))
except CheckpointError as error:
    sys.exit(str(error))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 1
    assert "step-00000002 could not be written" in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert np.array_equal(load_checkpoint(tmp_path / "step-00000001").tensors["model"]["w"], np.ones(10))


def test_kill_minus_nine_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    script = f"""
import numpy as np
from itertools import count
from pathlib import Path
from visualglm.training.checkpoints import TrainingState, save_checkpoint
for step in count(1):
    state = TrainingState(step, {{"model": {{"w": np.full(200_000, float(step))}}}}, {{}})
    save_checkpoint(Path({str(tmp_path)!r}), state)
    print(step, flush=True)
"""
    for attempt in range(3):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        if process.stdout is None:
            raise AssertionError
        for _ in range(3 + attempt):
            process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        for folder in checkpoint_folders(tmp_path):
            state = load_checkpoint(folder)
            assert np.array_equal(state.tensors["model"]["w"], np.full(200_000, float(state.step)))


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".step-00000009.part").mkdir()
    (tmp_path / ".step-00000001.old").mkdir()
    save_checkpoint(tmp_path, TrainingState(2, {}, {}))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("content", [b"[]", b"{}", b"{", b'{"step": 1, "files": 7}', b"\xff"])
def test_a_state_that_is_none_is_named(tmp_path: Path, content: bytes) -> None:
    path = save_checkpoint(tmp_path, TrainingState(2, {}, {}))
    (path / "state.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step-00000002 is damaged .* remove it to resume from an older one"):
        load_checkpoint(path)


def test_a_file_of_another_checkpoint_or_with_another_bit_is_named(tmp_path: Path) -> None:
    first, second = (
        save_checkpoint(tmp_path, TrainingState(step, {"model": {"w": np.full(100, float(step))}}, {}))
        for step in (1, 2)
    )
    file = second / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes((first / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"step-00000002 is damaged \(model.safetensors is not what"):
        load_checkpoint(second)
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="is not what the run wrote"):
        load_checkpoint(second)
    file.write_bytes(content)
    assert load_checkpoint(second).tensors["model"]["w"][0] == 2.0
