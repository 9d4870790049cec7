"""`visualglm bench`, on models too small to tell anything of speed."""

import json
from pathlib import Path

import pytest

from tests.cli.program import Invoke
from visualglm.benchmark import PRESETS
from visualglm.checkpoint.model_dir import open_model_directory


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of the system's for temporary files."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def test_a_preset_leaves_nothing_but_its_figures(invoke: Invoke, scratch: Path, tmp_path: Path):
    output = tmp_path / "figures.json"
    outcome = invoke("bench", "--preset", "tiny", "--repeats", 1, "--threads", 1, "--json", output)
    assert outcome.code == 0 and not list(scratch.iterdir())
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [output.name]
    values = json.loads(output.read_text())
    figures = {figure["name"]: figure for figure in values["figures"]}
    assert values["threads"] == 1 and figures["visualglm --help"]["unit"] == "s"
    assert all(name in outcome.out for name in figures)


def test_a_kept_preset_is_measured_again_as_a_model(invoke: Invoke, tmp_path: Path):
    folder = tmp_path / "kept"
    folder.mkdir()
    outcome = invoke("bench", "--preset", "tiny", "--layers", 1, "--folder", folder, "--keep", "--repeats", 1)
    (path,) = folder.glob("*/tiny")
    assert str(path) in outcome.err
    config = open_model_directory(path).config
    assert config.text.num_hidden_layers == 1 and config.vision == PRESETS["tiny"].vision
    assert invoke("bench", path, "--dtype", "bfloat16", "--repeats", 1, "--quiet").err == ""


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
