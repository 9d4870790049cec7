"""What a graph says about data outside of it, compared with what the `onnx` package finds there."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from google.protobuf.message import DecodeError, Message
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto

from visualglm.checkpoint.onnx_file import (
    ENTRY_KEY,
    ENTRY_VALUE,
    EXTERNAL_DATA,
    HOLDERS,
    ExternalData,
    check_external_data,
    external_data,
)
from visualglm.errors import CheckpointError

GRAPH = Path("folder/decoder.onnx")
DATA = "decoder.onnx.data"


def outside(location: object = DATA, offset: object = 0, length: object = 16, **more: object) -> TensorProto:
    """A tensor whose bytes lie outside of its graph."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": offset, "length": length, **more}.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return tensor


def model_with(tensor: TensorProto) -> ModelProto:
    """A model that ONNX Runtime would run."""
    output = onnx.helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["w"], ["y"])], "g", [], [output], [tensor])
    return onnx.helper.make_model(graph)


def check(model: ModelProto, data_bytes: int | None = 64) -> None:
    check_external_data(GRAPH, model.SerializeToString(), data_bytes)


def message(number: int, content: bytes) -> bytes:
    length, size = bytearray(), len(content)
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([number << 3 | 2, *length, size]) + content


def tensors_of(message: Message) -> Iterator[TensorProto]:
    """Every tensor in a message of the `onnx` package, found through what that knows of the format."""
    if isinstance(message, TensorProto):
        yield message
    for field, value in message.ListFields():
        if field.message_type:
            for inner in [value] if isinstance(value, Message) else value:
                yield from tensors_of(inner)


def test_the_table_is_that_of_the_format() -> None:
    kinds: dict[str, Any] = {}

    def collect(kind: Any) -> None:
        if kind.name not in kinds:
            kinds[kind.name] = kind
            for field in kind.fields:
                if field.message_type:
                    collect(field.message_type)

    collect(ModelProto.DESCRIPTOR)
    holders: dict[str, dict[int, str]] = {"TensorProto": {}}
    for _ in kinds:
        holders |= {
            name: {each.number: each.message_type.name for each in inner}
            for name, kind in kinds.items()
            if (inner := [each for each in kind.fields if each.message_type and each.message_type.name in holders])
        }
    del holders["TensorProto"]
    assert holders == HOLDERS
    assert TensorProto.DESCRIPTOR.fields_by_name["external_data"].number == EXTERNAL_DATA
    entry = onnx.StringStringEntryProto.DESCRIPTOR.fields_by_name
    assert (entry["key"].number, entry["value"].number) == (ENTRY_KEY, ENTRY_VALUE)


def attributes_with(tensor: TensorProto) -> Iterator[AttributeProto]:
    sparse = [SparseTensorProto(values=tensor), SparseTensorProto(indices=tensor)]
    graph = GraphProto(initializer=[TensorProto(), tensor])
    yield AttributeProto(t=tensor)
    yield AttributeProto(tensors=[TensorProto(), tensor])
    yield AttributeProto(g=graph)
    yield AttributeProto(graphs=[graph])
    yield from (AttributeProto(sparse_tensor=each) for each in sparse)
    yield AttributeProto(sparse_tensors=sparse)


def graphs_with(tensor: TensorProto) -> Iterator[GraphProto]:
    yield GraphProto(initializer=[tensor])
    yield GraphProto(sparse_initializer=[SparseTensorProto(values=tensor)])
    yield from (GraphProto(node=[NodeProto(attribute=[attribute])]) for attribute in attributes_with(tensor))


def models_with(tensor: TensorProto) -> Iterator[ModelProto]:
    """Models that hold a tensor at each place that the format has for one."""
    for graph in graphs_with(tensor):
        yield ModelProto(graph=graph)
        yield ModelProto(graph=GraphProto(node=[NodeProto(attribute=[AttributeProto(g=graph)])]))
        yield ModelProto(training_info=[onnx.TrainingInfoProto(initialization=graph)])
        yield ModelProto(training_info=[onnx.TrainingInfoProto(algorithm=graph)])
    for attribute in attributes_with(tensor):
        yield ModelProto(functions=[FunctionProto(attribute_proto=[attribute])])
        yield ModelProto(functions=[FunctionProto(node=[NodeProto(attribute=[attribute])])])


def test_tensors_are_found_wherever_they_are() -> None:
    good, bad = outside(offset=48), outside("/etc/passwd")
    models = list(zip(models_with(good), models_with(bad), strict=True))
    assert len(models) == 50
    for harmless, hostile in models:
        found = list(external_data(harmless.SerializeToString()))
        assert found and set(found) == {ExternalData(DATA, 48, 16)}
        assert len(found) == sum(bool(tensor.external_data) for tensor in tensors_of(harmless))
        check(harmless)
        with pytest.raises(CheckpointError, match="asks for weights in /etc/passwd"):
            check(hostile)


@pytest.mark.parametrize(
    "second", [outside("../x"), outside(location=None, offset=None, length=64)], ids=["file", "end"]
)
def test_a_tensor_given_twice(second: TensorProto) -> None:
    """Protobuf merges the two, and each has to be right by itself."""
    attribute = b"".join(AttributeProto(t=tensor).SerializeToString() for tensor in (outside(offset=48), second))
    content = message(7, message(1, message(5, attribute)))
    assert len(ModelProto.FromString(content).graph.node[0].attribute[0].t.external_data) > 3
    with pytest.raises(CheckpointError):
        check_external_data(GRAPH, content, 64)


def test_weights_inside() -> None:
    check(model_with(onnx.helper.make_tensor("w", TensorProto.FLOAT, [4], [0.0] * 4)), None)


@pytest.mark.parametrize(
    "location",
    [
        "../decoder.onnx.data", "./decoder.onnx.data", "/etc/passwd", "/decoder.onnx.data", "a/../decoder.onnx.data",
        "C:\\decoder.onnx.data", "decoder.onnx.data/", "DECODER.onnx.data", "decoder.onnx.data ", "decoder.onnx.data\0",
        "decoder.onnx", "embed_tokens.onnx.data", "manifest.json", "*/_ORT_MEM_ADDR_/*", "file:///etc/passwd",
        "decoder.onnx.dat\u0430", "\x1b[2J" * 100,
    ],
)  # fmt: skip
def test_other_files(location: str) -> None:
    words = r"decoder\.onnx asks for weights in .*, and may only in decoder\.onnx\.data; do not use it\.$"
    with pytest.raises(CheckpointError, match=words) as caught:
        check(model_with(outside(location)))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


@pytest.mark.parametrize(("offset", "length"), [(0, 65), (64, 1), (49, 16), (10**17, 16), (0, 10**17)])
def test_beyond_the_end(offset: int, length: int) -> None:
    with pytest.raises(CheckpointError, match=r"beyond the end of decoder\.onnx\.data; export the model again"):
        check(model_with(outside(offset=offset, length=length)))


def test_the_whole_data_file() -> None:
    check(model_with(outside(length=64)))
    with pytest.raises(CheckpointError, match=r"has its weights in decoder\.onnx\.data, which is not listed"):
        check(model_with(outside()), None)


@pytest.mark.parametrize(
    "place",
    [
        {"offset": -1}, {"offset": "0x10"}, {"offset": ""}, {"offset": "١"}, {"offset": "1e3"}, {"offset": 2**64},
        {"length": -16}, {"length": 0}, {"length": ""}, {"length": " 16"}, {"length": "9" * 5000}, {"length": None},
        {"location": None}, {"location": ""}, {"location": "x" * 1000}, {"offset": None},
        {"LOCATION": DATA}, {"prepacked_0": "w|0|64"},
    ],
    ids=str,
)  # fmt: skip
def test_places_that_are_none(place: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"is no ONNX graph that can be used \(the \w+ of a tensor .*\); export"):
        check(model_with(outside(**place)))


def test_a_place_given_twice() -> None:
    tensor = outside()
    tensor.external_data.add(key="location", value=DATA)
    with pytest.raises(CheckpointError, match="not told as one location"):
        check(model_with(tensor))


def test_graphs_that_would_keep_the_machine_busy() -> None:
    nested = b""
    for _ in range(1000):
        nested = message(1, message(5, message(6, nested)))
    for model, words in (
        (message(7, nested), "nested more than 100 deep"),
        (message(7, b"\x10\x01" * 10**6), "more than 200,000 fields"),
        (message(7, message(5, b"") * 10**6), "more than 200,000 fields"),
        (message(7, message(5, message(13, b"") * 10**6)), "not told as one location"),
    ):
        with pytest.raises(CheckpointError, match=rf"is no ONNX graph that can be used \(.*{words}"):
            check_external_data(GRAPH, model, 64)


def agree(content: bytes) -> bool:
    """Whether a graph is refused, or holds what the `onnx` package finds in it."""
    try:
        found = list(external_data(content))
        check_external_data(GRAPH, content, 64)
    except (ValueError, CheckpointError):
        return True
    try:
        tensors = [tensor for tensor in tensors_of(ModelProto.FromString(content)) if tensor.external_data]
    except DecodeError:
        return True
    # Of a tensor given twice the last half counts, and both were looked at.
    places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in tensors]
    return {ExternalData(each["location"], int(each["offset"]), int(each["length"])) for each in places} <= set(found)


def test_graphs_that_are_cut_short() -> None:
    content = next(models_with(outside())).SerializeToString() + model_with(outside()).SerializeToString()
    refused = 0
    for end in range(len(content)):
        assert agree(content[:end])
        try:
            check_external_data(GRAPH, content[:end], 64)
        except CheckpointError as error:
            assert "export the model again" in str(error)
            refused += 1
    assert refused > len(content) * 0.9


def test_graphs_with_random_faults() -> None:
    chance = random.Random(0)
    models = [model.SerializeToString() for model in models_with(outside())]
    for _ in range(5000):
        content = bytearray(chance.choice(models))
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(len(content))
            fault = chance.randrange(4)
            if fault == 0:
                content[place] = chance.randrange(256)
            elif fault == 1:
                content[place] ^= 1 << chance.randrange(8)
            elif fault == 2:
                del content[place : place + chance.randint(1, 3)]
                content = content or bytearray(1)
            else:
                content[place:place] = chance.randbytes(chance.randint(1, 3))
        assert agree(bytes(content)), bytes(content)
