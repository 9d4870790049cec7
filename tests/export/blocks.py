"""Weights to quantise, and ONNX Runtime's operators one at a time."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper
from safetensors.numpy import load_file

from visualglm.export.quantize import QuantizedWeight

Floats = NDArray[np.float32]


def heavy_tailed(rows: int, columns: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_t(4, (rows, columns)).astype(np.float32)


def builtin_linear_weights(directory: Path) -> dict[str, Floats]:
    """Of the decoder."""
    tensors = load_file(directory / "model.safetensors")
    return {
        name: tensor.astype(np.float32)
        for name, tensor in tensors.items()
        if name.startswith("text.") and tensor.ndim == 2 and "embeddings" not in name
    }


def run_operator(op: str, inputs: dict[str, NDArray[Any] | None], fed: str, **attributes: Any) -> Floats:
    """The output of one operator of ONNX Runtime, the input `fed` given at run time and the others as constants."""
    node = helper.make_node(op, [name if array is not None else "" for name, array in inputs.items()], ["y"])
    node.domain = "com.microsoft"
    node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
    given = inputs[fed]
    assert given is not None
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(fed, helper.np_dtype_to_tensor_dtype(given.dtype), given.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(a, name) for name, a in inputs.items() if a is not None and name != fed],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    output: Floats = session.run(None, {fed: given})[0]
    return output


def product(x: Floats, weight: QuantizedWeight, accuracy_level: int = 0) -> Floats:
    """`x @ weight.T` by ONNX Runtime."""
    outputs, inputs = weight.shape
    return run_operator(
        "MatMulNBits",
        {"x": x, "data": weight.data, "scales": weight.scales, "zero_points": weight.zero_points},
        "x",
        K=inputs,
        N=outputs,
        bits=weight.bits,
        block_size=weight.block_size,
        accuracy_level=accuracy_level,
    )
