"""`visualglm bench`, on models too small to tell anything of speed."""

import json
from pathlib import Path

import pytest

from tests.cli.program import Invoke
from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.random_model import PRESETS


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of exports that is not there yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("VISUALGLM_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of the system's for temporary files."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.mark.parametrize(
    ("options", "backend"),
    [
        ((), "onnx on cpu, fp32"),
        (("--backend", "onnx", "--dtype", "int4"), "onnx on cpu, int4"),
        (("--backend", "torch", "--dtype", "bfloat16"), "torch on cpu, bfloat16"),
    ],
)
def test_a_preset_leaves_nothing_but_its_figures(
    options: tuple[str, ...], backend: str, invoke: Invoke, scratch: Path, cache: Path, tmp_path: Path
):
    output = tmp_path / "figures.json"
    arguments = ("--preset", "tiny", "--repeats", 1, "--threads", 1, "--device", "cpu", "--json", output)
    outcome = invoke("bench", *arguments, *options)
    assert outcome.code == 0 and not list(scratch.iterdir()) and not cache.exists()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [output.name]
    values = json.loads(output.read_text())
    figures = {figure["name"]: figure for figure in values["figures"]}
    assert (values["threads"], values["backend"]) == (1, backend)
    asking = " ".join(("visualglm ask", *(options[:2] if "--backend" in options else ())))
    assert figures["visualglm --help"]["unit"] == figures[f"{asking}, built-in model, first token"]["unit"] == "s"
    assert backend in outcome.out and all(name in outcome.out for name in figures)


def test_a_kept_preset_is_measured_again_as_a_model(invoke: Invoke, tmp_path: Path):
    folder = tmp_path / "kept"
    folder.mkdir()
    preset = ("--preset", "tiny", "--layers", 1, "--dtype", "int8", "--folder", folder, "--keep")
    outcome = invoke("bench", *preset, "--repeats", 1)
    (scratch,) = folder.iterdir()
    model, export = scratch / "tiny", scratch / "tiny-int8"
    assert f"kept: {model}, {export}\n" in outcome.err
    config = open_model_directory(model).config
    assert config.text.num_hidden_layers == 1 and config.vision == PRESETS["tiny"].vision
    again = invoke("bench", model, "--backend", "torch", "--repeats", 1, "--quiet")
    assert again.err == "" and f"{model}, " in again.out
    assert "onnx on cpu, int8" in invoke("bench", export, "--repeats", 1, "--quiet").out


def test_a_model_is_exported_into_the_cache(invoke: Invoke, tiny_model_dir: Path, cache: Path):
    outcome = invoke("bench", tiny_model_dir, "--device", "cpu", "--dtype", "int8", "--repeats", 1)
    assert outcome.code == 0 and "onnx on cpu, int8" in outcome.out
    (export,) = (entry for entry in cache.iterdir() if entry.is_dir())
    assert f"{tiny_model_dir} has no such export for ONNX Runtime yet; it is made once, as {export}" in outcome.err


def test_without_a_model_the_built_in_one_is_measured(invoke: Invoke, builtin_model_dir: Path):
    out = invoke("bench", "--device", "cpu", "--repeats", 1, "--quiet").out
    told = dict(line.split("  ", 1) for line in out.splitlines())
    assert "visualglm-tiny, " in told["model"] and told["threads"].strip() == "1"


def test_what_is_missing_is_told_before_anything_is_written(
    invoke: Invoke, scratch: Path, monkeypatch: pytest.MonkeyPatch
):
    refused = invoke("bench", "--preset", "tiny", "--backend", "torch", "--dtype", "int4")
    assert "The torch backend has no int4" in refused.error
    monkeypatch.setattr("visualglm.export_cache.find_spec", lambda name: None)
    assert "pip install 'visualglm[export]'" in invoke("bench", "--preset", "tiny", "--backend", "onnx").error
    assert not list(scratch.iterdir())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("model", "--preset", "tiny"), "leave one of them out"),
        (("--keep",), "give --preset"),
        (("--preset", "tiny", "--json", "nowhere/figures.json"), "nowhere does not exist"),
        (("--preset", "tiny", "--folder", "nowhere"), "nowhere does not exist"),
        (("nowhere",), "nowhere does not exist"),
    ],
)
def test_what_cannot_be_is_told_in_one_sentence(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], told: str
):
    monkeypatch.chdir(tmp_path)
    assert told in invoke("bench", *arguments).error
