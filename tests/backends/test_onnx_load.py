"""What the onnx backend refuses to load or to run, and in what words."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import visualglm
from tests.lite_model import write_lite
from visualglm.backends.onnx import load as onnx_load
from visualglm.backends.onnx.load import load_onnx_backend
from visualglm.backends.onnx.session import core_count
from visualglm.checkpoint.lite_dir import open_lite_directory
from visualglm.checkpoint.lite_graphs import require_as_told
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
    with pytest.raises(CheckpointError, match=r"vision_encoder\.onnx should have the input pixels of .*, but has"):
        visualglm.load(path)


def test_graphs_of_another_size(lite: Path):
    config = json.loads((lite / "config.json").read_text())
    config["text"]["vocab_size"] += 1
    replace_graph(lite, "config.json", json.dumps(config).encode())
    with pytest.raises(CheckpointError, match=r"decoder\.onnx has the output logits of float32 \[any, any, \d+\]"):
        visualglm.load(lite)


def rename(model: onnx.ModelProto, operator: str, name: str, domain: str | None = None) -> None:
    node = next(node for node in model.graph.node if node.op_type == operator)
    node.op_type = name
    if domain is not None:
        model.opset_import.add(domain=domain, version=1)
        node.domain = domain


def set_opset(model: onnx.ModelProto, domain: str, version: int) -> None:
    next(opset for opset in model.opset_import if opset.domain == domain).version = version


UPGRADE = "run `pip install --upgrade onnxruntime`, or export the model again."
INPUT = onnx.helper.make_tensor_value_info("extra", onnx.TensorProto.FLOAT, [1])


@pytest.mark.parametrize(
    ("change", "needs"),
    [
        (lambda model: rename(model, "MatMulNBits", "MatMulNBitsOfTomorrow"), "operator com.microsoft:MatMulNBitsOfTo"),
        (lambda model: rename(model, "Concat", "ConcatOfTomorrow"), "operator ConcatOfTomorrow"),
        (lambda model: rename(model, "Concat", "Concat", "foo.bar"), "operator foo.bar:Concat"),
        (lambda model: set_opset(model, "", 99), "opset 99 of ai.onnx"),
        (lambda model: set_opset(model, "com.microsoft", 99), "opset 99 of com.microsoft"),
        (lambda model: setattr(model, "ir_version", 99), "version 99 of the ONNX format"),
    ],
    ids=range(6),
)
def test_what_the_installed_onnxruntime_lacks(change: Callable[[onnx.ModelProto], object], needs: str, lite: Path):
    edit_graph(lite, "decoder.onnx", change)
    with pytest.raises(CheckpointError) as caught:
        visualglm.load(lite)
    sentence = str(caught.value)
    assert sentence.startswith(f"{lite / 'decoder.onnx'} needs ") and needs in sentence
    assert sentence.endswith(f"which the installed onnxruntime {onnxruntime.__version__} lacks; {UPGRADE}")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.graph.node[9].attribute.add(name="zz", i=1, type=2), " \\(Unrecognized attribute: zz for"),
        (
            lambda model: model.graph.initializer.pop(0),
            r" \(Invalid model\. Node input 'flat_positions' is not a",
        ),
        (lambda model: set_opset(model, "", 9), r" \(.*\)"),
    ],
    ids=range(3),
)
def test_graphs_that_no_onnxruntime_can_run(change: Callable[[onnx.ModelProto], object], reason: str, lite: Path):
    edit_graph(lite, "decoder.onnx", change)
    with pytest.raises(CheckpointError, match=rf"^The installed onnxruntime .* cannot run .*{reason}.*; e") as caught:
        visualglm.load(lite)
    sentence = str(caught.value)
    assert "\n" not in sentence and "ONNXRuntimeError" not in sentence and "onnxruntime_src" not in sentence


def drop(values: Any, name: str) -> None:
    del values[[value.name for value in values].index(name)]


def set_type(model: onnx.ModelProto, name: str, kind: int) -> None:
    next(value for value in model.graph.input if value.name == name).type.tensor_type.elem_type = kind


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (
            lambda model: drop(model.graph.input, "attention_bias"),
            "should have the input attention_bias of float32 [",
        ),
        (lambda model: drop(model.graph.output, "logits"), "should have the output logits of float32 [any, any, "),
        (
            lambda model: drop(model.graph.input, "past_key_values.1.scales"),
            "input past_key_values.1.scales of",
        ),
        (lambda model: model.graph.input.append(INPUT), "has the input extra, which no export of this model has"),
        (lambda model: model.graph.output.append(INPUT), "has the output extra, which no export of this model has"),
        (
            lambda model: set_type(model, "position_ids", 6),
            "has the input position_ids of int32 [any, 2, any]",
        ),
    ],
    ids=range(6),
)
def test_graphs_of_other_inputs_and_outputs(change: Callable[[onnx.ModelProto], object], fault: str, lite: Path):
    edit_graph(lite, "decoder.onnx", change)
    with pytest.raises(CheckpointError, match="it is the graph of another model or program; ") as caught:
        visualglm.load(lite)
    assert str(caught.value).startswith(f"{lite / 'decoder.onnx'} ") and fault in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"precision": "int4"}, "precision as int4, but decoder.onnx has int8"),
        ({"precision": "fp32"}, "precision as fp32, but decoder.onnx has int8"),
        ({"block_size": 128}, "block_size as 128, but decoder.onnx has 32"),
        ({"block_size": None}, "block_size as None, but decoder.onnx has 32"),
        ({"kv_cache": "float32"}, "kv_cache as float32, but decoder.onnx has int8"),
        ({"use_past": False}, "use_past as False, but decoder.onnx has True"),
        ({"parameter_count": 7}, "parameter_count as 7, but the model of config.json has"),
    ],
    ids=range(7),
)
def test_manifests_that_their_graphs_contradict(changes: dict[str, object], told: str, lite: Path):
    manifest = json.loads((lite / "manifest.json").read_text())
    (lite / "manifest.json").write_text(json.dumps(manifest | changes))
    with pytest.raises(CheckpointError) as caught:
        visualglm.load(lite)
    assert str(caught.value).startswith(f"{lite / 'manifest.json'} gives {told}")
    assert str(caught.value).endswith("; export the model again.")


@pytest.mark.parametrize(
    ("options", "changes", "told"),
    [
        (
            ExportOptions("fp32"),
            {"precision": "fp16", "kv_cache": "float16"},
            "kv_cache as float16, but decoder.onnx",
        ),
        (ExportOptions("fp32", use_past=False), {"precision": "fp16"}, "precision as fp16, but decoder.onnx has fp32"),
        (ExportOptions("fp16", use_past=False), {"precision": "fp32"}, "precision as fp32, but decoder.onnx has fp16"),
        (ExportOptions("fp32"), {"block_size": 32}, "block_size as 32, but decoder.onnx has None"),
        (ExportOptions("fp32", use_past=False), {"use_past": True}, "use_past as True, but decoder.onnx has False"),
    ],
    ids=range(5),
)
def test_manifests_of_float_exports(
    options: ExportOptions, changes: dict[str, object], told: str, tiny_model_dir: Path, tmp_path: Path
):
    lite = export_onnx(open_model_directory(tiny_model_dir), tmp_path / "lite", options).path
    require_as_told(open_lite_directory(lite))
    manifest = json.loads((lite / "manifest.json").read_text())
    (lite / "manifest.json").write_text(json.dumps(manifest | changes))
    with pytest.raises(CheckpointError, match=re.escape(f"gives {told}")):
        require_as_told(open_lite_directory(lite))


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


def test_a_backend_tells_its_threads(lite: Path, tiny_model_dir: Path):
    assert load_onnx_backend(open_lite_directory(lite), "cpu").threads == 1
    assert load_onnx_backend(open_lite_directory(lite), "cpu", threads=3).threads == 3
    before = torch.get_num_threads()
    assert visualglm.load(tiny_model_dir, backend="torch", device="cpu").backend.threads == before


def test_threads_are_those_of_real_cores_that_may_be_used():
    assert 1 <= core_count() <= (os.cpu_count() or 1)


def test_weights_that_lie_elsewhere_through_a_link(lite: Path, tmp_path: Path):
    (lite / "decoder.onnx.data").rename(tmp_path / "elsewhere")
    (lite / "decoder.onnx.data").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"is a link to another folder .*; put the file itself there"):
        visualglm.load(lite)


# The memory that the system gives from then on, beside what it has given.
LIMITED = """
import resource, sys
import numpy as np
import psutil
import visualglm
import visualglm.backends.onnx.load
from visualglm.loading import choose

def limit(megabytes):
    limit = psutil.Process().memory_info().vms + megabytes * 10**6
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

# End in [gMASK] <sop>.
ids = np.full((10_000, 60), 10)
ids[:, -2:] = 5, 8
choice = choose(None, backend="onnx", device="cpu", dtype="float32")
try:
    {program}
except visualglm.VisualGLMError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is one of Linux")
@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("limit(4); choice.load()", "DeviceError The memory does not suffice for .*vision_encoder\\.onnx; close other"),
        ("model = choice.load(); limit(100); model.logits(ids)", "DeviceError The memory ran out while the model was"),
    ],
    ids=["loading", "computing"],
)
def test_memory_that_runs_out_is_told_in_a_sentence(program: str, said: str, builtin_model_dir: Path):
    code = LIMITED.format(program=program)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "") and re.match(said, done.stdout), done
    assert done.stdout.count("\n") == 1
