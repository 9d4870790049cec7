"""What the onnx backend refuses to load or to run, and in what words."""

import json
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import visualglm
from tests.lite_model import write_lite
from visualglm.backends.onnx import load as onnx_load
from visualglm.backends.onnx.session import core_count
from visualglm.checkpoint.lite_dir import open_lite_directory
from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.errors import CheckpointError, DeviceError
from visualglm.export.onnx import ExportOptions, export_onnx


@pytest.fixture
def lite(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return export_onnx(open_model_directory(tiny_model_dir), tmp_path / "lite", ExportOptions("int8")).path


def replace_graph(lite: Path, name: str, content: bytes) -> None:
    """A graph that the manifest vouches for."""
    (lite / name).write_bytes(content)
    manifest = json.loads((lite / "manifest.json").read_text())
    manifest["files"][name] = {"sha256": sha256(content).hexdigest(), "size": len(content)}
    (lite / "manifest.json").write_text(json.dumps(manifest))


def edit_graph(lite: Path, name: str, change: Callable[[onnx.ModelProto], object]) -> None:
    model = onnx.load(str(lite / name), load_external_data=False)
    change(model)
    replace_graph(lite, name, model.SerializeToString())


def test_graphs_of_something_else(tiny_model_dir: Path, tmp_path: Path):
    path = write_lite(tmp_path / "lite", tiny_model_dir).path
    with pytest.raises(CheckpointError, match=r"vision_encoder.onnx should have pixels of .*, but has none: it is the"):
        visualglm.load(path)


def test_graphs_of_another_size(lite: Path):
    config = json.loads((lite / "config.json").read_text())
    config["text"]["vocab_size"] += 1
    replace_graph(lite, "config.json", json.dumps(config).encode())
    with pytest.raises(CheckpointError, match=r"decoder\.onnx should have logits of"):
        visualglm.load(lite)


def test_an_operator_that_onnxruntime_lacks(lite: Path):
    def rename(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == "MatMulNBits")
        node.op_type = "MatMulNBitsOfTomorrow"

    edit_graph(lite, "decoder.onnx", rename)
    with pytest.raises(CheckpointError, match=r"uses an operator that the installed onnxruntime .* lacks") as caught:
        visualglm.load(lite)
    assert "pip install --upgrade onnxruntime" in str(caught.value) and "\n" not in str(caught.value)


def test_a_graph_that_fails_when_it_is_run(lite: Path):
    def wrong_split(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            if tensor.name == "qk_v":
                tensor.CopyFrom(onnx.numpy_helper.from_array(np.array([1, 2]), "qk_v"))

    edit_graph(lite, "decoder.onnx", wrong_split)
    with pytest.raises(CheckpointError, match="export the model again") as caught:
        visualglm.load(lite).ask(None, "What?", max_new_tokens=2)
    assert "\n" not in str(caught.value)


def test_too_little_memory_is_told_before_loading(lite: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onnx_load, "available_memory", lambda: 1000)
    with pytest.raises(DeviceError, match=r"The model takes .* but this machine has 1 KiB left"):
        visualglm.load(lite)


def test_a_device_without_its_provider(lite: Path):
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(DeviceError, match="needs CUDAExecutionProvider, which the installed onnxruntime"):
        visualglm.load(lite, device="cuda")


def test_memory_is_that_of_the_weights_as_they_are_run(tiny_model_dir: Path, tmp_path: Path, lite: Path):
    """Quantised weights stay as they are; those of a float16 model are widened when an fp32 export of it is loaded."""
    quantised = open_lite_directory(lite)
    assert quantised.memory.weights == quantised.weights_bytes
    exact = export_onnx(open_model_directory(tiny_model_dir), tmp_path / "exact", ExportOptions("fp32"))
    assert exact.memory.weights >= 4 * exact.manifest.parameter_count


def test_threads_are_those_of_real_cores_that_may_be_used():
    assert 1 <= core_count() <= (os.cpu_count() or 1)


def test_weights_that_lie_elsewhere_through_a_link(lite: Path, tmp_path: Path):
    (lite / "decoder.onnx.data").rename(tmp_path / "elsewhere")
    (lite / "decoder.onnx.data").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"is a link to another folder .*; put the file itself there"):
        visualglm.load(lite)
