"""Adapters beside a loaded model: the original's numbers, PEFT's own, and switching without a reload."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from numpy.typing import NDArray

import visualglm
from tests.adapters import MODULES, write_random_adapter
from tests.backends.conftest import GOLDENS, Golden
from visualglm.backends.torch.load import load_torch_backend
from visualglm.checkpoint.adapter_dir import AdapterDirectory, open_adapter, write_adapter
from visualglm.checkpoint.manifest import Source
from visualglm.checkpoint.merge import merge, merged
from visualglm.checkpoint.model_dir import ModelDirectory, open_model_directory
from visualglm.checkpoint.sat_lora import convert_sat_adapter
from visualglm.errors import CheckpointError, ConfigError, DeviceError
from visualglm.model import VisualGLM
from visualglm.parameters import prefix_name

NAME = "a_image_b1"
VISION = ("vision.patch_embed.weight", "vision.class_token", "qformer.query_tokens", "projection.bias")


@dataclass(frozen=True)
class Adapted:
    """A golden with its base and the original's LoRA."""

    golden: Golden
    base: ModelDirectory
    lora: AdapterDirectory

    def error(self, model: VisualGLM, name: str) -> float:
        golden = self.golden
        logits = model.logits(golden.arrays["input_ids"], golden.pixels, golden.image_start)
        return float(np.abs(logits - golden.arrays[name]).max())


@pytest.fixture(scope="module")
def adapted(load_golden: Callable[[str], Golden], tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    golden = load_golden(NAME)
    base = open_model_directory(golden.model.name)
    path = tmp_path_factory.mktemp("adapter") / "lora"
    return Adapted(golden, base, convert_sat_adapter(GOLDENS / NAME / "lora_only_state.pt", path, base=base))


def test_the_original_lora_beside_the_weights(adapted: Adapted):
    model = visualglm.load(adapted.base.path, backend="torch", device="cpu", adapter=adapted.lora.path)
    assert model.adapter == "lora" and model.adapters == ("lora",)
    assert model.name == f"{adapted.base.path} with adapter {adapted.lora.path}"
    assert adapted.error(model, "lora_logits") < 1e-5
    model.use_adapter(None)
    assert adapted.error(model, "logits") < 1e-5


def test_the_original_lora_in_the_weights(adapted: Adapted, tmp_path: Path):
    view = VisualGLM(load_torch_backend(merged(adapted.base, adapted.lora), "cpu"), None)
    merge(adapted.base, adapted.lora, tmp_path / "merged")
    written = visualglm.load(tmp_path / "merged", backend="torch", device="cpu")
    assert adapted.error(view, "lora_merged_logits") < 1e-5
    assert adapted.error(written, "lora_merged_logits") < 1e-5


def test_the_original_lora_on_onnx(adapted: Adapted):
    model = visualglm.load(adapted.base.path, backend="onnx", device="cpu", dtype="float32", adapter=adapted.lora.path)
    assert model.backend.description == "onnx on cpu, fp32"
    # The base itself is that far from the original there: other products, in another order.
    assert adapted.error(model, "lora_logits") < 2e-5
    with pytest.raises(DeviceError, match=r"onnx on cpu, fp32, which cannot switch adapters; load the model directory"):
        model.add_adapter("other", adapted.lora.path)


def test_the_original_prefixes(adapted: Adapted, tmp_path: Path):
    arrays = adapted.golden.arrays
    prefix = {prefix_name(layer): arrays[f"ptuning/mixins.ptuning.prefix.{layer}"] for layer in range(4)}
    write_adapter(tmp_path / "prefix", base=adapted.base, prefix=prefix, source=Source(format="test"))
    model = visualglm.load(adapted.base.path, device="cpu", adapter=tmp_path / "prefix")
    assert model.backend.description == "torch on cpu, float32"
    assert adapted.error(model, "ptuning_logits") < 1e-5
    model.use_adapter(None)
    assert adapted.error(model, "logits") < 1e-5
    with pytest.raises(DeviceError, match=r"onnx backend cannot run the adapter .* which has learned prefixes"):
        visualglm.load(adapted.base.path, backend="onnx", adapter=tmp_path / "prefix")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_switching_is_as_loading_anew(dtype: str, tiny_model_dir: Path, tmp_path: Path):
    options = {"backend": "torch", "device": "cpu", "dtype": dtype}
    write_random_adapter(tmp_path / "lora", tiny_model_dir)
    write_random_adapter(tmp_path / "both", tiny_model_dir, seed=1, trained=VISION, prefix_length=3)
    write_random_adapter(tmp_path / "parts", tiny_model_dir, seed=2, modules=(), trained=VISION)
    names: tuple[str | None, ...] = (None, "lora", "both", "parts")
    alone = {name: _load(tiny_model_dir, name and tmp_path / name, options) for name in names}
    expected = {name: _outputs(model) for name, model in alone.items()}
    assert len({embeds.tobytes() + answers.tobytes() for embeds, answers in expected.values()}) == 4
    model = visualglm.load(tiny_model_dir, **options)
    for name in names[1:]:
        assert name
        model.add_adapter(name, tmp_path / name)
        assert model.adapter is None and all(map(np.array_equal, _outputs(model), expected[None]))
    for name in ("lora", "both", "parts", None, "both", "lora", None, "parts"):
        model.use_adapter(name)
        assert model.adapter == name and all(map(np.array_equal, _outputs(model), expected[name]))


def _load(path: Path, adapter: Path | None, options: dict[str, str]) -> VisualGLM:
    return visualglm.load(path, **options, adapter=adapter)  # type: ignore[arg-type]


def _outputs(model: VisualGLM) -> tuple[NDArray[np.float32], NDArray[np.str_]]:
    """What an image becomes, and two answers: one alone, and one in a batch with pads."""
    image = np.random.default_rng(3).integers(0, 255, (30, 30, 3), dtype=np.uint8)
    answers = model.ask_batch([(image, "图里有什么？"), (None, "hello"), (image, "a")], max_new_tokens=6)
    return model.encode_image(image).array, np.array(answers)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_is_as_unmerged(dtype: str, tiny_model_dir: Path, tmp_path: Path):
    base = open_model_directory(tiny_model_dir)
    adapter = write_random_adapter(tmp_path / "adapter", tiny_model_dir, trained=VISION)
    beside = visualglm.load(tiny_model_dir, backend="torch", device="cpu", dtype=dtype, adapter=adapter.path)
    within = VisualGLM(load_torch_backend(merged(base, adapter), "cpu", dtype), beside.tokenizer)
    logits = [_logits(model) for model in (beside, within)]
    limit = 1e-5 if dtype == "float32" else 0.05
    assert np.abs(logits[0] - logits[1]).max() < limit * np.abs(logits[0]).max()


def test_torch_is_as_onnx(tiny_model_dir: Path, tmp_path: Path):
    adapter = write_random_adapter(tmp_path / "adapter", tiny_model_dir, trained=VISION)
    torch_model, onnx_model = (
        visualglm.load(tiny_model_dir, backend=backend, device="cpu", dtype="float32", adapter=adapter.path)
        for backend in ("torch", "onnx")
    )
    assert np.abs(_logits(torch_model) - _logits(onnx_model)).max() < 2e-5


def _logits(model: VisualGLM) -> NDArray[np.float32]:
    config = model.config
    random = np.random.default_rng(0)
    ids = random.integers(100, config.text.vocab_size, (2, 12))
    ids[:, -1] = config.text.bos_token_id
    size = config.vision.image_size
    return model.logits(ids, random.normal(0, 1, (2, 3, size, size)).astype(np.float32), 1)


def test_peft_reads_what_we_write(adapted: Adapted):
    """PEFT puts our adapter beside the modules of the model, and computes the same."""
    backend = load_torch_backend(adapted.base, "cpu")
    backend.model.requires_grad_(False)
    wrapped = peft.PeftModel.from_pretrained(backend.model, adapted.lora.path)
    layer = wrapped.base_model.model.text.layers[0].attention.qkv
    assert (layer.r["default"], layer.scaling["default"]) == (12, 0.25)
    backend.model = wrapped.base_model.model
    assert adapted.error(VisualGLM(backend, None), "lora_logits") < 1e-5


def test_we_read_what_peft_writes(tiny_model_dir: Path, tmp_path: Path):
    base = open_model_directory(tiny_model_dir)
    backend = load_torch_backend(base, "cpu")
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=list(MODULES), rank_pattern={"mlp.fc1": 5})
    wrapped = peft.PeftModel(backend.model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    wrapped.save_pretrained(tmp_path / "peft")
    backend.model = wrapped.base_model.model
    with pytest.warns(UserWarning, match="does not say which model it belongs to"):
        ours = visualglm.load(tiny_model_dir, backend="torch", device="cpu", adapter=tmp_path / "peft")
    assert {name: pair.scale for name, pair in open_adapter(tmp_path / "peft").lora.items()} == {
        MODULES[0]: 2.0,
        MODULES[1]: 2.0,
        MODULES[2]: 6 / 5,
    }
    expected = _logits(VisualGLM(backend, None))
    assert np.abs(_logits(ours) - expected).max() < 1e-5 * np.abs(expected).max()


def test_names_that_are_not_there_or_taken(tiny_model_dir: Path, tmp_path: Path):
    adapter = write_random_adapter(tmp_path / "adapter", tiny_model_dir)
    model = visualglm.load(tiny_model_dir, backend="torch", device="cpu")
    with pytest.raises(ConfigError, match=r"There is no adapter 'x': none was added; give one"):
        model.use_adapter("x")
    model.add_adapter("weather", adapter.path)
    with pytest.raises(ConfigError, match=r"There is no adapter 'x': there are weather; give one that is there"):
        model.use_adapter("x")
    with pytest.raises(ConfigError, match="There is an adapter 'weather' already; give this one another name"):
        model.add_adapter("weather", adapter.path)
    with pytest.raises(ConfigError, match=r"^The name of an adapter is empty; give one to call it by\.$"):
        model.add_adapter("", adapter.path)
    with pytest.raises(CheckpointError, match="is no adapter"):
        model.add_adapter("nothing", tmp_path)
    assert (model.adapters, model.adapter) == (("weather",), None)
    with pytest.raises(DeviceError, match="cannot switch adapters"):
        VisualGLM(model.backend, None).add_adapter("other", adapter.path)


def test_an_adapter_of_another_model(tiny_model_dir: Path, builtin_model_dir: Path, tmp_path: Path):
    adapter = write_random_adapter(tmp_path / "adapter", tiny_model_dir)
    for backend in ("torch", "onnx"):
        with pytest.raises(CheckpointError, match=r"belongs to the model tiny \(fingerprint .*is another one"):
            visualglm.load(backend=backend, adapter=adapter.path)
    model = visualglm.load(backend="torch", device="cpu")
    unknown = write_random_adapter(tmp_path / "unknown", tiny_model_dir, knows_base=False)
    for path in (adapter.path, unknown.path):
        with pytest.raises(CheckpointError, match=r"belongs to the model tiny|does not fit the model"):
            model.add_adapter("a", path)
