"""Streams that are closed or full, and what a terminal would obey."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cli.program import PROGRAM, Invoke
from tests.cli.terminal import Terminal
from visualglm.cli.output import harmless

ASK = ("ask", "What is it?", "--max-new-tokens", "6", "-m")


def shell(redirection: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["sh", "-c", f'"$@" {redirection}', "sh", *PROGRAM, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_closed_streams(invoke: Invoke, tiny_model_dir: Path):
    answer = invoke(*ASK, tiny_model_dir).out
    closed = shell(">&-", *ASK, tiny_model_dir)
    assert (closed.returncode, closed.stderr.count("\n")) == (1, 1) and "There is no stdout" in closed.stderr
    assert shell("<&-", *ASK, tiny_model_dir).stdout == answer
    for redirection in ("2>&-", "<&- 2>&-", "2>/dev/full"):
        silent = shell(redirection, *ASK, tiny_model_dir)
        assert (silent.returncode, silent.stdout) == (0, answer), redirection
        wrong = shell(redirection, *ASK, "nothing")
        assert (wrong.returncode, wrong.stdout) == (1, ""), redirection
    chat = shell("<&-", "chat", "-m", tiny_model_dir)
    assert chat.returncode == 1 and "error: There is no stdin" in chat.stderr


def test_control_characters_from_a_model_do_not_reach_the_terminal(tiny_model_dir: Path, tmp_path: Path):
    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    manifest = json.loads((model / "manifest.json").read_text())
    manifest["source"]["format"] = "a\x1b]0;title\x07b"
    (model / "manifest.json").write_text(json.dumps(manifest))
    with Terminal("info", model) as terminal:
        terminal.expect("a\ufffd]0;title\ufffdb")


def test_a_file_keeps_control_characters(tmp_path: Path):
    with open(tmp_path / "file", "w") as file:
        assert harmless("\x1b\n", file) == "\x1b\n"


@pytest.mark.parametrize("name", ["yaml", "matplotlib", "torch"])
def test_training_without_its_extra(name: str, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def absent(*_: object) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    import visualglm.training.torch.builtin as builtin

    monkeypatch.setattr(builtin, "read_recipe", absent)
    assert "pip install 'visualglm[train]'" in invoke("train-builtin", "recipe.yaml", tmp_path / "out").error
