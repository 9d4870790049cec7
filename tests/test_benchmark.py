"""The benchmark: its random models, and the figures that follow from sizes rather than from speed."""

from pathlib import Path

import numpy as np
import pytest

import visualglm
from visualglm.benchmark import (
    PRESETS,
    Plan,
    measure_model,
    peak_memory,
    random_prompt,
    step_bytes,
    stolen_share,
    write_random_model,
)
from visualglm.checkpoint.model_dir import verify
from visualglm.config import VisualGLMConfig
from visualglm.errors import CheckpointError, ConfigError
from visualglm.parameters import parameter_count

TINY = PRESETS["tiny"]
PLAN = Plan(repeats=2, steps=2)


@pytest.fixture(scope="module")
def random_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("benchmark") / "tiny", TINY).path


def test_a_random_model_is_a_whole_model_directory(random_model_dir: Path):
    assert verify(random_model_dir).parameter_count == parameter_count(TINY)
    model = visualglm.load(random_model_dir, device="cpu")
    ids = np.array([[10, 11, TINY.text.gmask_token_id, TINY.text.bos_token_id]])
    logits = model.logits(ids)
    assert np.isfinite(logits).all() and logits.std() > 0


def test_random_weights_do_not_replace_anything(random_model_dir: Path):
    with pytest.raises(CheckpointError, match="not empty"):
        write_random_model(random_model_dir, TINY)


def test_figures(random_model_dir: Path):
    stages: list[str] = []
    result = measure_model(random_model_dir, PLAN, device="cpu", dtype="bfloat16", threads=1, tell=stages.append)
    figures = {figure.name: figure for figure in result.figures}
    assert len(figures) == len(result.figures) == 16 and len(stages) == 6
    assert (result.threads, result.parameters) == (1, parameter_count(TINY))
    assert all(np.isfinite(figure.value) for figure in result.figures)
    assert figures["weights"].value == pytest.approx(2e-9 * parameter_count(TINY))
    first, second = figures["decoding, batch 1, context 128"].value, figures["decoding, batch 1"].value
    assert first * second == pytest.approx(1000)
    read, bandwidth = figures["read for a token"].value, figures["read bandwidth meanwhile"].value
    share = 100 * read / (first / 1000) / bandwidth
    assert figures["share of the read bandwidth"].value == pytest.approx(share, rel=0.9)
    assert figures["weights"].value < figures["peak memory"].value <= figures["peak memory, with the batches"].value


def test_bytes_of_the_released_size():
    """12.35 GB of weights, and 458,752 bytes for each token in the cache."""
    config = VisualGLMConfig()
    empty = step_bytes(config, 0, 2)
    assert empty == 12_346_572_800
    assert step_bytes(config, 130, 2) - empty == 130 * 458_752
    assert step_bytes(config, 0, 4) == 2 * empty


def test_prompts_have_the_length_that_is_told():
    slots = TINY.qformer.num_query_tokens
    layout = random_prompt(TINY, 64, has_image=True)
    assert layout.sequence_length == 64 + slots
    assert (layout.image_starts[0], layout.context_lengths[0]) == (0, 63 + slots)
    assert random_prompt(TINY, 64, has_image=False).sequence_length == 64
    with pytest.raises(ConfigError, match="window is 512"):
        random_prompt(TINY, 500, has_image=True)


def test_a_model_with_a_window_too_small_is_refused(tiny_model_dir: Path):
    with pytest.raises(ConfigError, match="window"):
        measure_model(tiny_model_dir, Plan(context=1000), device="cpu")


def test_peak_memory_grows_with_what_is_touched():
    before = peak_memory()
    block = np.ones(before // 8 + (32 << 20), np.float64)
    assert peak_memory() >= block.nbytes > before


def test_stolen_time_is_a_share():
    class Times(tuple[float, ...]):
        steal = 0.0

    before, after = Times((10.0, 5.0, 0.0)), Times((16.0, 7.0, 2.0))
    after.steal = 2.0
    assert stolen_share(before, after) == pytest.approx(0.2)
