"""LoRA that MindFormers trained, by the names of its library: one pair for each linear layer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from visualglm.checkpoint.adapter_dir import open_adapter
from visualglm.checkpoint.files import write_file
from visualglm.checkpoint.merge import merged
from visualglm.checkpoint.mindformers import mindformers_tensors
from visualglm.checkpoint.mindformers_lora import (
    convert_mindformers_adapter,
    holds_mindformers_adapter,
    told_alpha,
)
from visualglm.checkpoint.mindspore_ckpt import mindspore_pieces
from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.checkpoint.tensors import LazyTensor, Tensor
from visualglm.errors import CheckpointError

Arrays = dict[str, NDArray[Any]]
PREFIX = "llm_model.transformer.layers.{}.attention.{}.mindpet_delta_lora_{}"


def write(path: Path, arrays: Arrays, more: Mapping[str, Tensor] | None = None) -> Path:
    tensors: dict[str, Tensor] = {
        name: LazyTensor(array.dtype.name, array.shape, lambda array=array: array)  # type: ignore[misc]
        for name, array in arrays.items()
    }
    path.unlink(missing_ok=True)
    write_file(path, mindspore_pieces(tensors | dict(more or {})))
    return path


def pairs(width: int, layer: int = 0, prefix: str = PREFIX, parts: str = "ab", rank: int = 2) -> Arrays:
    random = np.random.default_rng(3)
    a, b = parts
    made: Arrays = {}
    for linear, outputs in (("query_key_value", 3 * width), ("dense", width)):
        made[prefix.format(layer, linear, a)] = random.normal(size=(rank, width)).astype(np.float32)
        made[prefix.format(layer, linear, b)] = random.normal(size=(outputs, rank)).astype(np.float32)
    return made


def width(model_dir: Path) -> int:
    return open_model_directory(model_dir).config.text.hidden_size


@pytest.mark.parametrize(
    ("prefix", "parts"),
    [
        (PREFIX, "ab"),
        (PREFIX, "AB"),
        (PREFIX.removeprefix("llm_model."), "ab"),
        (PREFIX.replace("mindpet", "tk"), "AB"),
    ],
)
def test_pairs_are_taken_as_they_are(prefix: str, parts: str, model_dir: Path, tmp_path: Path) -> None:
    base, found = open_model_directory(model_dir), pairs(width(model_dir), 1, prefix, parts)
    source = write(tmp_path / "rank_0.ckpt", found | {"epoch_num": np.array(1), "loss_scale": np.ones(1, np.float32)})
    assert holds_mindformers_adapter(source)
    adapter = convert_mindformers_adapter(source, tmp_path / "adapter", base=base)
    assert adapter.manifest and adapter.manifest.base_fingerprint == base.fingerprint
    assert adapter.manifest.source.format == "mindformers"
    for linear, ours in (("query_key_value", "qkv"), ("dense", "proj")):
        pair = adapter.lora[f"text.layers.1.attention.{ours}"]
        np.testing.assert_array_equal(pair.a.array(), found[prefix.format(1, linear, parts[0])])
        np.testing.assert_array_equal(pair.b.array(), found[prefix.format(1, linear, parts[1])])
        assert pair.scale == 128 / 2
    assert told_alpha(source) is None


def test_the_recipe_beside_them_tells_the_scale(model_dir: Path, tmp_path: Path) -> None:
    recipe = {"model": {"model_config": {"text_config": {"pet_config": {"lora_alpha": 6, "lora_rank": 2}}}}}
    (tmp_path / "run_visualglm_lora.yaml").write_text(json.dumps(recipe))
    source = write(tmp_path / "rank_0.ckpt", pairs(width(model_dir)))
    adapter = convert_mindformers_adapter(source, tmp_path / "adapter", base=open_model_directory(model_dir))
    assert {pair.scale for pair in adapter.lora.values()} == {3.0}
    recipe["model"]["model_config"]["text_config"]["pet_config"] = {"lora_alpha": "much"}  # type: ignore[dict-item]
    (tmp_path / "run_visualglm_lora.yaml").write_text(json.dumps(recipe))
    with pytest.raises(CheckpointError, match="has the lora_alpha 'much'; give it a number"):
        convert_mindformers_adapter(source, tmp_path / "other")
    recipe["model"]["model_config"]["text_config"]["pet_config"] = {"lora_rank": 10}  # type: ignore[dict-item]
    (tmp_path / "run_visualglm_lora.yaml").write_text(json.dumps(recipe))
    with pytest.raises(CheckpointError, match="have LoRA of the ranks 2, 10"):
        convert_mindformers_adapter(source, tmp_path / "other")


def test_merged_is_what_the_library_computes(model_dir: Path, tmp_path: Path) -> None:
    """There the outputs of `x @ a.T @ b.T` are multiplied with alpha / rank."""
    base, found = open_model_directory(model_dir), pairs(width(model_dir))
    adapter = convert_mindformers_adapter(write(tmp_path / "a.ckpt", found), tmp_path / "adapter", base=base)
    name = "text.layers.0.attention.qkv.weight"
    weight = base.tensors[name].array().astype(np.float64)
    a, b = (found[PREFIX.format(0, "query_key_value", part)].astype(np.float64) for part in "ab")
    result = merged(base, adapter).tensors[name].array()
    np.testing.assert_allclose(result, weight + 128 / 2 * b @ a, rtol=1e-5, atol=1e-4)


def test_a_copy_of_the_base_must_be_the_base(model_dir: Path, tmp_path: Path) -> None:
    base = open_model_directory(model_dir)
    files = mindformers_tensors(base.checkpoint)
    copy: dict[str, Tensor] = {f"llm_model.{name}": tensor for name, tensor in files["glm_6b.ckpt"].items()}
    copy |= files["visualglm_vit.ckpt"] | files["visualglm_qformer.ckpt"]
    source = write(tmp_path / "a.ckpt", pairs(width(model_dir)), copy)
    convert_mindformers_adapter(source, tmp_path / "adapter", base=base)
    head = files["glm_6b.ckpt"]["lm_head.weight"]
    other = LazyTensor(head.dtype, head.shape, lambda: head.array() + np.float16(1))
    write(source, pairs(width(model_dir)), copy | {"llm_model.lm_head.weight": other})
    with pytest.raises(CheckpointError, match=r"made from another model than .*: lm_head.weight differs"):
        convert_mindformers_adapter(source, tmp_path / "other", base=base)
    write(source, pairs(width(model_dir)), {"adam_m.x": head})
    with pytest.raises(CheckpointError, match=r"holds tensors that .* does not have: adam_m.x"):
        convert_mindformers_adapter(source, tmp_path / "other", base=base)


def without(arrays: Arrays, name: str) -> Arrays:
    return {key: array for key, array in arrays.items() if key != name}


A, B = (PREFIX.format(0, "dense", part) for part in "ab")
SPOILT = {
    "half a pair": (lambda made: without(made, A), "lacks matrices of text.layers.0.attention.proj"),
    "another layer": (
        lambda made: made | {A.replace("attention.dense", "mlp.dense_h_to_4h"): made[A]},
        "adapts layers other than the attention of the text part",
    ),
    "no matrix": (lambda made: made | {A: made[A][0]}, r"as float32 \[\d+\], and a matrix of"),
    "whole numbers": (lambda made: made | {A: made[A].astype(np.int8)}, r"as int8 \[2, \d+\], and a matrix of"),
    "two ranks": (lambda made: made | {A: made[A][:1], B: made[B][:, :1]}, "have LoRA of the ranks 1, 2"),
    "of another width": (lambda made: made | {A: made[A][:, 1:]}, "does not fit the model"),
    "not finite": (lambda made: made | {A: made[A] * np.inf}, "not finite numbers"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_spoilt_files_are_one_sentence(case: str, model_dir: Path, tmp_path: Path) -> None:
    edit, message = SPOILT[case]
    source = write(tmp_path / "a.ckpt", edit(pairs(width(model_dir))))
    with pytest.raises(CheckpointError, match=message) as caught:
        convert_mindformers_adapter(source, tmp_path / "adapter", base=open_model_directory(model_dir))
    assert "\n" not in str(caught.value) and not (tmp_path / "adapter").exists()


def test_without_a_base_it_does_not_know_where_it_belongs(model_dir: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.ckpt", pairs(width(model_dir)))
    convert_mindformers_adapter(source, tmp_path / "adapter")
    assert not open_adapter(tmp_path / "adapter").knows_base


def test_other_files_hold_none(model_dir: Path, tmp_path: Path) -> None:
    assert not holds_mindformers_adapter(model_dir)
    assert not holds_mindformers_adapter(tmp_path / "missing.ckpt")
    assert not holds_mindformers_adapter(write(tmp_path / "a.ckpt", {"x": np.ones(3, np.float32)}))
