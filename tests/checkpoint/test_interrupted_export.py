"""An export that is killed, or for which the disk is too small: nothing of it is ever taken for an export."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.program import finish, spawn
from visualglm.checkpoint.lite_dir import is_lite_directory, open_lite_directory, verify_lite
from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.errors import CheckpointError
from visualglm.export.onnx import ExportOptions, export_onnx

resource = pytest.importorskip("resource", reason="limits are those of Unix")

# Kills itself at the report of that number, of which there are some for writing and some for hashing.
KILLED = """
import os, signal, sys
from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.export.onnx import ExportOptions, export_onnx

left = {at}

def report(done, total):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

export_onnx(open_model_directory({model!r}), {output!r}, ExportOptions("int8", method="rtn"), report=report, force=True)
"""


def reports(model: Path, output: Path) -> int:
    """How often a whole export reports."""
    calls: list[int] = []
    options = ExportOptions("int8", method="rtn")
    export_onnx(open_model_directory(model), output, options, report=lambda done, total: calls.append(done))
    return len(calls)


def kill_at(number: int, model: Path, output: Path) -> None:
    program = KILLED.format(at=number, model=str(model), output=str(output))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_kill_9(share: float, tiny_model_dir: Path, tmp_path: Path, entries: Callable[[Path], list[str]]):
    whole = tmp_path / "whole"
    number = max(1, round(share * reports(tiny_model_dir, whole)))
    kill_at(number, tiny_model_dir, tmp_path / "new")
    partial = tmp_path / ".new.partial"
    assert entries(tmp_path) == [".new.partial", "whole"] and any(partial.iterdir())
    for path in (tmp_path / "new", partial):
        assert not is_lite_directory(path)
        with pytest.raises(CheckpointError):
            open_lite_directory(path)
    before = verify_lite(whole)
    kill_at(number, tiny_model_dir, whole)
    assert verify_lite(whole) == before
    # The next one clears what the killed ones left.
    for name in ("new", "whole"):
        export_onnx(open_model_directory(tiny_model_dir), tmp_path / name, ExportOptions("int4"), force=True)
        assert verify_lite(tmp_path / name).precision == "int4"
    assert entries(tmp_path) == ["new", "whole"]


def test_sigterm_leaves_nothing(builtin_model_dir: Path, tmp_path: Path, entries: Callable[[Path], list[str]]):
    """Also when it comes twice, as `timeout` sends it to a process and to its group."""
    process = spawn("export", builtin_model_dir, tmp_path / "lite", "--method", "gptq", "--quiet")
    deadline = time.monotonic() + 60
    while not (partial := tmp_path / ".lite.partial").is_dir() or not any(partial.iterdir()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
    outcome = finish(process)
    assert (outcome.code, outcome.out, outcome.err) == (143, "", "visualglm: terminated\n")
    assert entries(tmp_path) == []


@pytest.mark.parametrize("limit", [1_000, 30_000, 100_000])
def test_a_full_disk(limit: int, tiny_model_dir: Path, tmp_path: Path, entries: Callable[[Path], list[str]]):
    """In the middle of the weights, or of a graph."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    output = tmp_path / "lite"
    process = spawn("export", tiny_model_dir, output, "--method", "rtn", "--quiet", preexec_fn=limited)
    error = finish(process).error
    assert error == (
        f"visualglm: error: The disk is full: {output} could not be written and nothing of it is left; "
        "make room and try again."
    )
    assert entries(tmp_path) == []
