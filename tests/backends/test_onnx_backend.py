"""The onnx backend: float32 exports are the original and torch to rounding; quantised ones agree with themselves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import visualglm
from tests.backends.conftest import GOLDEN_NAMES, GOLDENS, Golden
from visualglm.backends.onnx.backend import OnnxBackend
from visualglm.backends.onnx.session import Device
from visualglm.checkpoint.convert import convert
from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.config import QFormerConfig, TextConfig, VisionConfig, VisualGLMConfig
from visualglm.errors import DeviceError
from visualglm.export.onnx import ExportOptions, export_onnx
from visualglm.model import VisualGLM

NEW_TOKENS = 12
# Narrow, but wide enough for blocks of 16 to be filled.
CONFIG = VisualGLMConfig(
    vision=VisionConfig(
        image_size=28, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    ),
    qformer=QFormerConfig(
        num_query_tokens=5,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        cross_attention_layers=(0, 2),
    ),
    text=TextConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_sequence_length=96,
        pad_token_id=3,
        mask_token_id=290,
        gmask_token_id=291,
        bos_token_id=292,
        eos_token_id=293,
    ),
)
FORMS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "fp32 without past": {"precision": "fp32", "use_past": False},
    "fp32, int8 cache": {"precision": "fp32", "kv_cache": "int8"},
    "int8": {"precision": "int8"},
    "int4": {"precision": "int4"},
    "int4, float cache": {"precision": "int4", "kv_cache": "float32"},
    "int4 without past": {"precision": "int4", "use_past": False},
}


@pytest.fixture(scope="module")
def random_model(write_random_model: Callable[..., Path]) -> Path:
    # Logits far apart, so that no two tokens are equally likely but for rounding.
    return write_random_model(CONFIG, seed=3, scales={"text.lm_head": 3.0})


@pytest.fixture(scope="module")
def exported(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], VisualGLM]:
    """The random model in one of `FORMS`, exported and loaded once."""
    loaded: dict[str, VisualGLM] = {}

    def load(form: str) -> VisualGLM:
        if form not in loaded:
            output = tmp_path_factory.mktemp("export") / "out"
            done = export_onnx(open_model_directory(random_model), output, ExportOptions(**FORMS[form]))
            loaded[form] = visualglm.load(done.path)
            assert isinstance(loaded[form].backend, OnnxBackend)
        return loaded[form]

    return load


def prompts(*lengths: int, seed: int = 0) -> tuple[NDArray[np.int64], list[int | None], NDArray[np.float32]]:
    """A left-padded batch of prompts, the first and every second of them with an image after two tokens."""
    random, longest = np.random.default_rng(seed), max(lengths)
    ids = np.full((len(lengths), longest), 3)
    starts: list[int | None] = []
    for row, length in enumerate(lengths):
        pad = longest - length
        ids[row, pad:] = random.integers(10, 280, length)
        ids[row, -2:] = (291, 292)
        starts.append(pad + 2 if row % 2 == 0 else None)
    images = len([start for start in starts if start is not None])
    return ids, starts, random.standard_normal((images, 3, 28, 28)).astype(np.float32)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
@pytest.mark.parametrize("use_past", [True, False])
def test_a_float32_export_is_the_original(
    load_golden: Callable[[str], Golden], name: str, use_past: bool, tmp_path: Path
):
    golden = load_golden(name)
    convert(GOLDENS / name, tmp_path / "model")
    options = ExportOptions("fp32", use_past=use_past)
    done = export_onnx(open_model_directory(tmp_path / "model"), tmp_path / "lite", options)
    model, arrays = visualglm.load(done.path), golden.arrays
    logits = model.logits(arrays["input_ids"], golden.pixels, golden.image_start)
    assert np.abs(logits - arrays["logits"]).max() < 2e-5
    expected = arrays["gen0_ids"].tolist()
    unused = next(token for token in range(100) if token not in expected)
    found = model.generate_ids(
        golden.prompt, golden.pixels, golden.image_start, max_new_tokens=len(expected), eos_token_id=unused
    )
    assert found == [expected]


def test_a_float32_export_is_torch_on_ragged_batches(random_model: Path, exported: Callable[[str], VisualGLM]):
    torch, onnx = visualglm.load(random_model, backend="torch", device="cpu"), exported("fp32")
    for seed in range(5):
        ids, starts, pixels = prompts(14, 23, 31, 12, seed=seed)
        text = ids != 3
        difference = np.abs(torch.logits(ids, pixels, starts) - onnx.logits(ids, pixels, starts))
        assert difference[text].max() < 2e-5
        given = {"max_new_tokens": 20}
        assert onnx.generate_ids(ids, pixels, starts, **given) == torch.generate_ids(ids, pixels, starts, **given)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_is_in_a_batch_what_it_is_alone(exported: Callable[[str], VisualGLM], form: str):
    model = exported(form)
    ids, starts, pixels = prompts(14, 23, 31, 12, seed=1)
    together = model.generate_ids(ids, pixels, starts, max_new_tokens=20)
    images = iter(pixels)
    for row, start in enumerate(starts):
        pad = int(np.argmax(ids[row] != 3))
        picture = None if start is None else next(images)[None]
        alone = model.generate_ids(
            ids[row : row + 1, pad:], picture, None if start is None else start - pad, max_new_tokens=20
        )
        assert alone == [together[row]]


@pytest.mark.parametrize("form", FORMS)
def test_steps_with_a_cache_are_the_whole_prompt_run_again(exported: Callable[[str], VisualGLM], form: str):
    """To rounding with a float cache; an int8 cache rounds what a prompt that is longer would round otherwise."""
    model = exported(form)
    ids, starts, pixels = prompts(20, 26, seed=2)
    answers = model.generate_ids(ids, pixels, starts, max_new_tokens=6, eos_token_id=0)
    longer = np.concatenate([ids, np.array(answers)], axis=1)
    again = model.logits(longer, pixels, starts)[:, ids.shape[1] - 1 : -1]
    likeliest = again.argmax(axis=-1)
    rounds_cache = "int8 cache" in form or form in ("int8", "int4")
    assert (likeliest == np.array(answers)).mean() >= (0.8 if rounds_cache else 1.0)


def test_rows_that_have_ended_leave_the_cache(exported: Callable[[str], VisualGLM]):
    """Each row stops at a token of its own; what the others say does not change."""
    model = exported("int8")
    ids, starts, pixels = prompts(14, 23, 31, 12, seed=4)
    whole = model.generate_ids(ids, pixels, starts, max_new_tokens=16, eos_token_id=0)
    ended = model.generate_ids(ids, pixels, starts, max_new_tokens=16, eos_token_id=whole[1][5])
    for row, answer in enumerate(whole):
        stop = answer.index(whole[1][5]) if whole[1][5] in answer else len(answer)
        assert ended[row] == answer[:stop]


@pytest.mark.parametrize(("form", "bound"), [("fp32, int8 cache", 0.02), ("int8", 0.05), ("int4", 0.35)])
def test_quantised_logits_are_near_those_of_float32(exported: Callable[[str], VisualGLM], form: str, bound: float):
    """Root mean square of the difference as a share of that of the logits, on prompts of a random model."""
    ids, starts, pixels = prompts(14, 23, 31, 12, seed=5)
    expected, found = (exported(each).logits(ids, pixels, starts)[ids != 3] for each in ("fp32", form))
    assert np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()) < bound


def test_the_cache_lies_where_it_was_made(exported: Callable[[str], VisualGLM]):
    """No copy a step: the buffers stay the same memory, and hold what was stored."""
    backend = exported("fp32").backend
    assert isinstance(backend, OnnxBackend)
    ids, starts, pixels = prompts(12, seed=6)
    layout, embeds = exported("fp32")._from_ids(ids, pixels, starts)
    _, cache = backend.prefill(layout, embeds, 20)
    before = {name: (buffer.data_ptr(), buffer.numpy()[:, :, :12].copy()) for name, buffer in cache.buffers.items()}
    backend.step(np.array([17]), layout, cache)
    assert cache.length == 13
    for name, buffer in cache.buffers.items():
        place, stored = before[name]
        assert buffer.data_ptr() == place
        np.testing.assert_array_equal(buffer.numpy()[:, :, :12], stored)
        assert np.abs(buffer.numpy()[:, :, 12]).max() > 0


@pytest.mark.parametrize(
    ("device", "message"),
    [("tpu", "The device 'tpu' is unknown to the onnx backend"), ("cuda:7", "needs CUDAExecutionProvider, which")],
)
def test_a_device_that_is_not_there(device: str, message: str):
    with pytest.raises(DeviceError, match=message):
        Device(device)
