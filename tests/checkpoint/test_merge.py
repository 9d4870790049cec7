"""A model with its adapter as one: a view, and a directory that was proven."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import visualglm
from tests.adapters import MODULES, spoil_tensors, write_random_adapter
from visualglm.checkpoint import merge as merging
from visualglm.checkpoint.adapter_dir import open_adapter
from visualglm.checkpoint.convert import convert
from visualglm.checkpoint.merge import merge, merged
from visualglm.checkpoint.model_dir import open_model_directory, verify
from visualglm.checkpoint.tensors import as_float32
from visualglm.errors import CheckpointError

TRAINED = "qformer.query_tokens"


@pytest.fixture
def adapter(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return write_random_adapter(tmp_path / "adapter", tiny_model_dir, trained=(TRAINED,)).path


def test_a_view_adds_up_what_is_read(adapter: Path, tiny_model_dir: Path):
    base, opened = open_model_directory(tiny_model_dir), open_adapter(adapter)
    view = merged(base, opened)
    assert view.config == base.config and view.path == base.path
    assert len({view.fingerprint, base.fingerprint, opened.fingerprint}) == 3
    assert merged(base, open_adapter(adapter)).fingerprint == view.fingerprint
    assert list(view.tensors) == list(base.tensors)
    for name, tensor in view.tensors.items():
        expected = base.tensors[name].array()
        module = name.removesuffix(".weight")
        if module in opened.lora:
            pair = opened.lora[module]
            expected = (expected + 2.0 * (pair.b.array().astype(np.float64) @ pair.a.array())).astype(np.float32)
        elif name == TRAINED:
            expected = opened.trained[name].array()
        assert np.array_equal(tensor.array(), expected) and tensor.array().dtype == expected.dtype
        assert b"".join(bytes(piece) for piece in tensor.pieces()) == tensor.array().tobytes()
        assert tensor.dtype == ("float32" if module in opened.lora or name == TRAINED else "float16")


def test_rows_are_added_up_a_few_at_a_time(adapter: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch):
    base, opened = open_model_directory(tiny_model_dir), open_adapter(adapter)
    whole = merged(base, opened).tensors["text.layers.0.attention.qkv.weight"].array()
    monkeypatch.setattr("visualglm.checkpoint.tensors._BLOCK_ELEMENTS", 7 * 32)
    tensor = merged(base, opened).tensors["text.layers.0.attention.qkv.weight"]
    assert len(list(tensor.pieces())) == 14
    assert np.array_equal(tensor.array(), whole)
    assert b"".join(bytes(piece) for piece in tensor.pieces()) == whole.tobytes()
    by_head = tensor.regrouped((3, 4, 8), (1, 0, 2)).array()
    assert np.array_equal(by_head, whole.reshape(3, 4, 8, 32).transpose(1, 0, 2, 3).reshape(96, 32))


@pytest.mark.parametrize(
    ("dtype", "stored", "limit"),
    [
        ("float32", "float32", 2e-7),
        ("float16", "float16", 1e-3),
        ("bfloat16", "bfloat16", 1e-2),
        (None, "float16", 1e-3),
    ],
)
def test_what_is_written_is_proven(
    dtype: str, stored: str, limit: float, adapter: Path, tiny_model_dir: Path, tmp_path: Path
):
    base, opened = open_model_directory(tiny_model_dir), open_adapter(adapter)
    done = merge(base, opened, tmp_path / "out", dtype=dtype)  # type: ignore[arg-type]
    assert [deviation.module for deviation in done.deviations] == list(MODULES)
    assert 0 < max(deviation.relative for deviation in done.deviations) < limit
    verify(tmp_path / "out")
    view = merged(base, opened)
    for name, tensor in open_model_directory(tmp_path / "out").tensors.items():
        changed = name == TRAINED or name.removesuffix(".weight") in MODULES
        assert tensor.dtype == (stored if changed else "float16")
        written, wanted = (as_float32(each.array(), each.dtype) for each in (tensor, view.tensors[name]))
        assert np.allclose(written, wanted, rtol=limit, atol=limit if changed else 0)
    assert done.output.tokenizer_path and done.output.checkpoint.license_text == "Free to use.\n"
    facts = json.loads((tmp_path / "out" / "manifest.json").read_text())["source"]
    assert facts["format"] == "random"
    assert facts["merged"] == [{"base": base.fingerprint, "adapter": opened.fingerprint, "adapter_name": "adapter"}]


def test_merged_twice_is_told(adapter: Path, tiny_model_dir: Path, tmp_path: Path):
    once = merge(open_model_directory(tiny_model_dir), open_adapter(adapter), tmp_path / "once").output
    other = write_random_adapter(tmp_path / "other", once.path, seed=5)
    twice = merge(once, other, tmp_path / "twice").output
    assert [each["adapter_name"] for each in twice.manifest.source.model_dump()["merged"]] == ["adapter", "other"]


def test_a_merged_model_goes_back_into_its_format(model_dir: Path, tmp_path: Path):
    adapter = write_random_adapter(tmp_path / "adapter", model_dir)
    merge(open_model_directory(model_dir), adapter, tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "hf", to="hf")
    convert(tmp_path / "hf", tmp_path / "again")
    first, again = (open_model_directory(tmp_path / name) for name in ("out", "again"))
    assert all(np.array_equal(first.tensors[name].array(), again.tensors[name].array()) for name in first.tensors)


def test_nothing_is_left_of_a_merge_that_fails(
    adapter: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    entries: Callable[[Path], list[str]],
):
    base, opened = open_model_directory(tiny_model_dir), open_adapter(adapter)
    monkeypatch.setattr(merging, "_merged_tensor", lambda name, weight, pair, dtype: weight)
    with pytest.raises(CheckpointError, match="as it was written is not the sum of base and adapter"):
        merge(base, opened, tmp_path / "out")
    assert entries(tmp_path) == ["adapter"]


def test_what_cannot_be_merged(adapter: Path, tiny_model_dir: Path, tmp_path: Path):
    base = open_model_directory(tiny_model_dir)
    prefixed = write_random_adapter(tmp_path / "prefixed", tiny_model_dir, prefix_length=2)
    with pytest.raises(CheckpointError, match=r"has learned prefixes .* use it with --adapter and --backend torch"):
        merge(base, prefixed, tmp_path / "out")
    other = merge(base, open_adapter(adapter), tmp_path / "other").output
    with pytest.raises(CheckpointError, match="belongs to the model tiny"):
        merge(other, open_adapter(adapter), tmp_path / "out")
    with pytest.raises(CheckpointError, match="which is to be merged; give another folder"):
        merge(base, open_adapter(adapter), tmp_path, force=True)
    large = np.full((3, 32), 3e4, np.float32)
    spoil_tensors(adapter, base_model__model__text__layers__0__attention__qkv__lora_A__weight=large)
    with pytest.raises(CheckpointError, match=r"qkv.weight has values too large for float16; give --dtype float32"):
        merge(base, open_adapter(adapter), tmp_path / "out", dtype="float16")
    spoil_tensors(adapter, base_model__model__text__layers__0__attention__qkv__lora_A__weight=large * np.nan)
    with pytest.raises(CheckpointError, match="not finite numbers"):
        merge(base, open_adapter(adapter), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_merged_gives_the_answers_of_the_adapter(adapter: Path, tiny_model_dir: Path, tmp_path: Path):
    merge(open_model_directory(tiny_model_dir), open_adapter(adapter), tmp_path / "out")
    image = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    for backend in ("torch", "onnx"):
        alone = visualglm.load(tmp_path / "out", backend=backend, device="cpu")
        beside = visualglm.load(tiny_model_dir, backend=backend, device="cpu", adapter=adapter)
        plain = visualglm.load(tiny_model_dir, backend=backend, device="cpu")
        answers = [model.ask(image, "图里有什么？", max_new_tokens=8) for model in (alone, beside, plain)]
        assert answers[0] == answers[1] != answers[2]
