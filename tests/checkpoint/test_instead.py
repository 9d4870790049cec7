"""What is said of folders and files that are given in place of a model."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.adapters import write_random_adapter
from visualglm.checkpoint.convert import convert
from visualglm.checkpoint.lite_dir import open_lite_directory
from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.errors import CheckpointError
from visualglm.loading import builtin_export, builtin_path, choose

GGUF = b"GGUF\x03\0\0\0"
NEEDED = ", and a model directory is needed; "


def refused(path: Path) -> str:
    """What `--model` says of `path`, which is said of it alike by all that open models."""
    with pytest.raises(CheckpointError) as caught:
        choose(path, backend="auto", device="auto", dtype="auto")
    sentence = str(caught.value)
    with pytest.raises(CheckpointError) as caught:
        open_model_directory(path)
    assert str(caught.value) == sentence and "\n" not in sentence
    return sentence


@pytest.mark.parametrize("format", ["sat", "hf", "mindformers"])
def test_checkpoints_to_be_converted(format: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "with a space"
    convert(tiny_model_dir, source, to=format)  # type: ignore[arg-type]
    said = {
        "sat": "is a SAT archive",
        "hf": "is a Hugging Face checkpoint",
        "mindformers": "holds the files of MindFormers",
    }[format]
    assert refused(source) == f"{source} {said}{NEEDED}make one with `visualglm convert '{source}' OUT`."
    assert refused(tmp_path) == (f"{tmp_path} holds a folder with a checkpoint, with a space{NEEDED}give {source}.")
    config = next(source.glob("*config.json"))
    assert refused(config) == f"{config} is a file; give the folder that it lies in, {source}."
    if format == "sat":
        inside = source / "1"
        assert refused(inside) == f"{inside} is a folder inside a SAT archive{NEEDED}give the archive, {source}."


@pytest.mark.parametrize(
    ("name", "content", "said", "remedy"),
    [
        ("visualglm_6b.ckpt", b"x", "a checkpoint of MindSpore", "give the folder with visualglm_vit.ckpt"),
        ("decoder.onnx", b"x", "an ONNX graph without the manifest of an export", "export the model with `visualglm"),
        ("full.mindir", b"x", "a MindIR graph without the manifest of an export", "give the folder that `visualglm"),
        ("q4_0.gguf", GGUF, "a model for llama.cpp or chatglm.cpp, which cannot", "convert the SAT archive"),
        ("chatglm.bin", b"ggml", "a model for llama.cpp or chatglm.cpp, which cannot", "convert the SAT archive"),
        ("visualglm-6b.zip", b"PK", "a packed archive", "unpack it, and give the folder that comes out."),
        ("300.TAR.GZ", b"", "a packed archive", "unpack it, and give the folder that comes out."),
        ("weights.pt", b"PK", "a file of weights", "give the folder in which it lies beside its configuration."),
        ("model.safetensors", b"", "a file of weights", "give the folder in which it lies beside its configuration."),
    ],
)  # fmt: skip
def test_files_of_other_programs(name: str, content: bytes, said: str, remedy: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).write_bytes(content)
    assert refused(folder / name).startswith(f"{folder / name} is {said}")
    assert refused(folder).startswith(f"{folder} holds {said}") and NEEDED in refused(folder)
    for path in (folder, folder / name):
        assert f"; {remedy}" in refused(path)
    with pytest.raises(CheckpointError, match=", and a checkpoint is needed; "):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty") == f"{tmp_path / 'empty'} is empty{NEEDED}give another folder."
    (tmp_path / "notes.txt").write_text("x")
    unknown = "has no manifest.json, so it is no model directory; make one with `visualglm convert`."
    assert refused(tmp_path) == f"{tmp_path} {unknown}"
    file = tmp_path / "notes.txt"
    assert refused(file) == f"{file} is a file; give the folder that holds the checkpoint."
    missing = tmp_path / "nothing"
    assert refused(missing) == f"{missing} does not exist; give the folder that holds the checkpoint."


def test_models_and_adapters_of_others(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 4096}')
    assert refused(tmp_path) == (
        f"{tmp_path} is a Hugging Face folder of another model (llama){NEEDED}"
        "give one of VisualGLM-6B to `visualglm convert`."
    )
    (tmp_path / "config.json").write_text("{damaged")
    assert "has no manifest.json" in refused(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    use = "give it as --adapter, beside the model that it belongs to."
    assert refused(tmp_path) == f"{tmp_path} is an adapter{NEEDED}{use}"


def test_adapters_and_folders_of_runs(tiny_model_dir: Path, tmp_path: Path) -> None:
    adapter = write_random_adapter(tmp_path / "adapter", tiny_model_dir).path
    use = "give it as --adapter, beside the model that it belongs to."
    assert refused(adapter) == f"{adapter} is an adapter{NEEDED}{use}"
    (tmp_path / "recipe.yaml").write_text("")
    inside = f"{tmp_path} holds a folder with an adapter, adapter{NEEDED}"
    assert refused(tmp_path) == f"{inside}give {adapter}, which goes beside its model as --adapter."


def edited(source: Path, target: Path, old: str, new: str) -> Path:
    shutil.copytree(source, target)
    text = (target / "manifest.json").read_text()
    assert old in text
    (target / "manifest.json").write_text(text.replace(old, new))
    return target


def test_manifests_of_another_kind_or_version(tmp_path: Path) -> None:
    newer = "has format version 7, and this program reads up to 1; install a newer visualglm."
    for number, source in enumerate((builtin_path(), builtin_export())):
        path = edited(source, tmp_path / f"newer{number}", '"format_version": 1', '"format_version": 7')
        with pytest.raises(CheckpointError) as caught:
            choose(path, backend="auto", device="auto", dtype="auto")
        assert str(caught.value) == f"{path} {newer}"
    other = edited(builtin_export(), tmp_path / "other", '"visualglm-onnx"', '"visualglm-\\u001b[2Jgguf"')
    assert refused(other) == (
        f"{other} has the format 'visualglm-\\x1b[2Jgguf', which this program does not know; "
        "install a newer visualglm, or give a model directory made by `visualglm convert`."
    )
    with pytest.raises(CheckpointError, match="is a model directory, and an ONNX export is needed; give one made by"):
        open_lite_directory(builtin_path())


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes there")
def test_what_would_never_end_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "weights.pt")
    assert "holds" not in refused(tmp_path)
    assert refused(tmp_path / "weights.pt").endswith("is a file; give the folder that holds the checkpoint.")


@pytest.mark.skipif(sys.platform == "win32" or os.getuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    tmp_path.chmod(0o300)
    request.addfinalizer(lambda: tmp_path.chmod(0o700))
    assert "cannot be read (Permission denied); check its permissions." in refused(tmp_path)
