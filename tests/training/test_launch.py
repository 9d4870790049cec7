"""What several processes find wrong is told once, and the one that failed alone is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from visualglm.errors import DeviceError, VisualGLMError
from visualglm.training.launch import launch

# The first process is late to find a fault; the other one is late to end.
SCRIPT = """
import atexit, os, time
from visualglm.errors import DataError
from visualglm.training.launch import faults_told_once
first = os.environ["RANK"] == "0"
atexit.register(time.sleep, 0 if first else 1)
with faults_told_once():
    time.sleep({seconds} if first else 0)
    {fault}
"""


def launch_fault(tmp_path: Path, fault: str, seconds: float = 0) -> int:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(fault=fault, seconds=seconds), "utf-8")
    return launch([str(script)], 2)


@pytest.mark.parametrize("seconds", [0, 1])
def test_what_all_find_is_told_once(tmp_path: Path, seconds: float, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(VisualGLMError) as caught:
        launch_fault(tmp_path, "raise DataError('Line 2 is no JSON; mend it.')", seconds)
    assert str(caught.value) == "Line 2 is no JSON; mend it."
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("fault", "said"), [("DataError('Line 7 is gone.')", "Line 7 is gone;"), ("KeyError('x')", "KeyError: 'x';")]
)
def test_where_it_went_wrong_first_is_named(tmp_path: Path, fault: str, said: str) -> None:
    with pytest.raises(DeviceError, match=f"^Process 1 of 2 failed: {said} the others were stopped"):
        launch_fault(tmp_path, f"raise DataError('Another is gone.') if first else {fault}", 0.5)


def test_a_crash_of_the_first_has_been_told_by_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch_fault(tmp_path, "if first: raise KeyError('x')") == 1
    assert capfd.readouterr().err.endswith("KeyError: 'x'\n")
