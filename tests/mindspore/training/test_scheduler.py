"""The process by which others meet: whichever of the three is killed, all end, and no file of the user's is run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[3]
RUN = """
import os, time
from visualglm.training.mindspore.scheduler import Scheduler
Scheduler({**os.environ, "MS_ROLE": "MS_SCHED"})
time.sleep(120)
"""
MEETING = {"MS_WORKER_NUM": "1", "MS_SCHED_HOST": "127.0.0.1", "MS_SCHED_PORT": "8247"}


@pytest.mark.parametrize(
    ("killed", "code", "told"),
    [("meeting", -signal.SIGKILL, True), ("watcher", 1, True), ("run", -signal.SIGKILL, False)],
)
def test_none_outlives_the_others(killed: str, code: int, told: bool, tmp_path: Path) -> None:
    # As a user's folder may hold it, who tries this package for the first time.
    (tmp_path / "mindspore.py").write_text("open('was_run', 'w').close()\n")
    environment = {**os.environ, **MEETING, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(
        [sys.executable, "-P", "-c", RUN], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    processes = {"run": psutil.Process(run.pid)}
    assert happens(lambda: bool(processes["run"].children()))
    processes["watcher"] = processes["run"].children()[0]
    assert happens(lambda: bool(processes["watcher"].children()))
    processes["meeting"] = processes["watcher"].children()[0]
    assert happens(lambda: is_meeting(processes["meeting"]))
    processes[killed].kill()
    stderr = run.communicate(timeout=60)[1]
    assert happens(lambda: not any(map(lives, processes.values())))
    assert run.returncode == code and not (tmp_path / "was_run").exists()
    assert stderr.count("by which those of the run meet was stopped (signal 9), so the run was too") == int(told)


def happens(event: Callable[[], bool]) -> bool:
    """Whether it does, within a minute."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not event():
        time.sleep(0.05)
    return event()


def is_meeting(process: psutil.Process) -> bool:
    """Whether it listens, as it does from when it waits in MindSpore."""
    return any(link.status == psutil.CONN_LISTEN for link in process.net_connections())


def lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
