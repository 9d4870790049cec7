from __future__ import annotations

import os
import signal
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from tests.cli.program import Invoke, finish, spawn
from visualglm.cli import finetune
from visualglm.cli.messages import Messages

CONFIGS = Path(__file__).parents[2] / "configs"
MINDFORMERS = Path(__file__).parents[1] / "training/mindformers_lora.yaml"


def test_options_are_keys_of_the_recipe(invoke: Invoke, tmp_path: Path) -> None:
    outcome = invoke(
        "finetune", CONFIGS / "lora.yaml", "--output", tmp_path / "out", "--train", "/rows.jsonl", "--model", "/model",
        "--validation", "/held.jsonl", "--method", "lora,qformer", "--lr", "2e-5", "--epochs", "1.5", "--rank", "4",
        "--alpha", "8", "--layers", "0,3", "--batch-size", "2", "--accumulation", "3", "--precision", "float32",
        "--seed", "7", "--set", "optimizer.betas=0.9,0.99", "--set", "run.log_every=1", "--print-recipe",
    )  # fmt: skip
    assert outcome.code == 0
    recipe = yaml.safe_load(outcome.out)
    assert recipe["model"] == "/model"
    assert (recipe["data"]["train"], recipe["data"]["validation"]) == ("/rows.jsonl", "/held.jsonl")
    assert recipe["tune"]["methods"] == ["lora", "qformer"]
    assert (recipe["tune"]["lora_rank"], recipe["tune"]["lora_alpha"], recipe["tune"]["layer_range"]) == (4, 8, [0, 3])
    assert (recipe["optimizer"]["learning_rate"], recipe["optimizer"]["betas"]) == (2e-5, [0.9, 0.99])
    run = recipe["run"]
    assert (run["epochs"], run["steps"], run["batch_size"], run["accumulation"]) == (1.5, None, 2, 3)
    assert (run["precision"], run["seed"], run["log_every"]) == ("float32", 7, 1)
    assert not (tmp_path / "out").exists()


def test_a_recipe_of_mindformers_is_explained_on_stderr(invoke: Invoke, tmp_path: Path) -> None:
    outcome = invoke("finetune", MINDFORMERS, "--output", tmp_path / "out", "--print-recipe")
    assert yaml.safe_load(outcome.out)["run"]["steps"] == 1500
    assert "Taken over: seed (run.seed)" in outcome.err
    assert "Ignored, since the folder is given as --output: output_dir." in outcome.err
    assert not invoke("finetune", MINDFORMERS, "--output", tmp_path / "out", "--print-recipe", "--quiet").err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "names no rows to train on; give --train FILE"),
        (["--train", "a", "--rank", "0"], "tune.lora_rank is 0, but must be above 0"),
        (["--train", "a", "--method", "full,lora"], "tune.methods names full and lora"),
        (["--train", "a", "--steps", "3", "--epochs", "3"], "run.epochs and run.steps are both given"),
        (["--train", "a", "--set", "tune.rank=3"], "the key tune.rank is unknown; write tune.lora_rank."),
        (["--train", "a", "--set", "tune.lora_rank"], "write it as --set KEY=VALUE"),
        (["--resume"], "holds no run to go on with; leave out --resume"),
        (["missing.yaml"], "The recipe missing.yaml cannot be read"),
    ],
)
def test_bad_options_are_told_before_anything_is_done(
    invoke: Invoke, tmp_path: Path, options: list[str], sentence: str
) -> None:
    assert sentence in invoke("finetune", *options, "--output", tmp_path / "out").error
    assert not (tmp_path / "out").exists()


def test_a_run_that_goes_on_has_its_own_recipe(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("data: {train: rows.jsonl}\nrun: {steps: 7}\n", "utf-8")
    outcome = invoke("finetune", "--output", tmp_path, "--resume", "--print-recipe")
    assert yaml.safe_load(outcome.out)["run"]["steps"] == 7


def test_processes_that_torchrun_started_start_no_others(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    outcome = invoke("finetune", "--train", "a", "--output", tmp_path / "out", "--nproc", "2")
    assert "was started by torchrun, msrun or the like" in outcome.error


@pytest.mark.skipif(find_spec("mindspore") is not None, reason="MindSpore is here")
def test_without_mindspore_its_backend_is_refused_in_a_sentence(invoke: Invoke, tmp_path: Path) -> None:
    outcome = invoke("finetune", "--train", LABELLED, "--backend", "mindspore", "--output", tmp_path / "out")
    assert "The mindspore backend needs MindSpore 2.10, which is not installed" in outcome.error
    assert not (tmp_path / "out").exists()


LABELLED = Path(__file__).parents[2] / "examples/labelled.jsonl"
# Few enough steps for a test, and quick ones.
SHORT = ("--train", LABELLED, "--set", "data.workers=0", "--batch-size", "1", "--set", "optimizer.schedule=constant")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISUALGLM_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("cache")
def test_a_run_leaves_an_adapter_and_goes_on_where_it_was(invoke: Invoke, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert invoke("finetune", *SHORT, "--output", output, "--steps", "2").code == 0
    assert {path.name for path in output.iterdir()} >= {"adapter", "best", "checkpoints", "recipe.yaml", "log.jsonl"}
    assert (output / "backend.txt").read_text("utf-8") == "torch\n"
    adapter = (output / "adapter/adapter_model.safetensors").read_bytes()
    assert "holds a run already; --resume goes on with it" in invoke("finetune", *SHORT, "--output", output).error
    assert invoke("finetune", "--output", output, "--resume").code == 0
    assert (output / "adapter/adapter_model.safetensors").read_bytes() == adapter
    other = invoke("finetune", "--output", output, "--resume", "--rank", "3").error
    assert "was written by another recipe (tune.lora_rank was 10 and is 3)" in other


@pytest.mark.usefixtures("cache")
def test_several_processes_make_one_adapter(tmp_path: Path) -> None:
    outcome = finish(spawn("finetune", *SHORT, "--output", tmp_path / "out", "--steps", "1", "--nproc", "2"))
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("The adapter is in") == 1
    assert (tmp_path / "out/adapter/adapter_config.json").is_file()


@pytest.mark.usefixtures("cache")
def test_sigterm_for_all_processes_of_a_run_is_told_in_a_line(tmp_path: Path) -> None:
    """As `timeout` and batch systems send it: to the workers that read rows too."""
    output = tmp_path / "out"
    options = ("--train", LABELLED, "--set", "run.checkpoint_every=10", "--set", "run.validate_every=100000")
    process = spawn("finetune", *options, "--output", output, "--steps", "4000", start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(output.glob("checkpoints/step-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGTERM)
    outcome = finish(process)
    assert outcome.code == 143 and outcome.err.splitlines()[-1] == "visualglm: terminated"
    assert "Traceback" not in outcome.err


@pytest.mark.usefixtures("cache")
def test_layers_beyond_the_model_are_told_before_it_is_loaded(invoke: Invoke, tmp_path: Path) -> None:
    error = invoke("finetune", *SHORT, "--output", tmp_path / "out", "--layers", "0,14").error
    assert "tune.layer_range names layer 14, but the model has 4 layers, 0 to 3" in error
    assert not (tmp_path / "out/recipe.yaml").exists()


def test_bad_rows_are_told_by_line_by_one_of_several_processes(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "label": ""}\n{"prompt": \n', "utf-8")
    outcome = finish(spawn("finetune", "--train", rows, "--output", tmp_path / "out", "--nproc", "2"))
    assert "line 1: the label is" in outcome.error
    assert "line 2: this is no JSON" in outcome.error
    assert "Process" not in outcome.err


def test_a_missing_package_is_named_with_what_adds_it(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    monkeypatch.delitem(sys.modules, "visualglm.yaml_file", raising=False)
    error = invoke("finetune", CONFIGS / "lora.yaml", "--output", tmp_path / "out").error
    assert "Training with PyTorch needs pyyaml; `pip install 'visualglm[train]'` adds what is missing." in error


def test_all_that_training_on_mindspore_lacks_is_named_at_once(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "mindspore", "yaml"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "visualglm.yaml_file", raising=False)
    error = invoke("finetune", CONFIGS / "lora.yaml", "--output", tmp_path / "out", "--backend", "mindspore").error
    assert (
        "Training with MindSpore needs matplotlib, mindspore, pyyaml; "
        "`pip install 'visualglm[mindspore]'` adds what is missing."
    ) in error


@pytest.mark.parametrize(
    ("before", "installed", "taken"),
    [
        ("mindspore", ("mindspore", "torch"), "mindspore"),
        ("mindspore", ("torch",), "torch"),
        ("torch", ("mindspore",), "mindspore"),
        ("torch", ("mindspore", "torch"), "torch"),
        (None, ("mindspore", "torch"), "torch"),
        (None, ("mindspore",), "mindspore"),
        (None, (), "torch"),
        ("another", ("torch",), "torch"),
    ],
)
def test_a_run_goes_on_with_the_library_that_computed_before(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    before: str | None,
    installed: tuple[str, ...],
    taken: str,
) -> None:
    if before:
        (tmp_path / "backend.txt").write_text(f"{before}\n", "utf-8")
    monkeypatch.setattr(finetune, "find_spec", lambda name: name in installed)
    assert finetune._default_backend(tmp_path, resume=True, messages=Messages()) == taken
    is_told = "mindspore" in (before, taken)
    assert capsys.readouterr().err == (f"--backend is not given, and is {taken}.\n" if is_told else "")
