"""LoRA and prefixes that SAT fine-tuned: the original's own files, archives with a base in them, and spoilt ones."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from visualglm.checkpoint.adapter_dir import open_adapter
from visualglm.checkpoint.convert import convert
from visualglm.checkpoint.merge import merged
from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.checkpoint.sat_lora import convert_sat_adapter, holds_sat_adapter
from visualglm.errors import CheckpointError

LORA_FILE = Path(__file__).parents[1] / "goldens" / "a_image_b1" / "lora_only_state.pt"
QKV, DENSE = (f"transformer.layers.0.attention.{name}" for name in ("query_key_value", "dense"))
State = dict[str, torch.Tensor]


def load_state(path: Path) -> State:
    state: State = torch.load(path, weights_only=True)["module"]
    return state


def save_state(path: Path, state: Mapping[str, object]) -> Path:
    torch.save({"module": dict(state)}, path)
    return path


@pytest.fixture
def fine_tuned(sat_archive: Path, tmp_path: Path) -> Path:
    """An archive as SAT's training writes it: the base's layers renamed where LoRA lies beside them."""
    folder = tmp_path / "lora_ckpt"
    shutil.copytree(sat_archive, folder)
    weights = folder / "1" / "mp_rank_00_model_states.pt"
    lora = load_state(LORA_FILE)
    adapted = {name.partition(".matrix_")[0] for name in lora}
    state = {}
    for name, tensor in load_state(weights).items():
        module, _, kind = name.rpartition(".")
        state[f"{module}.original.{kind}" if module in adapted else name] = tensor
    save_state(weights, state | lora)
    change_config(folder, lora_rank=4, layer_range=[0, 2])
    return folder


def change_config(folder: Path, **values: object) -> None:
    path = folder / "model_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_three_pairs_become_one(model_dir: Path, tmp_path: Path):
    base, state = open_model_directory(model_dir), load_state(LORA_FILE)
    adapter = convert_sat_adapter(LORA_FILE, tmp_path / "adapter", base=base)
    assert adapter.manifest and adapter.manifest.base_fingerprint == base.fingerprint
    ranks = {"attention.qkv": 12, "attention.proj": 4}
    assert {name: (pair.rank, pair.scale) for name, pair in adapter.lora.items()} == {
        f"text.layers.{layer}.{name}": (rank, 0.25) for layer in (0, 2) for name, rank in ranks.items()
    }
    pair = adapter.lora["text.layers.0.attention.qkv"]
    delta = pair.b.array() @ pair.a.array()
    parts = [(state[f"{QKV}.matrix_B.{i}"] @ state[f"{QKV}.matrix_A.{i}"]).numpy() for i in range(3)]
    assert np.allclose(delta, np.concatenate(parts), atol=1e-6)
    pair = adapter.lora["text.layers.0.attention.proj"]
    assert np.array_equal(pair.a.array(), state[f"{DENSE}.matrix_A.0"].numpy())


def test_the_layer_that_the_original_merged(model_dir: Path, tmp_path: Path):
    base = open_model_directory(model_dir)
    view = merged(base, convert_sat_adapter(LORA_FILE, tmp_path / "adapter", base=base))
    with np.load(LORA_FILE.with_name("golden.npz")) as golden:
        expected = golden["lora_merged_qkv_weight_layer0"]
    assert np.abs(view.tensors["text.layers.0.attention.qkv.weight"].array() - expected).max() < 1e-6


def test_an_archive_with_its_base(fine_tuned: Path, model_dir: Path, tmp_path: Path):
    base = open_model_directory(model_dir)
    assert holds_sat_adapter(fine_tuned) and holds_sat_adapter(LORA_FILE)
    assert not holds_sat_adapter(LORA_FILE.parent) and not holds_sat_adapter(model_dir)
    alone = convert_sat_adapter(LORA_FILE, tmp_path / "alone", base=base)
    for given, name in ((base, "known"), (None, "unknown")):
        adapter = convert_sat_adapter(fine_tuned, tmp_path / name, base=given)
        assert adapter.knows_base == (given is not None)
        for module, pair in alone.lora.items():
            assert np.array_equal(adapter.lora[module].a.array(), pair.a.array())
            assert np.array_equal(adapter.lora[module].b.array(), pair.b.array())
    with pytest.raises(CheckpointError, match=r"holds an adapter .* `visualglm convert .* OUT --base MODEL`"):
        convert(fine_tuned, tmp_path / "model")


def test_an_archive_of_another_type_has_the_same_base(fine_tuned: Path, model_dir: Path, tmp_path: Path):
    weights = fine_tuned / "1" / "mp_rank_00_model_states.pt"
    state = load_state(weights)
    for dtype in (torch.float32, torch.bfloat16):
        save_state(weights, {name: tensor.to(dtype) for name, tensor in state.items()})
        convert_sat_adapter(fine_tuned, tmp_path / str(dtype), base=open_model_directory(model_dir))


def test_heads_that_lie_one_by_one(fine_tuned: Path, model_dir: Path, tmp_path: Path):
    """An archive of before July 2023: its qkv is packed head by head, and so is what LoRA adds to it."""
    heads, width = 4, 16
    weights = fine_tuned / "1" / "mp_rank_00_model_states.pt"
    state = load_state(weights)
    for name, tensor in state.items():
        if name.startswith("transformer") and "query_key_value" in name and "matrix" not in name:
            by_third = tensor.reshape(3, heads, width, -1)
            state[name] = by_third.transpose(0, 1).reshape(tensor.shape).contiguous()
    save_state(weights, state)
    config = json.loads((fine_tuned / "model_config.json").read_text())
    del config["pad_token_id"]
    (fine_tuned / "model_config.json").write_text(json.dumps(config))
    adapter = convert_sat_adapter(fine_tuned, tmp_path / "adapter", base=open_model_directory(model_dir))
    pair = adapter.lora["text.layers.0.attention.qkv"]
    packed = np.concatenate([(state[f"{QKV}.matrix_B.{i}"] @ state[f"{QKV}.matrix_A.{i}"]).numpy() for i in range(3)])
    thirds = packed.reshape(heads, 3, width, 64).transpose(1, 0, 2, 3).reshape(packed.shape)
    assert np.allclose(pair.b.array() @ pair.a.array(), thirds, atol=1e-6)
    with pytest.raises(CheckpointError, match="head by head, as its base does; give that with --base MODEL"):
        convert_sat_adapter(fine_tuned, tmp_path / "blind")


def test_prefixes(model_dir: Path, tmp_path: Path):
    with np.load(LORA_FILE.with_name("golden.npz")) as golden:
        prefixes = {name: golden[f"ptuning/{name}"] for name in (f"mixins.ptuning.prefix.{i}" for i in range(4))}
    state = {name: torch.from_numpy(array) for name, array in prefixes.items()}
    source = save_state(tmp_path / "state.pt", state)
    adapter = convert_sat_adapter(source, tmp_path / "adapter", base=open_model_directory(model_dir))
    assert not adapter.lora and adapter.settings is None
    for layer, array in enumerate(prefixes.values()):
        assert np.array_equal(adapter.prefix[f"text.layers.{layer}.attention.prefix"].array(), array)
    assert open_adapter(tmp_path / "adapter").fingerprint == adapter.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{QKV}.matrix_B.1": None}, r"has the matrices A.0, A.1, A.2, B.0, B.2 of text.layers.0.attention.qkv"),
        ({f"{DENSE}.matrix_A.1": torch.zeros(4, 64)}, r"the matrices A.0, A.1, B.0 of text.layers.0.attention.proj"),
        ({f"{DENSE}.matrix_A.0": torch.zeros(5, 64)}, "proj that do not fit together"),
        ({f"{QKV}.matrix_A.0": torch.zeros(4, 63)}, "qkv that do not fit together"),
        ({f"{QKV}.matrix_A.0": torch.zeros(4)}, "qkv that do not fit together"),
        ({f"{QKV}.matrix_B.0": torch.tensor(1.0)}, "qkv that do not fit together"),
        (
            {f"{DENSE}.matrix_A.0": torch.zeros(2, 64), f"{DENSE}.matrix_B.0": torch.zeros(64, 2)},
            "LoRA of the ranks 2, 4, and should have one",
        ),
        (
            {f"{DENSE}.matrix_A.0": torch.zeros(4, 60), f"{DENSE}.matrix_B.0": torch.zeros(64, 4)},
            r"proj is for \[64, 60\], and its weight is \[64, 64\]",
        ),
        ({f"{DENSE}.matrix_A.0": torch.zeros(4, 64, dtype=torch.int32)}, "may hold float32, float16, bfloat16 only"),
        ({f"{DENSE}.matrix_A.0": torch.full((4, 64), torch.nan)}, "not finite numbers"),
        ({"transformer.layers.0.mlp.dense_h_to_4h.matrix_A.0": torch.zeros(4, 64)}, "adapts layers other than"),
        ({"transformer.layers.99.attention.dense.matrix_A.0": torch.zeros(4, 64),
          "transformer.layers.99.attention.dense.matrix_B.0": torch.zeros(64, 4)}, "no linear layer text.layers.99"),
        ({"something.else": torch.zeros(4)}, "holds tensors that .* does not have: something.else"),
        ({"mixins.ptuning.prefix.0": torch.zeros(2, 4, 3, 16)}, r"text.layers.1.attention.prefix is missing"),
    ],
)  # fmt: skip
def test_archives_that_are_not_whole(
    changes: dict[str, torch.Tensor | None], message: str, model_dir: Path, tmp_path: Path,
    entries: Callable[[Path], list[str]],
):  # fmt: skip
    state = {name: tensor for name, tensor in (load_state(LORA_FILE) | changes).items() if tensor is not None}
    source = save_state(tmp_path / "state.pt", state)
    before = entries(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        convert_sat_adapter(source, tmp_path / "adapter", base=open_model_directory(model_dir))
    assert entries(tmp_path) == before


def test_another_base_or_rank(fine_tuned: Path, model_dir: Path, tmp_path: Path):
    base = open_model_directory(model_dir)
    change_config(fine_tuned, lora_rank=10)
    with pytest.raises(CheckpointError, match="LoRA of the ranks 4, 10, and should have one"):
        convert_sat_adapter(fine_tuned, tmp_path / "adapter", base=base)
    change_config(fine_tuned, lora_rank=4)
    weights = fine_tuned / "1" / "mp_rank_00_model_states.pt"
    state = load_state(weights)
    state[f"{DENSE}.original.weight"][3, 3] += 1
    save_state(weights, state)
    with pytest.raises(CheckpointError, match=r"made from another model than .*: transformer.layers.0.attention.dense"):
        convert_sat_adapter(fine_tuned, tmp_path / "adapter", base=base)
    with pytest.raises(CheckpointError, match="holds no adapter: neither LoRA matrices nor prefixes"):
        convert_sat_adapter(LORA_FILE.parent, tmp_path / "adapter", base=base)
