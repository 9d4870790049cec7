"""The MindSpore backend by itself: cache, batches, graphs, precisions, and whose memory the weights lie in."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore.graph.api import ms_compile_cache
from numpy.typing import NDArray

import visualglm
from tests.mindspore.conftest import MODES
from tests.ragged import STARTS, close, layout_of, random_pixels, random_rows
from visualglm.backends.mindspore.backend import MindSporeBackend, padded_layout
from visualglm.backends.mindspore.load import load_mindspore_backend, new_model
from visualglm.checkpoint.model_dir import ModelDirectory, open_model_directory
from visualglm.checkpoint.tensors import LazyTensor
from visualglm.config import VisualGLMConfig
from visualglm.errors import CheckpointError, DeviceError
from visualglm.parameters import parameter_shapes
from visualglm.processing.layout import Layout


@pytest.fixture(scope="module")
def directory(tiny_model_dir: Path) -> ModelDirectory:
    return open_model_directory(tiny_model_dir)


@pytest.fixture
def backend(load_backend: Callable[..., MindSporeBackend], directory: ModelDirectory, mode: str) -> MindSporeBackend:
    return load_backend(directory, mode)


@pytest.fixture(scope="module")
def pixels(tiny_config: VisualGLMConfig) -> NDArray[np.float32]:
    return random_pixels(tiny_config)


@pytest.fixture(scope="module")
def rows(tiny_config: VisualGLMConfig) -> list[list[int]]:
    return random_rows(tiny_config)


@pytest.fixture(scope="module")
def make_layout(tiny_config: VisualGLMConfig) -> Callable[..., Layout]:
    return partial(layout_of, tiny_config)


def test_a_batch_is_its_rows(backend, make_layout, rows, pixels):
    embeds = backend.encode_images(pixels)
    logits = backend.logits(make_layout(rows), embeds)
    image = iter(embeds)
    for row, (ids, start) in enumerate(zip(rows, STARTS, strict=True)):
        alone = backend.logits(make_layout([ids], (start,)), [] if start is None else [next(image)])
        close(logits[row, -len(ids) :], alone[0])


def test_a_batch_is_what_torch_makes_of_it(backend, make_layout, rows, pixels, tiny_model_dir):
    torch_backend = visualglm.load(tiny_model_dir, backend="torch", device="cpu").backend
    layout = make_layout(rows)
    found, expected = (each.logits(layout, each.encode_images(pixels)) for each in (backend, torch_backend))
    text = np.arange(layout.sequence_length) >= layout.pad_lengths[:, None]
    close(found[text], expected[text])


def test_cached_steps_are_the_whole_text_at_once(backend, make_layout, rows, pixels):
    embeds, prompts = backend.encode_images(pixels), make_layout(rows)
    more = np.random.default_rng(2).integers(20, 100, (len(rows), 5))
    logits, cache = backend.prefill(prompts, embeds, prompts.sequence_length + 5)
    found = [logits, *(backend.step(more[:, step], prompts, cache) for step in range(5))]
    whole = make_layout([ids + new for ids, new in zip(rows, more.tolist(), strict=True)])
    close(np.stack(found, axis=1), backend.logits(whole, embeds)[:, -6:])
    assert cache.length == whole.sequence_length


@pytest.mark.parametrize("order", [[3, 0], [1, 1, 2, 1, 0]])
def test_kept_rows_go_on_as_if_alone_in_any_order(order, backend, make_layout, rows, pixels):
    embeds, prompts = backend.encode_images(pixels), make_layout(rows)
    tokens, order = np.array([30, 31, 32, 33]), np.array(order)
    _, full = backend.prefill(prompts, embeds, prompts.sequence_length + 3)
    _, cache = backend.prefill(prompts, embeds, prompts.sequence_length + 3)
    expected = [backend.step(tokens + step, prompts, full) for step in range(3)]
    cache.keep_rows(order)
    kept = prompts.keep_rows(order)
    for step in range(2):
        close(backend.step(tokens[order] + step, kept, cache), expected[step][order])
    cache.keep_rows(np.array([1]))
    close(backend.step(tokens[order[1:2]] + 2, kept.keep_rows(np.array([1])), cache), expected[2][order[1:2]])


def test_more_padding_changes_nothing_but_places(make_layout, rows):
    layout = make_layout(rows)
    padded = padded_layout(layout, rows=8, columns=32, pad_token_id=3)
    assert padded.input_ids.shape == (8, 32)
    more = 32 - layout.sequence_length
    np.testing.assert_array_equal(padded.position_ids()[:4, :, more:], layout.position_ids())
    np.testing.assert_array_equal(padded.attention_mask()[:4, more:, more:], layout.attention_mask())
    assert padded.image_starts.tolist() == [more + 6, -1, more + 2, -1, -1, -1, -1, -1]


def test_graphs_are_compiled_twice_and_never_for_a_step(directory, make_layout, rows, pixels):
    """Counted by MindSpore too: for a batch, then for others of like lengths, whose rows end one by one."""
    backend = load_mindspore_backend(directory, "cpu")
    embeds, before = backend.encode_images(pixels), len(ms_compile_cache)
    for kept in (rows, [ids[1:] for ids in rows], rows[:3]):
        layout = make_layout(kept, STARTS[: len(kept)])
        logits, cache = backend.prefill(layout, embeds, layout.sequence_length + 40)
        for step in range(12):
            if step in (3, 6):
                going = np.arange(layout.batch_size - 1)
                cache.keep_rows(going)
                layout, logits = layout.keep_rows(going), logits[going]
            logits = backend.step(logits.argmax(-1), layout, cache)
        assert backend.compilations == len(ms_compile_cache) - before == 2
    assert "graph" in backend.description


def test_operator_by_operator_nothing_is_compiled(load_backend, directory, make_layout, rows, pixels):
    backend, before = load_backend(directory, "eager"), len(ms_compile_cache)
    backend.logits(make_layout(rows), backend.encode_images(pixels))
    assert backend.compilations == 0 == len(ms_compile_cache) - before
    assert "eager" in backend.description


def test_parameters_are_those_of_the_list(load_backend, directory):
    found = {name: tuple(cell.shape) for name, cell in load_backend(directory, "eager").model.parameters_and_names()}
    assert found == parameter_shapes(directory.config)


def tensors_of(config: VisualGLMConfig, dtype: str) -> dict[str, LazyTensor]:
    arrays = {name: np.zeros(shape, dtype) for name, shape in parameter_shapes(config).items()}
    return {name: LazyTensor(dtype, array.shape, lambda array=array: array) for name, array in arrays.items()}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_weights_are_used_where_they_lie(dtype, tiny_config):
    """What is written to the array afterwards shows in the parameter."""
    tensors = tensors_of(tiny_config, dtype)
    parameters = dict(new_model(tiny_config, tensors, dtype).parameters_and_names())
    for name, tensor in tensors.items():
        tensor.array().flat[0] = 5
        assert parameters[name].asnumpy().flat[0] == 5 and parameters[name].dtype == getattr(ms, dtype), name


def test_weights_that_do_not_fit(tiny_config):
    tensors = tensors_of(tiny_config, "float32")
    tensors["vision.more"] = tensors.pop("text.norm.bias")
    with pytest.raises(CheckpointError, match=r"do not fit the model: text\.norm\.bias, vision\.more are on one side"):
        new_model(tiny_config, tensors, "float32")


def test_float16_agrees_loosely(directory, load_backend, make_layout, rows, pixels):
    half = load_mindspore_backend(directory, "cpu", "float16", compiled=False)
    assert half.description == "mindspore on cpu, float16, eager"
    layout = make_layout(rows)
    exact, found = (
        each.logits(layout, each.encode_images(pixels)) for each in (load_backend(directory, "eager"), half)
    )
    text = np.arange(layout.sequence_length) >= layout.pad_lengths[:, None]
    assert found.dtype == np.float32
    assert 0 < np.abs(found - exact)[text].max() / np.abs(exact)[text].max() < 0.005


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "ascend"}, r"The device 'ascend:0' cannot be used by the installed MindSpore 2\.10"),
        ({"device": "cuda"}, r"The device 'cuda' is unknown to the mindspore backend; give auto, cpu or ascend\."),
        ({"device": "cpu:1"}, r"The device 'cpu:1' is not there: the CPU is one device; leave the number out\."),
        ({"dtype": "bfloat16"}, r"MindSpore has no bfloat16 on a CPU; give float32, or float16"),
        ({"dtype": "int8"}, r"The mindspore backend has no int8; give --backend onnx, or another precision\."),
    ],
)
def test_what_is_not_to_be_had(options, message, tiny_model_dir):
    with pytest.raises(DeviceError, match=message):
        visualglm.load(tiny_model_dir, backend="mindspore", **options)


@pytest.mark.parametrize("mode", MODES)
def test_memory_that_runs_out_is_told(mode, load_backend, directory, make_layout, rows):
    backend = load_backend(directory, mode)
    with pytest.raises(DeviceError, match=r"The memory ran out .*; use a smaller batch"):
        backend.prefill(make_layout(rows[1:2], (None,)), [], capacity=10**12)


def test_too_large_a_model_is_told_before_it_is_loaded(directory, monkeypatch):
    monkeypatch.setattr("visualglm.backends.mindspore.load.available_memory", lambda: 2**20)
    with pytest.raises(DeviceError, match=r"^The model takes .*, but this machine has 1 MiB left; close other"):
        load_mindspore_backend(directory, "cpu")
