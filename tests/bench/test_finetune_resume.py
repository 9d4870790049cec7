"""Kill -9 at random moments, in a process of its own that forks the runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench/finetune_resume.py"


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_runs_killed_at_random_moments_end_in_the_bits_of_one_that_was_not(kills: int) -> None:
    run = subprocess.run([sys.executable, SCRIPT, "--kills", str(kills)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith(f"killed {kills} times")
    assert run.stdout.endswith("what differs from the run that was never stopped: nothing\n")
