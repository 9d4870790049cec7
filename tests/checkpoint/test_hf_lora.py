"""LoRA that PEFT trained on the Hugging Face model: PEFT itself writes it, and merges it there."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from torch import nn

from tests.adapters import random_pairs
from visualglm.checkpoint.adapter_dir import open_adapter, require_base
from visualglm.checkpoint.convert import convert
from visualglm.checkpoint.hf_lora import convert_hf_adapter, holds_hf_adapter, told_hf_base
from visualglm.checkpoint.merge import merged
from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.errors import CheckpointError

MODULES = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
QKV = "transformer.layers.0.attention.query_key_value"
PEFT_QKV_B = f"base_model.model.{QKV}.lora_B.weight"


class Named(nn.Module):
    """Linear layers under the names of a state dict."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, weight in state.items():
            *path, leaf = name.removesuffix(".weight").split(".")
            parent: nn.Module = self
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight.data = weight.float()
            parent.add_module(leaf, linear)


def linear_weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of the text part and one of the image encoder."""
    ends = tuple(f"{module}.weight" for module in MODULES)
    return {
        name: tensor
        for name, tensor in state.items()
        if name.endswith(ends) and name.startswith(("transformer.layers", "image_encoder.vit.transformer.layers.1"))
    }


def peft_model(hf_folder: Path, **settings: object) -> peft.PeftModel:
    """The Hugging Face model with LoRA that adds something."""
    state = torch.load(hf_folder / "pytorch_model.bin", weights_only=True)
    values: dict[str, object] = {"r": 4, "lora_alpha": 6, "target_modules": list(MODULES), **settings}
    torch.manual_seed(5)
    model = peft.get_peft_model(Named(linear_weights(state)), peft.LoraConfig(**values))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0, 0.3)
    return model


@pytest.fixture
def base(hf_folder: Path, tmp_path: Path) -> Path:
    return convert(hf_folder, tmp_path / "base").output


@pytest.fixture
def written(hf_folder: Path, tmp_path: Path) -> Path:
    peft_model(hf_folder).save_pretrained(str(tmp_path / "peft"))
    return tmp_path / "peft"


def pickle(folder: Path) -> None:
    """As PEFT wrote it before it had safetensors."""
    with_safetensors = folder / "adapter_model.safetensors"
    torch.save(peft.utils.load_peft_weights(str(folder), device="cpu"), folder / "adapter_model.bin")
    with_safetensors.unlink()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pickled": True},
        {"target_modules": ["query_key_value"], "use_rslora": True},
        {"rank_pattern": {"dense": 2, "layers.1.attention.query_key_value": 3}, "alpha_pattern": {"dense_h_to_4h": 9}},
    ],
)
def test_merging_here_is_merging_there(
    settings: dict[str, object], hf_folder: Path, base: Path, tmp_path: Path
) -> None:
    settings, pickled = {name: value for name, value in settings.items() if name != "pickled"}, "pickled" in settings
    model = peft_model(hf_folder, **settings)
    model.save_pretrained(str(tmp_path / "peft"))
    if pickled:
        pickle(tmp_path / "peft")
    adapter = convert_hf_adapter(tmp_path / "peft", tmp_path / "adapter", base=open_model_directory(base))
    ours = merged(open_model_directory(base), adapter).tensors

    state = torch.load(hf_folder / "pytorch_model.bin", weights_only=True)
    there = {name: tensor.float() for name, tensor in state.items()} | model.merge_and_unload().state_dict()
    torch.save({name: tensor.contiguous() for name, tensor in there.items()}, hf_folder / "pytorch_model.bin")
    theirs = open_model_directory(convert(hf_folder, tmp_path / "merged").output).tensors
    assert ours.keys() == theirs.keys() and len(adapter.lora) == len(linear_weights(state)) / (
        1 if settings.get("target_modules") is None else len(MODULES)
    )
    changed = {f"{module}.weight" for module in adapter.lora}
    for name, tensor in ours.items():
        np.testing.assert_allclose(tensor.array().astype(np.float32), theirs[name].array(), atol=2e-6)
        original = open_model_directory(base).tensors[name].array()
        assert (np.abs(theirs[name].array() - original).max() > 1e-2) == (name in changed)


def test_what_peft_reads_of_it_scales_the_same(hf_folder: Path, base: Path, tmp_path: Path) -> None:
    model = peft_model(hf_folder, rank_pattern={"dense": 2}, alpha_pattern={"dense_h_to_4h": 9})
    model.save_pretrained(str(tmp_path / "peft"))
    adapter = convert_hf_adapter(tmp_path / "peft", tmp_path / "adapter", base=open_model_directory(base))
    settings = peft.PeftConfig.from_pretrained(str(adapter.path))
    assert isinstance(settings, peft.LoraConfig) and set(settings.target_modules or ()) == set(adapter.lora)
    assert {name: pair.scale for name, pair in adapter.lora.items() if "layers.0" in name and "text" in name} == {
        "text.layers.0.attention.qkv": 1.5,
        "text.layers.0.attention.proj": 3.0,
        "text.layers.0.mlp.fc1": 2.25,
        "text.layers.0.mlp.fc2": 1.5,
    }


def test_it_belongs_to_the_base_that_was_given(written: Path, base: Path, tmp_path: Path) -> None:
    directory = open_model_directory(base)
    adapter = convert_hf_adapter(written, tmp_path / "adapter", base=directory)
    assert adapter.manifest and adapter.manifest.base_fingerprint == directory.fingerprint
    assert adapter.manifest.source.format == "hf" and adapter.manifest.source.layout == "per_head"
    with pytest.raises(CheckpointError, match="packs q, k and v head by head, as its base does; give that with --base"):
        convert_hf_adapter(written, tmp_path / "blind")


def test_beside_a_model_it_is_told_how_to_be_converted(written: Path, base: Path) -> None:
    with pytest.raises(CheckpointError, match=f"with `visualglm convert {written} OUT --base MODEL`, and give OUT"):
        require_base(open_adapter(written), open_model_directory(base))


def test_what_it_is(written: Path, base: Path, hf_folder: Path, tmp_path: Path) -> None:
    assert holds_hf_adapter(written) and not holds_hf_adapter(base) and not holds_hf_adapter(hf_folder)
    assert not holds_hf_adapter(convert_hf_adapter(written, tmp_path / "a", base=open_model_directory(base)).path)
    assert told_hf_base(written) is None
    change(written, base_model_name_or_path="THUDM/visualglm-6b")
    assert told_hf_base(written) == "THUDM/visualglm-6b"


def change(folder: Path, **values: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def spoil(folder: Path, name: str, array: np.ndarray | None) -> None:
    tensors = {key: tensor.numpy() for key, tensor in peft.utils.load_peft_weights(str(folder), device="cpu").items()}
    tensors = {key: found for key, found in (tensors | {name: array}).items() if found is not None}
    (folder / "adapter_model.safetensors").unlink()
    torch.save({key: torch.from_numpy(found) for key, found in tensors.items()}, folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        (PEFT_QKV_B, None, f"{QKV} lacks lora_B"),
        (PEFT_QKV_B, np.zeros((192, 5), np.float32), "is \\[192, 5\\] and not of rank 4"),
        (PEFT_QKV_B, np.zeros((128, 4), np.float32), r"qkv is for \[128, 64\], and its weight is \[192, 64\]"),
        (PEFT_QKV_B, np.full((192, 4), np.nan, np.float32), "not finite numbers"),
        (PEFT_QKV_B, np.zeros((192, 4), np.int32), "may hold arrays of float32, float16, bfloat16 only"),
        ("lm_head.weight", np.zeros((192, 4), np.float32), "lm_head.weight is no part of a LoRA pair"),
    ],
)
def test_spoilt_weights_are_one_sentence(
    name: str, array: np.ndarray | None, message: str, written: Path, base: Path, tmp_path: Path
) -> None:
    spoil(written, name, array)
    with pytest.raises(CheckpointError, match=message) as caught:
        convert_hf_adapter(written, tmp_path / "adapter", base=open_model_directory(base))
    assert "\n" not in str(caught.value) and not (tmp_path / "adapter").exists()


def other_layers(hf_folder: Path) -> Iterator[tuple[dict[str, torch.Tensor], str]]:
    """State dicts of other models, and what is said of LoRA on them."""
    state = torch.load(hf_folder / "pytorch_model.bin", weights_only=True)
    yield {f"model.layers.0.{MODULES[1]}.weight": state[f"{QKV}.weight"]}, "does not have: model.layers.0.dense"
    yield {QKV.replace(".0.", ".9.") + ".weight": state[f"{QKV}.weight"]}, "does not have: transformer.layers.9"


def test_another_model(hf_folder: Path, base: Path, tmp_path: Path) -> None:
    for index, (state, message) in enumerate(other_layers(hf_folder)):
        settings = peft.LoraConfig(r=2, target_modules=list(MODULES))
        peft.get_peft_model(Named(state), settings).save_pretrained(str(tmp_path / f"{index}"))
        named = {"target_modules": [next(iter(state)).removesuffix(".weight")]}
        change(tmp_path / f"{index}", **named)
        with pytest.raises(CheckpointError, match=message):
            convert_hf_adapter(tmp_path / f"{index}", tmp_path / "adapter", base=open_model_directory(base))


def test_old_settings_are_refused_by_name(written: Path, base: Path, tmp_path: Path) -> None:
    change(written, enable_lora=[True, False, True])
    with pytest.raises(CheckpointError, match=r"has enable_lora \[True, False, True\], which is not supported"):
        convert_hf_adapter(written, tmp_path / "adapter", base=open_model_directory(base))


def test_our_names_need_no_conversion_and_may_be_pickled(base: Path, tmp_path: Path) -> None:
    folder, module = tmp_path / "peft", "text.layers.0.attention.qkv"
    folder.mkdir()
    pairs = random_pairs(open_model_directory(base), (module,), 2, seed=0)
    torch.save({name: torch.from_numpy(array) for name, array in pairs.items()}, folder / "adapter_model.bin")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["qkv"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    adapter = open_adapter(folder)
    require_base(adapter, open_model_directory(base))
    assert np.array_equal(adapter.lora[module].b.array(), pairs[f"base_model.model.{module}.lora_B.weight"])
    with pytest.raises(CheckpointError, match="has the names of a model directory already; give it as it is"):
        convert_hf_adapter(folder, tmp_path / "adapter", base=open_model_directory(base))
