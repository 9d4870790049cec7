"""Exports of a small random model: valid graphs, equal to torch in float32, and complete on the disk."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import visualglm
from visualglm.checkpoint.lite_dir import GRAPHS, LiteDirectory, open_lite_directory, verify_lite
from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.checkpoint.tensors import LazyTensor
from visualglm.config import TextConfig
from visualglm.errors import CheckpointError, ConfigError, DataError
from visualglm.export.decoder import halves_apart, rotary_tables
from visualglm.export.onnx import ERRORS, ExportOptions, expected_bytes, export_onnx
from visualglm.scenes.held_out import picture_of

Export = Callable[..., LiteDirectory]


@pytest.fixture(scope="module")
def export(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Exports the tiny model with the options given, once."""
    made: dict[str, LiteDirectory] = {}

    def make(**options: Any) -> LiteDirectory:
        key = json.dumps(options)
        if key not in made:
            output = tmp_path_factory.mktemp("export") / "out"
            made[key] = export_onnx(open_model_directory(tiny_model_dir), output, ExportOptions(**options))
        return made[key]

    return make


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("use_past", [True, False])
def test_the_graphs_are_valid_and_say_what_they_take(export: Export, precision: str, use_past: bool):
    done = export(precision=precision, use_past=use_past)
    for name in GRAPHS:
        onnx.checker.check_model(str(done.graph(name)), full_check=False)
    decoder = onnx.load(str(done.graph("decoder")), load_external_data=False).graph
    inputs = {value.name for value in decoder.input}
    cached = {f"past_key_values.{layer}.{part}" for layer in range(2) for part in ("key", "value")}
    if precision.startswith("int"):
        cached |= {f"past_key_values.{layer}.scales" for layer in range(2)}
    assert inputs == {"inputs_embeds", "position_ids", "attention_bias", "logits_to_keep"} | (
        cached if use_past else set()
    )
    assert done.manifest.use_past is use_past


def test_weights_lie_in_the_data_files_on_pages_of_their_own(export: Export):
    done = export(precision="int4")
    graph = onnx.load(str(done.graph("decoder")), load_external_data=False).graph
    outside = [tensor for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    assert {tensor.name for tensor in outside} >= {"text.lm_head.weight", "text.layers.0.mlp.fc1.scales"}
    for tensor in outside:
        place = {entry.key: entry.value for entry in tensor.external_data}
        assert place["location"] == "decoder.onnx.data" and int(place["offset"]) % 4096 == 0


def test_what_an_export_holds_and_that_it_is_whole(export: Export, tiny_model_dir: Path):
    done, model = export(precision="int8"), open_model_directory(tiny_model_dir)
    assert open_lite_directory(done.path).manifest == done.manifest == verify_lite(done.path)
    assert done.config == model.config
    assert done.manifest.model_fingerprint == model.fingerprint
    assert done.manifest.kv_cache == "int8" and done.manifest.block_size == 32
    assert (done.path / "tokenizer.model").read_bytes() == (tiny_model_dir / "tokenizer.model").read_bytes()
    assert (done.path / "WEIGHTS_LICENSE.txt").read_text() == "Free to use.\n"


def test_the_report_tells_the_error_of_every_linear_layer(export: Export):
    errors = {}
    for precision in ("int8", "int4"):
        report = json.loads((export(precision=precision).path / ERRORS).read_text())
        errors[precision] = {layer["name"]: layer for layer in report["layers"]}
    names = set(errors["int4"])
    assert names == set(errors["int8"])
    assert {"text.lm_head", "text.word_embeddings", "vision.layers.1.mlp.fc2", "projection"} <= names
    in_decoder = [name for name in names if name.startswith("text.layers.") or name == "text.lm_head"]
    assert {errors["int4"][name]["bits"] for name in in_decoder} == {4}
    assert {errors["int4"][name]["bits"] for name in names - set(in_decoder)} == {8}
    # Four bits more halve the step four times: a 256th of the squared error, but for the clipping of outliers.
    for name in in_decoder:
        assert 100 < errors["int4"][name]["relative_error"] / errors["int8"][name]["relative_error"] < 500


def test_exporting_is_repeatable(export: Export, tiny_model_dir: Path, tmp_path: Path):
    again = export_onnx(open_model_directory(tiny_model_dir), tmp_path / "again", ExportOptions("int4"))
    assert again.manifest == export(precision="int4").manifest


def test_progress_runs_from_the_first_byte_to_the_last(tiny_model_dir: Path, tmp_path: Path):
    seen: list[tuple[int, int]] = []
    directory = open_model_directory(tiny_model_dir)
    export_onnx(
        directory, tmp_path / "out", ExportOptions("int8"), report=lambda done, total: seen.append((done, total))
    )
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_the_expected_size_is_that_of_the_weights(export: Export, tiny_model_dir: Path, precision: str):
    done = export(precision=precision)
    needed = expected_bytes(open_model_directory(tiny_model_dir), done.manifest)
    graphs = sum(done.graph(name).stat().st_size for name in GRAPHS)
    # Pages that are not full, and norms and biases in float32, are the rest.
    assert 0 < needed < done.weights_bytes + 4_000_000
    assert needed > done.weights_bytes - graphs - 4096 * 120


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp32", "block_size": 64}, "Blocks of 64 are for int4 and int8; leave them out for fp32."),
        ({"precision": "int4", "block_size": 48}, "cannot be run; give 16, 32, 64, 128, 256, 512"),
        ({"precision": "int4", "block_size": -1}, "Blocks of -1 weights cannot be run"),
        ({"precision": "int4", "block_size": 0}, "Blocks of 0 weights cannot be run"),
        ({"precision": "int4", "block_size": 1024}, "Blocks of 1024 weights cannot be run"),
        ({"precision": "int4", "use_past": False, "kv_cache": "int8"}, "An export without a KV cache has none of int8"),
        ({"precision": "fp16", "kv_cache": "int8"}, "An fp16 export has a float16 cache, not int8"),
        (
            {"precision": "fp32", "method": "gptq"},
            "Nothing is rounded with fp32, so that there is nothing to calibrate",
        ),
        ({"precision": "fp16", "evaluate": 5}, "Nothing is rounded with fp16"),
        ({"precision": "fp32", "calibration": Path("rows.jsonl")}, "Nothing is rounded with fp32"),
        ({"precision": "int8", "int8_layers": ("qkv",)}, "Layers in 8 bits are an exception from int4"),
        (
            {"precision": "int4", "int8_layers": ("q", "qkv")},
            "no layers named 'q'; give some of qkv, proj, fc1, fc2, lm",
        ),
        ({"precision": "int4", "method": "gptq"}, "is not the built-in model, for which scenes are drawn"),
        ({"precision": "int4", "evaluate": 5}, "gptq and judging need rows; give --calibration FILE"),
        ({"precision": "int4", "calibration": Path("rows.jsonl"), "evaluate": 5}, "rows.jsonl does not exist"),
    ],
)
def test_options_that_contradict_one_another(
    tiny_model_dir: Path, tmp_path: Path, options: dict[str, Any], message: str
):
    with pytest.raises((ConfigError, DataError), match=message):
        export_onnx(open_model_directory(tiny_model_dir), tmp_path / "out", ExportOptions(**options))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty questions with answers, every other about a picture."""
    folder = tmp_path_factory.mktemp("rows")
    picture_of(0).save(folder / "scene.png")
    lines = [{"prompt": f"What is {number}?", "label": f"{number} cats"} for number in range(20)]
    for line in lines[1::2]:
        line["img"] = "scene.png"
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def test_the_report_of_a_calibrated_export(tiny_model_dir: Path, tmp_path: Path, rows: Path):
    options = ExportOptions("int4", method="gptq", int8_layers=("qkv", "lm_head"), calibration=rows, evaluate=None)
    done = export_onnx(open_model_directory(tiny_model_dir), tmp_path / "out", options)
    report = json.loads((done.path / ERRORS).read_text())
    assert report["method"] == "gptq" and report["int8_layers"] == ["qkv", "lm_head"]
    assert report["calibration"] == {"examples": "rows of rows.jsonl", "rows": 18}
    judgement = report["judgement"]
    assert judgement["examples"] == "rows of rows.jsonl" and judgement["count"] == 2 and judgement["answers"] is None
    assert judgement["logits"]["answer_tokens"] > 4 and 0 < judgement["logits"]["logit_error"] < 0.5
    assert judgement["logits"]["perplexity"] == pytest.approx(judgement["logits"]["float32_perplexity"], rel=0.2)
    layers = {layer["name"]: layer for layer in report["layers"]}
    assert layers["text.lm_head"]["bits"] == layers["text.layers.1.attention.qkv"]["bits"] == 8
    assert layers["text.layers.1.attention.proj"]["bits"] == layers["text.layers.0.mlp.fc2"]["bits"] == 4
    assert layers["text.layers.0.mlp.fc2"]["of"] == "outputs" and layers["projection"]["of"] == "weights"
    assert done.manifest.title.startswith("int4 (qkv, lm_head int8) in blocks of 32")
    assert sorted(path.name for path in done.path.iterdir()) == sorted([*done.manifest.files, "manifest.json"])
    assert visualglm.load(done.path).ask(None, "What?", max_new_tokens=3) is not None


def test_layers_in_eight_bits_take_more_room(export: Export, tiny_model_dir: Path):
    directory, narrow = open_model_directory(tiny_model_dir), export(precision="int4")
    wide = export(precision="int4", int8_layers=("lm_head",))
    head = prod(directory.tensors["text.lm_head.weight"].shape) // 2
    for sizes in (
        [done.weights_bytes for done in (narrow, wide)],
        [expected_bytes(directory, done.manifest) for done in (narrow, wide)],
    ):
        assert sizes[1] - sizes[0] == pytest.approx(head, abs=4096 * 4)


def test_nothing_is_judged_unless_told_so(export: Export):
    report = json.loads((export(precision="int4").path / ERRORS).read_text())
    assert report["judgement"] is None and "calibration" not in report


def test_an_export_without_a_cache_is_judged_too(builtin_model_dir: Path, tmp_path: Path):
    options = ExportOptions("int8", use_past=False, evaluate=1)
    done = export_onnx(open_model_directory(builtin_model_dir), tmp_path / "out", options)
    answers = json.loads((done.path / ERRORS).read_text())["judgement"]["answers"]
    assert answers["questions"] == 8 and answers["float32_exact_match"] > 0.8


def test_exports_from_before_there_were_layers_in_eight_bits_are_read(export: Export, tmp_path: Path):
    shutil.copytree(export(precision="int8").path, tmp_path / "old")
    manifest = tmp_path / "old" / "manifest.json"
    values = json.loads(manifest.read_text())
    del values["int8_layers"]
    manifest.write_text(json.dumps(values))
    assert open_lite_directory(tmp_path / "old").manifest.int8_layers == ()


def test_nothing_is_left_of_an_export_that_fails(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("visualglm.export.onnx_graph.OnnxGraph.save", full)
    with pytest.raises(CheckpointError, match="The disk is full"):
        export_onnx(open_model_directory(tiny_model_dir), tmp_path / "out", ExportOptions("int8"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize(
    "name",
    [
        "vision.layers.0.attention.qkv.bias",
        "vision.patch_embed.weight",
        "text.layers.1.mlp.fc1.weight",
        "text.norm.weight",
        "text.word_embeddings.weight",
        "text.lm_head.weight",
    ],
)
def test_weights_that_are_not_finite_are_named(tiny_model_dir: Path, tmp_path: Path, precision: str, name: str):
    """Rounded to whole numbers they would give an answer like any other."""
    directory = open_model_directory(tiny_model_dir)
    array = np.array(directory.tensors[name].array())
    array.reshape(-1)[-1] = np.nan
    damaged = {**directory.tensors, name: LazyTensor("float16", array.shape, lambda: array)}
    with pytest.raises(CheckpointError, match=f"The tensor {name} holds values that are not finite"):
        export_onnx(replace(directory, tensors=damaged), tmp_path / "out", ExportOptions(precision))
    assert not list(tmp_path.iterdir())


def test_an_export_is_replaced_only_when_told_so(tiny_model_dir: Path, tmp_path: Path):
    directory = open_model_directory(tiny_model_dir)
    export_onnx(directory, tmp_path / "out", ExportOptions("int8"))
    with pytest.raises(CheckpointError, match="not empty"):
        export_onnx(directory, tmp_path / "out", ExportOptions("int4"))
    assert export_onnx(directory, tmp_path / "out", ExportOptions("int4"), force=True).manifest.precision == "int4"


def test_one_turn_of_a_reordered_head_is_the_two_of_its_halves():
    """Against the definition: each half of a head is turned by its own position, first against second quarter."""
    config = TextConfig(hidden_size=64, num_attention_heads=2, vocab_size=130528, max_sequence_length=32)
    random = np.random.default_rng(0)
    query, positions = random.standard_normal(64).astype(np.float32), (7, 3)
    expected = np.empty_like(query)
    for head in range(2):
        for half, position in enumerate(positions):
            part = slice(head * 32 + half * 16, head * 32 + half * 16 + 16)
            inv_freq = 1 / 10000 ** (np.arange(0, 16, 2) / 16)
            cos, sin = np.tile(np.cos(position * inv_freq), 2), np.tile(np.sin(position * inv_freq), 2)
            first, second = np.split(query[part], 2)
            expected[part] = query[part] * cos + np.concatenate([-second, first]) * sin
    order = halves_apart(config)[:64]
    cos, sin = (np.concatenate([table[position] for position in positions]) for table in rotary_tables(config))
    first, second = np.split(query[order].reshape(2, 32), 2, axis=1)
    turned = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1).reshape(-1)
    np.testing.assert_allclose(turned, expected[order], atol=1e-6)
