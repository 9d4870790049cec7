"""Exports of a small random model: valid graphs, equal to torch in float32, and complete on the disk."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from visualglm.checkpoint.lite_dir import GRAPHS, LiteDirectory, open_lite_directory, verify_lite
from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.checkpoint.tensors import LazyTensor
from visualglm.config import TextConfig
from visualglm.errors import CheckpointError, ConfigError
from visualglm.export.decoder import halves_apart, rotary_tables
from visualglm.export.onnx import ERRORS, ExportOptions, expected_bytes, export_onnx

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
    ],
)
def test_options_that_contradict_one_another(
    tiny_model_dir: Path, tmp_path: Path, options: dict[str, Any], message: str
):
    with pytest.raises(ConfigError, match=message):
        export_onnx(open_model_directory(tiny_model_dir), tmp_path / "out", ExportOptions(**options))
    assert not list(tmp_path.iterdir())


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
