"""An ONNX graph under construction: nodes by name, and weights that go straight to the graph's data file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike, NDArray
from onnx import TensorProto, helper

OPSET = 23
IR_VERSION = 11
CONTRIB = "com.microsoft"
CONTRIB_OPSET = 1

Shape = Sequence[int | str]
"""Sizes, and names of those that are only known when the graph is run."""

# Where a weight may start in the data file: runtimes map whole pages.
_ALIGNMENT = 4096


class OnnxGraph:
    """Nodes, inputs and outputs in the order they are added; weights are written to `data_path` as they come.

    Values are referred to by their names. `float_type` is the type that the graph computes in.
    """

    def __init__(self, name: str, data_path: Path, float_type: int, written: Callable[[int], None]) -> None:
        self.name = name
        self.float_type = float_type
        self._data_path = data_path
        self._file = open(data_path, "xb")  # noqa: SIM115
        self._written = written
        self._nodes: list[onnx.NodeProto] = []
        self._count = 0
        self._initializers: list[onnx.TensorProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, dtype: int, shape: Shape) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, value: str, dtype: int, shape: Shape) -> None:
        """Let `value` be seen from outside as `name`."""
        self._outputs.append(helper.make_tensor_value_info(name, dtype, shape))
        self._nodes.append(helper.make_node("Identity", [value], [name]))

    def node(self, op: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output, whose name is returned; an empty name leaves an optional input out."""
        return self.nodes(op, *inputs, outputs=1, domain=domain, **attributes)[0]

    def nodes(self, op: str, *inputs: str, outputs: int, domain: str = "", **attributes: Any) -> list[str]:
        """As `node`, with several outputs."""
        stem = f"{op.lower()}_{self._count}"
        names = [stem] if outputs == 1 else [f"{stem}_{index}" for index in range(outputs)]
        self.add(op, inputs, names, domain=domain, **attributes)
        return names

    def add(
        self, op: str, inputs: Sequence[str], outputs: Sequence[str], *, domain: str = "", **attributes: Any
    ) -> None:
        """Add a node whose outputs have names of their own."""
        name = f"{op}_{self._count}"
        self._count += 1
        self._nodes.append(helper.make_node(op, inputs, outputs, name=name, domain=domain, **attributes))

    def declare_output(self, name: str, dtype: int, shape: Shape) -> None:
        """Let a value that bears its outer name already be seen from outside."""
        self._outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def choose(self, name: str, condition: str, then: Callable[[], str], otherwise: Callable[[], str]) -> None:
        """The value `name`, computed by one of two groups of nodes; only that one is run."""
        outer, branches = self._nodes, []
        for branch, compute in (("then_branch", then), ("else_branch", otherwise)):
            self._nodes = []
            value = helper.make_tensor_value_info(compute(), self.float_type, None)
            branches.append((branch, helper.make_graph(self._nodes, branch, [], [value])))
        self._nodes = outer
        self.add("If", [condition], [name], **dict(branches))

    def constant(self, name: str, values: ArrayLike) -> str:
        """A small tensor, kept in the graph itself; one that is known by that name already is used again."""
        if all(known.name != name for known in self._initializers):
            self._initializers.append(onnx.numpy_helper.from_array(np.asarray(values), name))
        return name

    def floats(self, name: str, values: ArrayLike) -> str:
        """As `constant`, in the type that the graph computes in."""
        kind = np.float16 if self.float_type == TensorProto.FLOAT16 else np.float32
        return self.constant(name, np.asarray(values, kind))

    def weight(self, name: str, dtype: int, shape: Sequence[int], pieces: Iterable[NDArray[Any]]) -> str:
        """A tensor of `shape` in the data file, given as arrays that follow one another."""
        start = self._file.tell() + -self._file.tell() % _ALIGNMENT
        self._file.seek(start)
        for piece in pieces:
            data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
            self._file.write(data)
            self._written(len(data))
        tensor = TensorProto(name=name, data_type=dtype, dims=shape, data_location=TensorProto.EXTERNAL)
        place = {"location": self._data_path.name, "offset": start, "length": self._file.tell() - start}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        self._initializers.append(tensor)
        return name

    def cast(self, value: str, dtype: int) -> str:
        return self.node("Cast", value, to=dtype)

    def save(self, path: Path, description: str) -> None:
        """Write the graph; raises `onnx.checker.ValidationError` if it is not valid."""
        self._file.close()
        graph = helper.make_graph(self._nodes, self.name, self._inputs, self._outputs, self._initializers)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, CONTRIB_OPSET)]
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="visualglm", doc_string=description
        )
        path.write_bytes(model.SerializeToString(deterministic=True))
        onnx.checker.check_model(str(path))

    def close(self) -> None:
        """Give the data file back; to be called whatever happened."""
        self._file.close()
