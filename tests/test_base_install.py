"""A base install: all but training, exporting and PyTorch itself works without the packages of the extras."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ASK = ("--image", str(ROOT / "examples" / "stop.png"), "图里写着什么？")
CAPTION = ("caption", str(ROOT / "examples" / "questions.jsonl"), "--strict", "--output", "answers.jsonl")
EVALUATE = ("evaluate", str(ROOT / "examples" / "labelled.jsonl"))
ABSENT = ("torch", "onnx", "mindspore", "matplotlib", "yaml", "sacrebleu")

# Makes packages absent, installed or not, and runs the commands that stdin gives until one fails.
WITHOUT = f"""
import json, sys
sys.modules.update(dict.fromkeys({ABSENT}))
from visualglm.cli.program import run
sys.exit(next(filter(None, map(run, json.load(sys.stdin))), 0))
"""


def finished(
    command: list[object], folder: Path, stdin: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    """A command that was run in `folder`, as if nobody had set anything for Python or for visualglm."""
    environment = {name: value for name, value in os.environ.items() if not re.match("PYTHON|VISUALGLM|VIRTUAL", name)}
    environment |= {"VISUALGLM_CACHE": str(folder / "cache"), "PYTHONIOENCODING": "utf-8", **variables}
    return subprocess.run(
        list(map(str, command)), input=stdin, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )


def test_the_commands_of_every_day_run_where_the_extras_are_not(tmp_path: Path):
    commands = [["--help"], ["ask", *ASK], CAPTION, EVALUATE, ["check"], ["info"], ["bench", "--help"]]
    done = finished([sys.executable, "-c", WITHOUT], tmp_path, json.dumps(commands), PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert "\nSTOP\n" in done.stdout and len((tmp_path / "answers.jsonl").read_text("utf-8").splitlines()) == 7


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new virtual environment into which `pip install .` has put what it brings."""
    folder = tmp_path_factory.mktemp("base")
    finished([sys.executable, "-m", "venv", "venv"], folder).check_returncode()
    programs = folder / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
    install = ["-m", "pip", "install", "--quiet", "--no-compile", "--constraint", ROOT / "constraints.txt", ROOT]
    done = finished([programs / "python", *install], folder)
    assert done.returncode == 0, done.stderr
    return programs


@pytest.mark.slow
def test_nothing_of_an_extra_is_installed(environment: Path, tmp_path: Path):
    listed = finished([environment / "python", "-m", "pip", "list", "--format", "json"], tmp_path)
    installed = {package["name"].lower() for package in json.loads(listed.stdout)}
    assert installed >= {"visualglm", "numpy", "onnxruntime", "pillow", "safetensors", "sentencepiece"}
    assert not installed & {"torch", "torchvision", "onnx", "mindspore", "matplotlib", "pyyaml", "mypy", "pytest"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "stdin", "told"),
    [
        (("ask", *ASK), "", "STOP"),
        (("chat", *ASK[:2]), "图里写着什么？\n", "STOP"),
        (CAPTION, "", ""),
        (EVALUATE, "", "exact match"),
        (("check",), "", "✓"),
        (("info",), "", "not installed; `pip install 'visualglm[torch]'`"),
        (("bench", "--repeats", "1", "--threads", "1"), "", "onnx on cpu, fp32\nthreads  "),
        (("bench", "{assets}/tiny-onnx", "--repeats", "1"), "", "onnx on cpu, fp32"),
        (("ask", "--help"), "", "QUESTION"),
    ],
    ids=["ask", "chat", "caption", "evaluate", "check", "info", "bench", "bench an export", "help"],
)
def test_a_base_install(arguments: tuple[str, ...], stdin: str, told: str, environment: Path, tmp_path: Path):
    assets = next(environment.parent.glob("**/visualglm/assets"))
    command = [environment / "visualglm", *(argument.format(assets=assets) for argument in arguments)]
    done = finished(command, tmp_path, stdin, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0 and told in done.stdout, done
    imported = {name.split(".")[0] for name in re.findall(r"^import time: .* \| +(\S+)$", done.stderr, re.MULTILINE)}
    assert "visualglm" in imported and not imported & set(ABSENT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (("ask", "--backend", "torch", *ASK), "torch"),
        (("ask", "--dtype", "int8", *ASK), "export"),
        (("bench", "--preset", "tiny"), "export"),
        (("export", "{assets}/tiny", "out"), "export"),
        (("train-builtin", "recipe.yaml", "out"), "train"),
    ],
)
def test_what_needs_an_extra_says_which(arguments: tuple[str, ...], extra: str, environment: Path, tmp_path: Path):
    assets = next(environment.parent.glob("**/visualglm/assets"))
    done = finished([environment / "visualglm", *(argument.format(assets=assets) for argument in arguments)], tmp_path)
    assert done.returncode == 1 and f"pip install 'visualglm[{extra}]'" in done.stderr, done
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr and not list(tmp_path.iterdir())
