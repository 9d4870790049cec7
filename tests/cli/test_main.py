"""Exit codes and streams, whatever happens."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.program import Invoke, finish, spawn
from visualglm import __version__
from visualglm.cli import info
from visualglm.cli.table import COMMANDS


def test_help_shows_all_commands_and_imports_none(tmp_path: Path):
    program = (
        "import sys; from visualglm.cli.program import run; run(['--help']);"
        "print(sorted(name for name in sys.modules"
        " if name.split('.')[0] in ('numpy', 'torch', 'pydantic', 'rich', 'PIL')"
        " or name.startswith(('visualglm.cli.', 'visualglm.checkpoint'))))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert all(f"  {name} " in out for name in COMMANDS)
    names = ("main", "output", "program", "table")
    assert out.splitlines()[-1] == str([f"visualglm.cli.{name}" for name in names])


def test_an_answer_imports_nothing_that_it_does_not_need(builtin_model_dir: Path, picture: Path):
    """What tables, bars of progress and images from the Internet take is left to those who want them."""
    program = (
        f"import sys; from visualglm.cli.program import run; run(['ask', '-q', '-i', {str(picture)!r}, 'What?']);"
        "print([name for name in ('rich', 'http.client', 'torch', 'onnx', 'matplotlib') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


def test_version(invoke: Invoke):
    outcome = invoke("--version")
    assert (outcome.code, outcome.out) == (0, f"visualglm {__version__}\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, invoke: Invoke):
    pytest.importorskip(f"visualglm.cli.{name.replace('-', '_')}")
    outcome = invoke(name, "--help")
    assert outcome.code == 0
    assert f"Usage: visualglm {name}" in outcome.out


@pytest.mark.parametrize(
    "arguments",
    [
        ["draw"],
        ["ask"],
        ["ask", "--no-such-option", "what?"],
        ["ask", "--dtype", "int3", "what?"],
        ["ask", "--max-new-tokens", "many", "what?"],
        ["caption", "folder"],
        ["convert", "a", "b", "--to", "onnx"],
    ],
)
def test_wrong_usage(arguments: list[str], invoke: Invoke):
    outcome = invoke(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("Usage: visualglm") and "Error: " in outcome.err


@pytest.mark.parametrize(
    ("arguments", "metavar"),
    [
        (["ask", "What?", "--model", ""], "DIR"),
        (["caption", "", "--output", "out.jsonl"], "INPUT"),
        (["caption", "rows.jsonl", "--output", ""], "FILE"),
        (["convert", "", "out"], "SOURCE"),
        (["convert", "model", ""], "OUT"),
        (["export", "model", ""], "OUT"),
        (["check", ""], "MODEL"),
        (["bench", "--json", ""], "FILE"),
        (["train-builtin", "recipe.yaml", ""], "OUT"),
    ],
)
def test_an_empty_path_is_not_the_current_folder(
    arguments: list[str], metavar: str, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It is what an unset variable of a script gives."""
    monkeypatch.chdir(tmp_path)
    error = invoke(*arguments).error
    assert error == f"visualglm: error: The path {metavar} is empty; give one, or . for the current folder."
    assert not list(tmp_path.iterdir())


def test_the_current_folder_can_be_named(
    invoke: Invoke, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tiny_model_dir)
    assert invoke("ask", "-q", "-m", ".", "What?", "--max-new-tokens", 2).code == 0
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert f"{tmp_path} is not empty" in invoke("convert", tiny_model_dir, ".").error


def test_unknown_command_names_those_there_are(invoke: Invoke):
    assert "'draw'; the commands are ask, chat," in invoke("draw").err


def test_a_fault_in_the_program_is_one_line(invoke: Invoke, monkeypatch: pytest.MonkeyPatch):
    def fail() -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(info, "info", fail)
    outcome = invoke("info")
    assert outcome.code == 70
    assert outcome.err == (
        "visualglm: error: This is a fault in the program (RuntimeError: two lines); "
        "set VISUALGLM_DEBUG=1 to see where, and report it.\n"
    )
    monkeypatch.setenv("VISUALGLM_DEBUG", "1")
    assert "Traceback" in invoke("info").err


def test_nobody_reads_the_output(tiny_model_dir: Path):
    read, write = os.pipe()
    os.close(read)
    process = spawn("check", tiny_model_dir, stdout=write)
    os.close(write)
    outcome = finish(process)
    assert (outcome.code, outcome.err) == (1, "")


def test_output_on_a_full_disk(tiny_model_dir: Path):
    with open("/dev/full", "w") as full:
        outcome = finish(spawn("check", tiny_model_dir, stdout=full))
    assert (
        outcome.error == "visualglm: error: The disk is full, the output could not be written; make room and try again."
    )


@pytest.mark.parametrize(
    ("how", "code", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_ctrl_c_and_sigterm(tiny_model_dir: Path, how: signal.Signals, code: int, said: str):
    process = spawn("chat", "--model", tiny_model_dir, "--backend", "torch")
    assert process.stderr
    assert process.stderr.readline().startswith("loaded ")
    process.send_signal(how)
    outcome = finish(process)
    assert (outcome.code, outcome.out, outcome.err) == (code, "", f"visualglm: {said}\n")


@pytest.mark.parametrize("module", ["visualglm.cli.program", "traceback", "typer", "numpy"])
def test_ctrl_c_while_python_imports(module: str):
    program = f"""
import os, signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
from visualglm.cli.main import main
main()
"""
    command = [sys.executable, "-c", program, "info"]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (outcome.returncode, outcome.stdout, outcome.stderr) == (130, "", "visualglm: interrupted\n")


def run_beside(lines: str, command: str) -> subprocess.CompletedProcess[str]:
    """The program after these lines, in a process of its own."""
    program = f"import os, signal, sys, time\n{lines}\nfrom visualglm.cli.main import main\nmain()"
    return subprocess.run([sys.executable, "-c", program, command], capture_output=True, text=True, timeout=120)


WHILE_TYPER_IS_IMPORTED = """
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            work()
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize(("how", "code", "said"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_a_signal_that_python_drops_comes_again(how: str, code: int, said: str):
    lines = f"""
class Dropping:
    def __del__(self):
        os.kill(os.getpid(), signal.{how})
def work():
    Dropping()
    time.sleep(60)
"""
    outcome = run_beside(lines + WHILE_TYPER_IS_IMPORTED, "info")
    assert (outcome.returncode, outcome.stdout, outcome.stderr) == (code, "", f"visualglm: {said}\n")


def test_a_sigterm_that_a_library_swallows_does_not_make_the_program_deaf():
    lines = """
def work():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except SystemExit:
        os.kill(os.getpid(), signal.SIGTERM)  # the second to come, which is to change nothing
        print("swallowed", file=sys.stderr)
    os.kill(os.getpid(), signal.SIGTERM)
"""
    outcome = run_beside(lines + WHILE_TYPER_IS_IMPORTED, "info")
    assert (outcome.returncode, outcome.stdout) == (143, "")
    assert outcome.stderr == "swallowed\nvisualglm: terminated\n"


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM"])
def test_signals_after_the_work_change_nothing(how: str):
    outcome = run_beside(f"import atexit; atexit.register(os.kill, os.getpid(), signal.{how})", "--version")
    assert (outcome.returncode, outcome.stdout, outcome.stderr) == (0, f"visualglm {__version__}\n", "")


def test_the_first_lines_import_next_to_nothing():
    program = (
        "import sys; before = set(sys.modules); import visualglm.cli.main;"
        "print(*sorted(set(sys.modules) - before - {'__future__', 'errno'}))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out == "visualglm visualglm.cli visualglm.cli.main visualglm.errors\n"


def test_a_terminal_without_chinese(invoke: Invoke, tiny_model_dir: Path):
    command = ["ask", "--model", tiny_model_dir, "--max-new-tokens", "20", "What is it?"]
    full = invoke(*command)
    ascii_only = finish(spawn(*command, env={"PYTHONIOENCODING": "ascii"}))
    assert not full.out.isascii()
    assert ascii_only.code == 0
    assert ascii_only.out == full.out.encode("ascii", "backslashreplace").decode()
