"""The adapter directory: what is written is read, and what is wrong with one is told in a sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.adapters import MODULES, random_pairs, spoil_config, spoil_tensors, write_random_adapter
from tests.cli.program import change_config
from visualglm.checkpoint.adapter_dir import (
    AdapterDirectory,
    open_adapter,
    require_base,
    require_finite,
    write_adapter,
)
from visualglm.checkpoint.instead import is_adapter
from visualglm.checkpoint.manifest import Source
from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.checkpoint.peft_config import peft_values, read_lora_settings
from visualglm.errors import CheckpointError
from visualglm.parameters import prefix_name

QKV_A = "base_model__model__text__layers__0__attention__qkv__lora_A__weight"
EMBEDDINGS = {
    f"base_model__model__text__word_embeddings__lora_{part}__weight": np.zeros(shape, np.float32)
    for part, shape in (("A", (3, 32)), ("B", (600, 3)))
}


@pytest.fixture
def adapter(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """An adapter with everything, to be spoilt."""
    trained = ("qformer.query_tokens", "vision.layers.0.mlp.fc1.bias")
    return write_random_adapter(tmp_path / "adapter", tiny_model_dir, trained=trained, prefix_length=2).path


def test_what_is_written_is_read(adapter: Path, tiny_model_dir: Path):
    base, opened = open_model_directory(tiny_model_dir), open_adapter(adapter)
    pairs = random_pairs(base, MODULES, 3, 0)
    assert {name: (pair.rank, pair.scale) for name, pair in opened.lora.items()} == dict.fromkeys(MODULES, (3, 2.0))
    for module, pair in opened.lora.items():
        for part, tensor in (("A", pair.a), ("B", pair.b)):
            assert np.array_equal(tensor.array(), pairs[f"base_model.model.{module}.lora_{part}.weight"])
    assert {name: tensor.shape for name, tensor in opened.trained.items()} == {
        "qformer.query_tokens": (4, 24),
        "vision.layers.0.mlp.fc1.bias": (48,),
    }
    assert {name: tensor.shape for name, tensor in opened.prefix.items()} == {
        prefix_name(layer): (2, 4, 2, 8) for layer in range(2)
    }
    assert opened.manifest and opened.manifest.base_fingerprint == base.fingerprint
    assert (opened.manifest.base_name, opened.knows_base, opened.warning) == ("tiny", True, None)
    assert (
        opened.manifest.parameter_count
        == opened.parameter_count
        == sum(t.array().size for t in opened.tensors.values())
    )
    require_base(opened, base)
    require_finite(opened)


def test_fingerprints_tell_adapters_apart(tiny_model_dir: Path, tmp_path: Path):
    first, same, other = (
        write_random_adapter(tmp_path / name, tiny_model_dir, seed=seed).fingerprint
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == same != other
    spoil_config(tmp_path / "b", lora_alpha=7.0)
    assert open_adapter(tmp_path / "b").fingerprint != first


def test_an_adapter_appears_whole_or_not_at_all(
    tiny_model_dir: Path, tmp_path: Path, entries: Callable[[Path], list[str]]
):
    base = open_model_directory(tiny_model_dir)
    lora = random_pairs(base, MODULES, 3, 0)
    values = peft_values(dict.fromkeys(MODULES, 3), rank=3, alpha=1.0)
    write: dict[str, Any] = {"base": base, "lora_settings": values, "source": Source(format="random")}
    not_finite = lora | {QKV_A.replace("__", "."): np.full((3, 32), np.nan, np.float32)}
    for faulty, message in (
        ({"lora": not_finite}, r"text.layers.0.attention.qkv.lora_A of the adapter .* not finite"),
        ({"lora": lora | {"x": lora[QKV_A.replace("__", ".")]}}, "x is no part of a LoRA pair"),
        ({"lora": {}, "trained": {"vision.nothing": np.zeros(3, np.float32)}}, "has no parameter vision.nothing"),
        ({"lora": {}, "trained": {"text.norm.bias": np.zeros(32)}}, "text.norm.bias of the adapter is float64"),
        ({"lora": {}}, "would hold nothing"),
    ):
        with pytest.raises(CheckpointError, match=message):
            write_adapter(tmp_path / "new", **write | faulty)
        assert entries(tmp_path) == []
    write_adapter(tmp_path / "new", **write, lora=lora)
    with pytest.raises(CheckpointError, match="is not empty; give another folder, or --force"):
        write_adapter(tmp_path / "new", **write, lora=lora)
    write_adapter(tmp_path / "new", **write, lora=lora, force=True)
    (tmp_path / "new" / "mine.txt").touch()
    with pytest.raises(CheckpointError, match=r"holds mine.txt, which is no part of the adapter"):
        write_adapter(tmp_path / "new", **write, lora=lora, force=True)


def test_another_base_is_refused_by_name(adapter: Path, write_other: Callable[..., Path]):
    other = open_model_directory(write_other())
    with pytest.raises(
        CheckpointError, match=r"belongs to the model tiny \(fingerprint .*, and .*/other is another one"
    ):
        require_base(open_adapter(adapter), other)


@pytest.fixture
def write_other(tiny_model_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """The tiny model with another configuration of no effect, and so another fingerprint."""

    def write() -> Path:
        shutil.copytree(tiny_model_dir, tmp_path / "other")
        change_config(tmp_path / "other", "text", layer_norm_eps=2e-5)
        return tmp_path / "other"

    return write


def test_without_a_manifest_shapes_decide(adapter: Path, tiny_model_dir: Path, builtin_model_dir: Path):
    for name in ("manifest.json", "trained.safetensors", "prefix.safetensors"):
        (adapter / name).unlink()
    assert is_adapter(adapter)
    opened = open_adapter(adapter)
    assert not opened.knows_base and opened.warning and "does not say which model it belongs to" in opened.warning
    require_base(opened, open_model_directory(tiny_model_dir))
    with pytest.raises(CheckpointError, match=r"does not fit the model .* is for \[96, 32\], and its weight is"):
        require_base(opened, open_model_directory(builtin_model_dir))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 4}, r"lora_A of text.layers.0.attention.qkv is \[3, 32\] and not of rank 4"),
        ({"r": 0}, "r is 0, but must be at least 1"),
        ({"r": "3"}, "r is '3', but must be a whole number"),
        ({"r": True}, "r is true, but must be a whole number"),
        ({"r": 10**30}, "r is .*, but must be at most 262,144"),
        ({"r": None}, "r is none, but must be a whole number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, but must be a finite number"),
        ({"lora_alpha": 1e30}, "lora_alpha is 1e.30, but must be at most 1,000,000"),
        ({"lora_alpha": "128"}, "lora_alpha is '128', but must be a number"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes', but must be true or false"),
        (
            {"r": 4},
            r"says: lora_A of .*, lora_B of .*, lora_A of text.layers.1.attention.proj .* of rank 4 and 3 more\.$",
        ),
        ({"target_modules": ["qkv", "proj"]}, "target_modules does not name text.layers.1.mlp.fc1, of which there are"),
        ({"target_modules": "qkv"}, r"does not name text.layers.1.attention.proj, text.layers.1.mlp.fc1, of which"),
        (
            {"target_modules": ["qkv", "proj", "fc1", "text.layers.9.mlp.fc1"]},
            "there are no weights of text.layers.9.mlp.fc1, which target_modules names",
        ),
        ({"target_modules": "(a+)+$"}, r"by the expression '\(a\+\)\+\$'; name each module in its target_modules"),
        ({"target_modules": [3]}, r"target_modules \(entry 1\) is 3, but must be text"),
        ({"target_modules": {"qkv": 1}}, "target_modules is .*, but must be a list"),
        ({"rank_pattern": {"text.layers.0.attention.qkv": 5}}, "qkv is .* and not of rank 5"),
        ({"rank_pattern": {".*": 3}}, r"names modules by the expression '\.\*'"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "names modules by the expression"),
        ({"rank_pattern": [1]}, "rank_pattern is .*, but must be a table"),
        ({"peft_type": "IA3"}, "has peft_type 'IA3', which is not supported; give an adapter of plain LoRA"),
        ({"use_dora": True}, "has use_dora True, which is not supported"),
        ({"bias": "all"}, "has bias 'all', which is not supported"),
        ({"modules_to_save": ["text.lm_head"]}, "has modules_to_save"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights 'pissa'"),
        ({"init_lora_weights": ["pissa"]}, "has init_lora_weights"),
    ],
)
def test_a_configuration_that_is_not_valid_or_not_plain_lora(values: dict[str, object], message: str, adapter: Path):
    spoil_config(adapter, **values)
    with pytest.raises(CheckpointError, match=message):
        open_adapter(adapter)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({QKV_A: None}, "text.layers.0.attention.qkv lacks lora_A"),
        (
            {QKV_A: np.zeros((2, 32), np.float32)},
            r"lora_A of text.layers.0.attention.qkv is \[2, 32\] and not of rank 3",
        ),
        ({QKV_A: np.zeros(32, np.float32)}, r"is \[32\] and not of rank 3"),
        ({QKV_A: np.zeros((3, 32), np.int32)}, r"may hold arrays of float32, float16, bfloat16 only: .* is int32"),
        ({QKV_A: np.zeros((), np.float32)}, r"may hold arrays of .* is float32 \[\]"),
        ({"..__passwd": np.zeros((3, 32), np.float32)}, r"\.\.\.passwd is no part of a LoRA pair"),
        ({"a\x1b[31m": np.zeros(3, np.float32)}, r"'a.x1b\[31m is no part of a LoRA pair'"),
    ],
)
def test_tensors_that_are_not_what_the_configuration_says(tensors: dict[str, Any], message: str, adapter: Path):
    spoil_tensors(adapter, **tensors)
    with pytest.raises(CheckpointError, match=message):
        open_adapter(adapter)


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        ("adapter_model", {QKV_A: np.zeros((3, 5), np.float32)}, r"qkv is for \[96, 5\], and its weight is \[96, 32\]"),
        ("adapter_model", EMBEDDINGS, "the model has no linear layer text.word_embeddings."),
        (
            "trained",
            {"text__layers__9__norm": np.zeros(3, np.float32)},
            "the model has no parameter text.layers.9.norm",
        ),
        ("trained", {"qformer__query_tokens": np.zeros(3, np.float32)}, r"is \[3\] instead of \[4, 24\]"),
        ("trained", {"text__layers__0__attention__qkv__weight": np.zeros((96, 32), np.float32)}, "with a LoRA pair"),
        ("prefix", {"text__layers__1__attention__prefix": None}, "text.layers.1.attention.prefix is missing"),
        ("prefix", {"text__layers__2__attention__prefix": np.zeros(3, np.float32)}, "the model has no text.layers.2"),
        (
            "prefix",
            {"text__layers__1__attention__prefix": np.zeros(3, np.float32)},
            r"is \[3\] instead of \[2, 4, 2, 8\]",
        ),
    ],
)
def test_what_does_not_fit_the_model(
    name: str, tensors: dict[str, Any], message: str, adapter: Path, tiny_model_dir: Path
):
    spoil_tensors(adapter, f"{name}.safetensors", **tensors)
    spoil_config(adapter, target_modules=None)
    opened = open_adapter(adapter)
    with pytest.raises(CheckpointError, match=message):
        require_base(opened, open_model_directory(tiny_model_dir))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(value: float, adapter: Path):
    spoil_tensors(adapter, **{QKV_A: np.full((3, 32), value, np.float32)})
    with pytest.raises(
        CheckpointError, match=r"text.layers.0.attention.qkv.lora_A of the adapter .* not finite numbers"
    ):
        require_finite(open_adapter(adapter))


def test_files_that_are_missing_changed_or_of_another_time(adapter: Path, tiny_model_dir: Path, tmp_path: Path):
    def spoilt(name: str, spoil: Callable[[Path], None]) -> AdapterDirectory:
        shutil.copytree(adapter, tmp_path / name)
        spoil(tmp_path / name)
        return open_adapter(tmp_path / name)

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    def change(folder: Path, **values: object) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(manifest | values))

    with pytest.raises(CheckpointError, match=r"lacks adapter_model.safetensors; train or convert it again"):
        spoilt("a", lambda folder: (folder / "adapter_model.safetensors").unlink())
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors changed since it was written"):
        spoilt("b", lambda folder: flip(folder / "adapter_model.safetensors"))
    with pytest.raises(CheckpointError, match=r"prefix.safetensors has .* bytes instead of"):
        spoilt("c", lambda folder: (folder / "prefix.safetensors").write_bytes(b"x"))
    with pytest.raises(CheckpointError, match="has format version 2, and this program reads up to 1; install a newer"):
        spoilt("d", lambda folder: change(folder, format_version=2))
    with pytest.raises(CheckpointError, match="names a file outside its folder"):
        spoilt("e", lambda folder: change(folder, files={"../x": {"sha256": "0" * 64, "size": 1}}))
    with pytest.raises(CheckpointError, match="holds nothing"):
        spoilt("f", lambda folder: change(folder, files={}))
    with pytest.raises(CheckpointError, match="base_fingerprint is 'x', but must be"):
        spoilt("g", lambda folder: change(folder, base_fingerprint="x"))
    with pytest.raises(CheckpointError, match="is a model directory, and an adapter is needed"):
        open_adapter(tiny_model_dir)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"neither manifest.json nor adapter_config.json is there; give a folder"):
        open_adapter(tmp_path / "empty")
    with pytest.raises(CheckpointError, match=f"adapter_config.json is there; give {tmp_path / 'a'}.$"):
        open_adapter(tmp_path)
    with pytest.raises(CheckpointError, match=f"is a file; give the folder that it lies in, {adapter}.$"):
        open_adapter(adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="does not exist"):
        open_adapter(tmp_path / "nowhere")
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"empty has neither adapter_model.safetensors nor"):
        open_adapter(tmp_path / "empty")
    assert not is_adapter(tiny_model_dir) and not is_adapter(tmp_path) and is_adapter(adapter)


@pytest.mark.parametrize("targets", [["qkv", "proj", "fc1"], ["attention.qkv", "proj", "1.mlp.fc1", "fc1"], None])
def test_modules_are_named_by_their_ends(targets: list[str] | None, adapter: Path):
    spoil_config(adapter, target_modules=targets)
    assert set(open_adapter(adapter).lora) == set(MODULES)


def test_patterns_match_as_in_peft():
    values = peft_values({"text.layers.0.attention.qkv": 12, "text.layers.0.attention.proj": 4}, rank=4, alpha=1.0)
    settings = read_lora_settings(values, "here")
    assert settings.rank("text.layers.0.attention.qkv") == 12 and settings.rank("text.layers.0.attention.proj") == 4
    assert settings.scale("text.layers.0.attention.qkv") == settings.scale("text.layers.0.attention.proj") == 0.25
    settings = read_lora_settings({"r": 4, "lora_alpha": 8, "rank_pattern": {"qkv": 16}, "use_rslora": True}, "here")
    assert (settings.scale("a.qkv"), settings.scale("a.xqkv"), settings.scale("qkv")) == (2.0, 4.0, 2.0)
