"""The model a layer at a time, against torch: what comes out of it, and what its linear layers are given."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.hooks import RemovableHandle

import visualglm
from visualglm.backends.torch.backend import TorchBackend
from visualglm.checkpoint.model_dir import ModelDirectory, open_model_directory
from visualglm.config import VisualGLMConfig
from visualglm.errors import DeviceError
from visualglm.export.examples import Examples, answer_columns, text_columns
from visualglm.export.layerwise import LayerwiseModel, working_bytes
from visualglm.processing.tokenizer import Tokenizer
from visualglm.scenes.dataset import make_row, pad_rows

TURNS = [("What is in the picture?", "a red cat"), ("图里有什么？", "红色的沙发。"), ("Q?", "3 dogs and a red cat.")]


@pytest.fixture(scope="module")
def directory(tiny_model_dir: Path) -> ModelDirectory:
    return open_model_directory(tiny_model_dir)


@pytest.fixture(scope="module")
def examples(directory: ModelDirectory) -> list[Examples]:
    """Two batches: three rows, the last without a picture; and one."""
    assert directory.tokenizer_path is not None
    tokenizer, config = Tokenizer(directory.tokenizer_path), directory.config
    pixels = np.random.default_rng(0).standard_normal((3, 3, 28, 28)).astype(np.float32)
    rows = [make_row(tokenizer, config, turn, "auto", place) for turn, place in zip(TURNS, (1, 0, -1), strict=True)]
    alone = make_row(tokenizer, config, TURNS[0], "auto", 0)
    return [
        Examples(pixels[:2], (pad_rows(rows, config.text),)),
        Examples(pixels[2:], (pad_rows([alone], config.text),)),
    ]


def torch_run(directory: ModelDirectory, examples: list[Examples]) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Logits of the answers by group, and the inputs of each linear layer of the decoder, padding left out."""
    model = visualglm.load(directory.path, backend="torch", device="cpu", dtype="float32")
    assert isinstance(model.backend, TorchBackend)
    text = model.backend.model.text
    inputs: dict[str, list[np.ndarray]] = {}
    logits = []

    def record(name: str, columns: np.ndarray) -> RemovableHandle:
        return text.get_submodule(name).register_forward_pre_hook(
            lambda _, given: inputs.setdefault(f"text.{name}", []).append(given[0].detach().numpy()[columns])
        )

    for batch in examples:
        group, images = batch.groups[0], model.backend.encode_images(batch.pixels)
        answers, every = answer_columns(group.layout), text_columns(group.layout)
        linear = [name for name, module in text.named_modules() if isinstance(module, torch.nn.Linear)]
        handles = [record(name, answers if name == "lm_head" else every) for name in linear]
        found = model.backend.logits(group.layout, [images[index] for index in group.scene_index if index >= 0])
        logits.append(found[answers])
        for handle in handles:
            handle.remove()
    return logits, {name: np.concatenate(parts) for name, parts in inputs.items()}


def test_logits_and_hessians_are_those_of_torch(directory: ModelDirectory, examples: list[Examples], tmp_path: Path):
    logits, inputs = torch_run(directory, examples)
    model = LayerwiseModel(directory, examples, tmp_path)
    assert model.rows == 4 and len(inputs) == 9
    for name in inputs:
        x = inputs[name].astype(np.float64)
        hessian = model.hessian(name)
        # What the norms give is larger by a factor than what torch's layers are given; GPTQ knows only ratios.
        expected = x.T @ x
        np.testing.assert_allclose(
            hessian / np.trace(hessian), expected / np.trace(expected), atol=1e-6, rtol=0, err_msg=name
        )
    found = list(model.answer_logits())
    for one, other in zip(found, logits, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_logits_do_not_need_hessians(directory: ModelDirectory, examples: list[Examples], tmp_path: Path):
    logits = list(LayerwiseModel(directory, examples, tmp_path).answer_logits())
    assert [len(piece) for piece in logits] == [answer_columns(batch.groups[0].layout).sum() for batch in examples]
    assert len(list(tmp_path.iterdir())) == 2  # one graph and its weights


def test_memory_that_does_not_suffice_is_told(
    directory: ModelDirectory, examples: list[Examples], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("visualglm.export.layerwise.available_memory", lambda: 2**20)
    with pytest.raises(DeviceError, match=r"take .* of memory, but this machine has 1 MiB left; close other programs"):
        LayerwiseModel(directory, examples, tmp_path)


def test_the_full_size_is_calibrated_in_the_memory_of_a_layer():
    config = VisualGLMConfig()
    assert 6e9 < working_bytes(config, 0, calibrates=False) <= working_bytes(config, 0, calibrates=True) < 8e9
    # Beside an export in int4, and with 512 rows of 100 columns.
    assert working_bytes(config, 0, calibrates=True, beside=5 * 10**9) < 9e9
    assert working_bytes(config, 51_200, calibrates=True, beside=5 * 10**9) < 11e9
