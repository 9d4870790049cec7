import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from visualglm.checkpoint import shards
from visualglm.checkpoint.contents import Checkpoint
from visualglm.checkpoint.manifest import Source
from visualglm.checkpoint.model_dir import open_model_directory, verify, write_model_directory
from visualglm.checkpoint.tensors import LazyTensor
from visualglm.config import QFormerConfig, TextConfig, VisionConfig, VisualGLMConfig
from visualglm.errors import CheckpointError, ConfigError
from visualglm.parameters import parameter_count, parameter_shapes

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
CONFIG = VisualGLMConfig(
    vision=VisionConfig(
        image_size=28, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    ),
    qformer=QFormerConfig(
        num_query_tokens=4,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        cross_attention_layers=(0,),
    ),
    text=TextConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_sequence_length=32,
        mask_token_id=60,
        gmask_token_id=61,
        bos_token_id=62,
        eos_token_id=63,
    ),
    dtype="bfloat16",
)


def checkpoint(config: VisualGLMConfig = CONFIG, **changes: Any) -> Checkpoint:
    random = np.random.default_rng(0)
    arrays = {
        name: random.integers(0, 1 << 16, shape).astype(np.uint16) for name, shape in parameter_shapes(config).items()
    }
    tensors = {name: LazyTensor("bfloat16", array.shape, partial(np.asarray, array)) for name, array in arrays.items()}
    return replace(Checkpoint(config, tensors, Source(format="test")), **changes)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_model_directory(tmp_path / "made", checkpoint(license_text="free")).path


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("shard_bytes", [1 << 30, 8192])
def test_what_is_written_is_read(shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_SHARD_BYTES", shard_bytes)
    written = checkpoint()
    made = write_model_directory(tmp_path / "made", written)
    assert ((tmp_path / "made" / "model.safetensors.index.json").is_file()) == (shard_bytes == 8192)
    assert made.config == CONFIG
    assert made.manifest.parameter_count == parameter_count(CONFIG)
    assert list(made.tensors) == list(parameter_shapes(CONFIG))
    for name, tensor in made.tensors.items():
        assert tensor.dtype == "bfloat16"
        np.testing.assert_array_equal(tensor.array(), written.tensors[name].array())
        torch.from_numpy(tensor.array()).view(torch.bfloat16)
    assert verify(tmp_path / "made") == made.manifest


def test_small_files(directory: Path, tiny_tokenizer_path: Path, tmp_path: Path) -> None:
    opened = open_model_directory(directory)
    assert opened.tokenizer_path is None
    assert opened.checkpoint.license_text == "free"
    with_tokenizer = write_model_directory(tmp_path / "2", checkpoint(tokenizer_path=tiny_tokenizer_path))
    assert with_tokenizer.tokenizer_path == tmp_path / "2" / "tokenizer.model"
    assert with_tokenizer.tokenizer_path.read_bytes() == tiny_tokenizer_path.read_bytes()
    (directory / "tokenizer.model").write_bytes(tiny_tokenizer_path.read_bytes())
    assert open_model_directory(directory).tokenizer_path == directory / "tokenizer.model"


def test_the_fingerprint_is_that_of_configuration_and_weights(
    directory: Path, tiny_tokenizer_path: Path, tmp_path: Path
) -> None:
    same = write_model_directory(
        tmp_path / "same", checkpoint(tokenizer_path=tiny_tokenizer_path, source=Source(format="other"))
    )
    fingerprint = open_model_directory(directory).fingerprint
    assert same.fingerprint == fingerprint
    assert len(fingerprint) == 64
    config = CONFIG.model_copy(update={"dtype": "float16"})
    assert write_model_directory(tmp_path / "other", checkpoint(config)).fingerprint != fingerprint
    tensors = dict(checkpoint().tensors)
    tensors["text.norm.bias"] = LazyTensor("bfloat16", (16,), lambda: np.ones(16, np.uint16))
    assert write_model_directory(tmp_path / "third", checkpoint(tensors=tensors)).fingerprint != fingerprint


def test_progress_is_reported_to_the_end(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    write_model_directory(tmp_path / "made", checkpoint(), report=lambda done, total: calls.append((done, total)))
    size = checkpoint().size_bytes
    assert calls[-1] == (size, size)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    calls.clear()
    verify(tmp_path / "made", lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1] > size


def test_tensors_that_do_not_fit_are_all_listed_and_nothing_is_written(
    tmp_path: Path, entries: Callable[[Path], list[str]]
) -> None:
    tensors = dict(checkpoint().tensors)
    del tensors["text.norm.bias"]
    for name in [name for name in tensors if name.startswith("vision.")]:
        del tensors[name]
    tensors["odd"] = tensors["qformer.norm.bias"] = LazyTensor("int8", (3,), lambda: np.zeros(3, np.int8))
    with pytest.raises(CheckpointError) as caught:
        write_model_directory(tmp_path / "made", checkpoint(tensors=tensors))
    assert str(caught.value) == (
        f"The tensors in {tmp_path / 'made'} do not fit its configuration: 19 missing (vision.patch_embed.weight, "
        "vision.patch_embed.bias, vision.class_token, vision.position_embeddings, vision.layers.0.norm1.weight, "
        "vision.layers.0.norm1.bias, vision.layers.0.attention.qkv.weight, vision.layers.0.attention.qkv.bias, "
        "vision.layers.0.attention.proj.weight, vision.layers.0.attention.proj.bias and 9 more); 1 unexpected (odd); "
        "1 of another shape (qformer.norm.bias is [3] instead of [16]); "
        "2 not float32, float16, bfloat16 (qformer.norm.bias is int8, odd is int8)."
    )
    assert entries(tmp_path) == []


def test_a_failure_in_one_shard_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: Callable[[Path], list[str]]
) -> None:
    monkeypatch.setattr(shards, "MAX_SHARD_BYTES", 8192)
    tensors = dict(checkpoint().tensors)
    tensors["text.norm.bias"] = LazyTensor("bfloat16", (16,), lambda: np.zeros(15, np.uint16))
    with pytest.raises(CheckpointError, match="announced as"):
        write_model_directory(tmp_path / "made", checkpoint(tensors=tensors))
    assert entries(tmp_path) == []


def test_no_model_directories(tmp_path: Path, directory: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_model_directory(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a file; give the folder"):
        open_model_directory(directory / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds a folder with a checkpoint, made, and a model directory is"):
        open_model_directory(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("open_", [open_model_directory, verify])
def test_spoiled_files(open_: Callable[[Path], object], name: str, directory: Path) -> None:
    path = directory / name
    content = path.read_bytes()
    path.write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=f"{name} is only a git-lfs pointer"):
        open_(directory)
    path.write_bytes(content[:-10])
    with pytest.raises(CheckpointError, match=rf"{name} has [\d,]+ bytes instead of [\d,]+: it was cut short"):
        open_(directory)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        open_(directory)


def test_one_changed_bit_is_found(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, but for large weights."""
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for open_ in (open_model_directory, verify):
        with pytest.raises(CheckpointError, match=r"made is damaged: model\.safetensors changed since it was written"):
            open_(directory)
    open_model_directory(directory, hash_weights=False)
    monkeypatch.setattr("visualglm.checkpoint.listed_files._SMALL_BYTES", len(content) - 1)
    open_model_directory(directory)


def test_all_missing_shards_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_SHARD_BYTES", 8192)
    path = write_model_directory(tmp_path / "made", checkpoint()).path
    files = sorted(path.glob("model-*.safetensors"))
    files[0].unlink()
    files[-1].unlink()
    with pytest.raises(CheckpointError, match=f"lacks {files[0].name}, {files[-1].name}"):
        open_model_directory(path)


def test_a_tokenizer_pointer(directory: Path) -> None:
    (directory / "tokenizer.model").write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is only a git-lfs pointer.*git lfs pull"):
        open_model_directory(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2, "files": "of another kind"}, "format version 2, .* reads up to 1; install a newer"),
        ({"files": {"../a": {"sha256": "0" * 64, "size": 1}}}, r"names a file outside its folder, \.\./a"),
        ({"files": {"/etc/passwd": {"sha256": "0" * 64, "size": 1}}}, "outside its folder"),
        ({"files": {"a": {"sha256": "0", "size": 1}}}, r"is not valid: files\.a\.sha256"),
        ({"source": None}, "is not valid: source"),
        ({"files": {}}, r"does not list config\.json, model\.safetensors"),
        ({"files": {"a": {"sha256": "0" * 64, "size": 1}}}, "lacks a"),
    ],
)
def test_manifests_that_are_not_valid(changes: dict[str, Any], message: str, directory: Path) -> None:
    edit(directory / "manifest.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        open_model_directory(directory)


def test_a_configuration_of_another_model(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["vision"]["patch_size"] = 15
    (directory / "config.json").write_text(json.dumps(config))
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"]["config.json"]["size"] = (directory / "config.json").stat().st_size
    edit(directory / "manifest.json", files=manifest["files"])
    with pytest.raises(ConfigError, match=r"vision\.image_size 28 is not a multiple of vision\.patch_size 15"):
        open_model_directory(directory)
