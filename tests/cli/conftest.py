"""The program run in this process, which is quick; `program.py` runs it in one of its own, which is real."""

import io
import sys
from pathlib import Path

import pytest

from tests.cli.program import Invoke, Outcome, draw
from visualglm.cli.program import run


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Runs `visualglm` with the given arguments in this process."""

    def call(*arguments: object, stdin: str = "") -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A PNG file."""
    return draw(tmp_path / "picture.png", 1)
