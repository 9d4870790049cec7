"""`visualglm convert`, `check` and `info`."""

import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import onnxruntime
import pytest

import visualglm
from tests.cli.program import Invoke, change_config, replace_file
from tests.lite_model import graph, outside, write_lite
from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.export.onnx import ExportOptions, export_onnx


@pytest.fixture
def own_model_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


@pytest.fixture
def sat(invoke: Invoke, tiny_model_dir: Path, tmp_path: Path) -> Path:
    """The tiny model as a SAT archive."""
    assert invoke("convert", tiny_model_dir, tmp_path / "sat", "--to", "sat").code == 0
    return tmp_path / "sat"


def marks(out: str) -> dict[str, str]:
    """What `check` found for each thing."""
    rows = [line.split(None, 1) for line in out.splitlines()]
    return {rest.split("  ")[0]: mark for mark, rest in rows}


def test_there_and_back(invoke: Invoke, tiny_model_dir: Path, sat: Path, tmp_path: Path):
    outcome = invoke("convert", sat, tmp_path / "hf", "--to", "hf")
    assert outcome.out.splitlines() == [
        f"source   {sat}: SAT archive, q, k and v one after the other",
        "weights  91,248 parameters, float16, 178 KiB",
        f"output   {tmp_path / 'hf'}: Hugging Face checkpoint",
    ]
    assert outcome.err == "\nFree to use.\n"
    assert invoke("convert", tmp_path / "hf", tmp_path / "back").code == 0
    back = open_model_directory(tmp_path / "back")
    assert (
        back.manifest.files["model.safetensors"]
        == open_model_directory(tiny_model_dir).manifest.files["model.safetensors"]
    )
    ask = ("What is it?", "--max-new-tokens", 9)
    assert invoke("ask", "-m", tmp_path / "back", *ask).out == invoke("ask", "-m", tiny_model_dir, *ask).out


def test_without_a_tokenizer(invoke: Invoke, sat: Path, tiny_tokenizer_path: Path, tmp_path: Path):
    (sat / "ice_text.model").unlink()
    outcome = invoke("convert", sat, tmp_path / "model")
    assert outcome.code == 0
    assert "Warning: there is no tokenizer, so this model can be converted back but not asked" in outcome.err
    assert "has no tokenizer.model" in invoke("ask", "-m", tmp_path / "model", "What?").error
    assert marks(invoke("check", tmp_path / "model").out)["tokenizer"] == "–"
    assert "is not empty; give another folder, or --force" in invoke("convert", sat, tmp_path / "model").error
    again = invoke("convert", sat, tmp_path / "model", "--force", "--quiet", "--tokenizer", tiny_tokenizer_path)
    assert (again.code, again.err) == (0, "")
    assert marks(invoke("check", tmp_path / "model").out)["tokenizer"] == "✓"


def test_hostile_pickle(invoke: Invoke, sat: Path, tmp_path: Path):
    """Code in a checkpoint is not run, and nothing is written."""
    path = sat / "1" / "mp_rank_00_model_states.pt"
    harmless = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path, "w") as archive:
        for name in harmless.namelist():
            hostile = f"cposix\nsystem\n(S'touch {tmp_path / 'harm'}'\ntR.".encode()
            archive.writestr(name, hostile if name.endswith("data.pkl") else harmless.read(name))
    error = invoke("convert", sat, tmp_path / "out").error
    assert str(path) in error and "posix.system" in error
    assert not (tmp_path / "harm").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model_config.json", None, "is no checkpoint"),
        ("latest", None, "is missing or unreadable"),
        ("1/mp_rank_00_model_states.pt", None, "is missing"),
        ("1/mp_rank_00_model_states.pt", b"", "mp_rank_00_model_states.pt"),
        ("1/mp_rank_00_model_states.pt", b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        ("ice_text.model", b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        ("ice_text.model", b"<html>", "ice_text.model"),
    ],
    ids=range(7),
)
def test_incomplete_archives(name: str, content: bytes | None, words: str, invoke: Invoke, sat: Path, tmp_path: Path):
    if content is None:
        (sat / name).unlink()
    else:
        (sat / name).write_bytes(content)
    assert words in invoke("convert", sat, tmp_path / "out").error
    assert [path.name for path in tmp_path.iterdir()] == ["sat"]


def test_missing_shard(invoke: Invoke, tiny_model_dir: Path, tmp_path: Path):
    invoke("convert", tiny_model_dir, tmp_path / "hf", "--to", "hf")
    index = {"weight_map": {"lm_head.weight": "pytorch_model-00002-of-00002.bin"}}
    (tmp_path / "hf" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    error = invoke("convert", tmp_path / "hf", tmp_path / "out").error
    assert "lacks 1 of the 1 files" in error and "pytorch_model-00002-of-00002.bin" in error


def test_check_of_a_whole_model(invoke: Invoke, tiny_model_dir: Path):
    outcome = invoke("check", tiny_model_dir)
    assert (outcome.code, outcome.err) == (0, "")
    assert set(marks(outcome.out).values()) == {"✓"}
    for line in (
        "✓  model.safetensors    191,392 bytes, hash as written",
        "✓  configuration        91,248 parameters, float16",
        "✓  tokenizer            not the released one, but it fits; ",
        "✓  memory, bfloat16     takes ",
    ):
        assert line in outcome.out


def test_check_goes_on_with_a_broken_model(invoke: Invoke, own_model_dir: Path):
    weights = own_model_dir / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    (own_model_dir / "WEIGHTS_LICENSE.txt").unlink()
    change_config(own_model_dir, "text", num_hidden_layers=1)
    outcome = invoke("check", own_model_dir)
    assert outcome.code == 1 and "Traceback" not in outcome.err
    found = marks(outcome.out)
    assert {name for name, mark in found.items() if mark == "✗"} == {
        "model.safetensors",
        "WEIGHTS_LICENSE.txt",
        "tensors",
    }
    assert found["config.json"] == found["tokenizer.model"] == found["tokenizer"] == "✓"
    assert "✗  model.safetensors    changed since it was written" in outcome.out
    assert "12 unexpected (text.layers.1.input_norm.weight" in outcome.out


def test_check_without_a_manifest_and_without_a_configuration(invoke: Invoke, own_model_dir: Path):
    (own_model_dir / "manifest.json").unlink()
    outcome = invoke("check", own_model_dir)
    assert outcome.code == 1
    assert {name for name, mark in marks(outcome.out).items() if mark == "✗"} == {"manifest.json"}
    (own_model_dir / "config.json").write_text("{")
    outcome = invoke("check", own_model_dir)
    assert outcome.code == 1 and "–  the rest" in outcome.out
    assert "does not exist" in invoke("check", own_model_dir / "nothing").error


def test_check_of_a_manifest_that_lists_nothing(invoke: Invoke, own_model_dir: Path):
    manifest = json.loads((own_model_dir / "manifest.json").read_text())
    (own_model_dir / "manifest.json").write_text(json.dumps(manifest | {"files": {}}))
    outcome = invoke("check", own_model_dir)
    assert outcome.code == 1 and marks(outcome.out)["all listed"] == "✗"


@pytest.mark.parametrize("text", [b"\xff\xfe", b"", b" \n"], ids=repr)
def test_info_with_a_damaged_licence(text: bytes, invoke: Invoke, own_model_dir: Path):
    replace_file(own_model_dir, "WEIGHTS_LICENSE.txt", text)
    outcome = invoke("info", own_model_dir)
    assert (outcome.code, outcome.err) == (0, "") and "licence" in outcome.out


def test_check_of_foreign_checkpoints(invoke: Invoke, tiny_model_dir: Path, sat: Path, tmp_path: Path):
    invoke("convert", tiny_model_dir, tmp_path / "hf", "--to", "hf")
    for path, kind in ((sat, "sat"), (tmp_path / "hf", "hf")):
        outcome = invoke("check", path)
        assert outcome.code == 0
        assert f"{kind} checkpoint, " in outcome.out and "91,248 parameters, float16" in outcome.out
    (sat / "latest").unlink()
    outcome = invoke("check", sat)
    assert outcome.code == 1 and outcome.out.startswith("✗  tensors")


def test_check_of_the_built_in_model(invoke: Invoke, builtin_model_dir: Path):
    assert invoke("check").code == 0


def test_info(invoke: Invoke, tiny_model_dir: Path):
    outcome = invoke("info", tiny_model_dir)
    assert (outcome.code, outcome.err) == (0, "")
    directory = open_model_directory(tiny_model_dir)
    for line in (
        f"visualglm    {visualglm.__version__}",
        f"processor    {os.cpu_count()} cores",
        f"fingerprint  {directory.fingerprint}",
        "source       random",
        "licence      Free to use.",
        "part        layers  width  heads  MLP  parameters  other",
        "projection  1       24→32              800",
    ):
        assert line in outcome.out.splitlines()
    assert f"onnxruntime  {onnxruntime.__version__}, " in outcome.out
    assert any(line.startswith("devices      cpu (") for line in outcome.out.splitlines())


def test_info_tells_of_the_machine_before_it_looks_at_the_model(invoke: Invoke, tmp_path: Path):
    outcome = invoke("info", tmp_path)
    assert outcome.code == 1
    assert outcome.out.startswith("visualglm  ") and "visualglm: error: " in outcome.err


@pytest.fixture
def lite(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """An export of the tiny model, to be damaged."""
    return write_lite(tmp_path / "lite", tiny_model_dir).path


@pytest.fixture
def real_lite(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """One whose graphs are those of the model."""
    return export_onnx(open_model_directory(tiny_model_dir), tmp_path / "real", ExportOptions("int4")).path


def test_check_of_an_export(invoke: Invoke, real_lite: Path):
    outcome = invoke("check", real_lite)
    assert (outcome.code, outcome.err) == (0, "")
    assert set(marks(outcome.out).values()) == {"✓"}
    made_beside = f"made beside onnxruntime {onnxruntime.__version__}"
    for line in (
        f"✓  manifest.json             ONNX export, int4 in blocks of 32, KV cache int8, {made_beside}",
        f"✓  decoder.onnx.data         {(real_lite / 'decoder.onnx.data').stat().st_size:,} bytes, hash as written",
        "✓  configuration             91,248 parameters, float16",
        "✓  graphs                    3, as the manifest tells",
        "✓  memory                    takes 600 MiB (weights ",
    ):
        assert line in outcome.out


def test_check_of_an_export_whose_manifest_lies(invoke: Invoke, real_lite: Path):
    manifest = json.loads((real_lite / "manifest.json").read_text())
    (real_lite / "manifest.json").write_text(json.dumps(manifest | {"precision": "int8"}))
    outcome = invoke("check", real_lite)
    assert outcome.code == 1 and marks(outcome.out)["graphs"] == "✗"
    told = f"{real_lite / 'manifest.json'} gives precision as int8, but decoder.onnx has int4; export the model again."
    assert told in outcome.out and told in invoke("ask", "-m", real_lite, "What?").error


def test_check_goes_on_with_a_broken_export(invoke: Invoke, lite: Path):
    (lite / "decoder.onnx.data").write_bytes(bytes(256))
    (lite / "vision_encoder.onnx.data").write_bytes(bytes(255))
    (lite / "quantization.json").unlink()
    outcome = invoke("check", lite)
    assert outcome.code == 1 and "Traceback" not in outcome.err
    found = marks(outcome.out)
    assert {name for name, mark in found.items() if mark == "✗"} == {
        "decoder.onnx.data",
        "vision_encoder.onnx.data",
        "quantization.json",
    }
    assert "✗  decoder.onnx.data         changed since it was written; export the model again" in outcome.out
    assert (found["decoder.onnx"], found["tokenizer"], found["graphs"]) == ("✓", "✓", "–")
    (lite / "config.json").unlink()
    assert "–  the rest" in invoke("check", lite).out


def test_check_of_an_export_with_a_hostile_graph(invoke: Invoke, lite: Path):
    """Every hash is right."""
    replace_file(lite, "decoder.onnx", graph(outside("../../etc/passwd", 0, 128)))
    outcome = invoke("check", lite)
    assert outcome.code == 1
    assert {name for name, mark in marks(outcome.out).items() if mark == "✗"} == {"graphs"}
    assert "decoder.onnx asks for weights in ../../etc/passwd, and may only in decoder.onnx.data" in outcome.out


def test_check_of_an_export_of_a_later_version(invoke: Invoke, lite: Path):
    manifest = json.loads((lite / "manifest.json").read_text())
    (lite / "manifest.json").write_text(json.dumps(manifest | {"format_version": 2}))
    outcome = invoke("check", lite)
    assert outcome.code == 1 and "has format version 2, and this program reads up to 1; install a newer" in outcome.out
    assert "install a newer visualglm" in invoke("info", lite).err


def test_info_of_an_export(invoke: Invoke, tiny_model_dir: Path, lite: Path):
    outcome = invoke("info", lite)
    assert (outcome.code, outcome.err) == (0, "")
    for line in (
        f"model        {lite}",
        "parameters   91,248, 1 KiB",
        "ONNX export  int4 in blocks of 32, KV cache int8, made beside onnxruntime 1.32.0",
        f"fingerprint  {open_model_directory(tiny_model_dir).fingerprint}, of the model it was made from",
        "tokenizer    tokenizer.model",
        "licence      Free to use.",
        "projection  1       24→32              800",
    ):
        assert line in outcome.out.splitlines()
    assert "memory       takes 600 MiB (weights 1 KiB, cache 24 KiB, work 600 MiB); fits: " in outcome.out


def test_an_export_is_no_checkpoint_to_convert(invoke: Invoke, real_lite: Path, tiny_model_dir: Path, tmp_path: Path):
    error = invoke("convert", real_lite, tmp_path / "out").error
    assert f"{real_lite} is an ONNX export, and a model directory is needed" in error
    assert f"{real_lite} is not replaced" in invoke("convert", tiny_model_dir, real_lite, "--force").error
    assert invoke("check", real_lite).code == 0
