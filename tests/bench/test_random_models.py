"""The random models of the rivals: whole files in their formats, of the sizes of ours."""

import struct
from pathlib import Path

import pytest

from ggml_model import ggml_step_bytes, ggml_weights, write_ggml
from ggml_weights import RandomPieces, Weight
from gguf_model import gguf_step_bytes, gguf_weights, write_gguf
from visualglm.benchmark import step_bytes
from visualglm.random_model import PRESETS

FULL, TINY = PRESETS["full"], PRESETS["tiny"].text


def test_a_token_reads_the_weights_of_our_decoder():
    ours = step_bytes(FULL, columns=0, element_bytes=2)
    assert ours == 12_346_572_800
    assert ggml_step_bytes(FULL.text, "f16") == pytest.approx(ours, rel=1e-3)
    assert gguf_step_bytes(FULL.text, "q4_0") == pytest.approx(ours * 4.5 / 16, rel=2e-3)
    assert gguf_step_bytes(FULL.text, "q8_0") == pytest.approx(ours * 8.5 / 16, rel=1e-3)
    assert ggml_step_bytes(FULL.text, "q4_0") == gguf_step_bytes(FULL.text, "q4_0")


@pytest.mark.parametrize("kind", ["f16", "q4_0", "q8_0"])
def test_weights_are_as_long_as_they_say(tmp_path: Path, kind):
    pieces = RandomPieces()
    for weight in (Weight("a.weight", (1000, 64), kind), Weight("a.weight", (64,), "f32")):
        with (tmp_path / "data").open("wb") as file:
            weight.write(file, pieces)
        assert (tmp_path / "data").stat().st_size == weight.size


def test_the_file_for_chatglm_cpp_holds_all_tensors(tmp_path: Path):
    write_ggml(tmp_path / "model", TINY, "q4_0")
    data = (tmp_path / "model").read_bytes()
    assert struct.unpack_from("<4sii", data) == (b"ggml", 1, 2)
    assert struct.unpack_from("<7ififiii", data, 12)[:7] == (2, 1000, 64, 4, 4, 2, 256)
    (tokenizer,) = struct.unpack_from("<i", data, 64)
    position, found = 68 + tokenizer, []
    for weight in ggml_weights(TINY, "q4_0"):
        (length,) = struct.unpack_from("<i", data, position)
        found.append(data[position + 4 : position + 4 + length].decode())
        position += 4 + length
        dimensions, *shape = struct.unpack_from(f"<{1 + len(weight.shape)}i", data, position)
        assert (dimensions, tuple(shape)) == (len(weight.shape), weight.shape)
        position = -(-(position + 4 * (2 + dimensions)) // 16) * 16 + weight.size
    assert position == len(data) and len(found) == len(set(found)) == 1 + 2 * 12 + 2


def test_the_file_for_llama_cpp_holds_all_tensors(tmp_path: Path):
    write_gguf(tmp_path / "model", TINY, "q8_0")
    data = (tmp_path / "model").read_bytes()
    weights = gguf_weights(TINY, "q8_0")
    assert struct.unpack_from("<4sIQQ", data) == (b"GGUF", 3, len(weights), 12)
    last = weights[-1]
    info = data.rindex(last.name.encode()) + len(last.name)
    dimensions, inner, outer, code, offset = struct.unpack_from("<IQQIQ", data, info)
    assert (dimensions, inner, outer, code) == (2, 64, 1000, 8)
    start = -(-(info + 32) // 32) * 32
    assert start + offset + last.size == len(data) and offset % 32 == 0
