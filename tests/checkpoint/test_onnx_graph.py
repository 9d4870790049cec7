"""What is read of a graph, compared with what the `onnx` package reads."""

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import ModelProto, TensorProto

from tests.checkpoint.test_onnx_file import model_with, outside
from visualglm.checkpoint.lite_dir import GRAPHS, open_lite_directory
from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.checkpoint.onnx_graph import ELEMENT_TYPES, FIELDS, Value, read_signature, read_weights
from visualglm.errors import CheckpointError
from visualglm.export.onnx import ExportOptions, export_onnx

PATH = Path("folder/decoder.onnx")


def test_the_numbers_are_those_of_the_format() -> None:
    kinds: dict[str, Any] = {}

    def collect(kind: Any) -> None:
        if kind.name not in kinds:
            kinds[kind.name] = kind
            for field in kind.fields:
                if field.message_type:
                    collect(field.message_type)

    collect(ModelProto.DESCRIPTOR)
    for kind, numbers in FIELDS.items():
        assert {name: kinds[kind].fields_by_name[name].number for name in numbers} == numbers
    names = {TensorProto.DataType.Name(number): name for number, name in ELEMENT_TYPES.items()}
    assert {name: names[name] for name in ("FLOAT", "INT64", "BFLOAT16")} == {
        "FLOAT": "float32", "INT64": "int64", "BFLOAT16": "bfloat16"
    }  # fmt: skip
    assert all(name == known.lower() for known, name in names.items() if known != "FLOAT")


def values(declared: Any) -> dict[str, Value]:
    """Inputs or outputs as the package reads them."""
    return {
        value.name: Value(
            ELEMENT_TYPES[value.type.tensor_type.elem_type],
            tuple(size.dim_value if size.HasField("dim_value") else None for size in value.type.tensor_type.shape.dim),
        )
        for value in declared
    }


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_graphs_of_an_export(precision: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    done = export_onnx(open_model_directory(tiny_model_dir), tmp_path / "lite", ExportOptions(precision))
    for name in GRAPHS:
        model = onnx.load(str(done.graph(name)), load_external_data=False)
        signature = read_signature(PATH, done.read_graph(name))
        assert signature.inputs == values(model.graph.input) and signature.outputs == values(model.graph.output)
        weights = read_weights(PATH, done.read_graph(name))
        assert weights.constants == {tensor.name: ELEMENT_TYPES[tensor.data_type] for tensor in model.graph.initializer}
        blocks = {
            tuple({each.name: each.i for each in node.attribute}[key] for key in ("bits", "block_size"))
            for node in model.graph.node
            if node.op_type == "MatMulNBits"
        }
        assert weights.blocks == blocks and bool(blocks) == (name == "decoder" and precision.startswith("int"))
    assert open_lite_directory(done.path) == done


def test_a_graph_in_two_pieces() -> None:
    """Protobuf joins them."""
    model = model_with(outside())
    twice = model.SerializeToString() + ModelProto(graph=onnx.GraphProto(input=model.graph.output)).SerializeToString()
    signature = read_signature(PATH, twice)
    assert signature.inputs == signature.outputs == {"y": Value("float32", (4,))}
    assert str(signature.inputs["y"]) == "float32 [4]" and str(Value("int8", (None, 2))) == "int8 [any, 2]"


def test_what_is_malformed_or_strange() -> None:
    content = model_with(outside()).SerializeToString()
    assert read_weights(PATH, b"").constants == {}
    for end in range(len(content)):
        try:
            read_signature(PATH, content[:end])
            read_weights(PATH, content[:end])
        except CheckpointError as error:
            assert str(error).startswith("folder/decoder.onnx is no ONNX graph that can be used (")
    strange = onnx.helper.make_tensor_value_info("x\x1b[2J", TensorProto.INT4, None)
    assert read_signature(PATH, ModelProto(graph=onnx.GraphProto(input=[strange])).SerializeToString()).inputs == {
        "x\x1b[2J": Value(f"type {TensorProto.INT4}", ())
    }
