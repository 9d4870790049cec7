"""A lite directory made by hand: graphs that compute nothing useful, with their weights inside and outside."""

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from visualglm.checkpoint.lite_dir import GRAPHS, LiteDirectory, LiteForm, write_lite_directory
from visualglm.checkpoint.model_dir import open_model_directory

FORM = LiteForm(precision="int4", kv_cache="int8", use_past=True, block_size=32, onnxruntime_version="1.32.0")
DATA_BYTES = 256


def fill(folder: Path) -> LiteForm:
    """Three graphs `y = x * w`; `embed_tokens` keeps its weights inside, the others have them outside."""
    for name in GRAPHS:
        weight = np.arange(32, dtype=np.float32)
        tensor = numpy_helper.from_array(weight, "w")
        if name != "embed_tokens":
            tensor = outside(f"{name}.onnx.data", 128, 128)
            (folder / f"{name}.onnx.data").write_bytes(bytes(128) + weight.tobytes())
        (folder / f"{name}.onnx").write_bytes(graph(tensor))
    (folder / "quantization.json").write_text("{}")
    return FORM


def outside(location: str, offset: int, length: int) -> TensorProto:
    """A tensor of 32 numbers whose bytes lie in another file."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[32], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def graph(weight: TensorProto) -> bytes:
    """A graph `y = x * w` in one file."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [32]) for name in "xy")
    made = helper.make_graph([helper.make_node("Mul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def write_lite(path: Path, model_dir: Path, form: LiteForm = FORM) -> LiteDirectory:
    """An export of the model in `model_dir`."""

    def fill_as(folder: Path) -> LiteForm:
        fill(folder)
        return form

    return write_lite_directory(path, open_model_directory(model_dir), fill_as, needed_bytes=10_000)
