"""The benchmark: its random models, and the figures that follow from sizes rather than from speed."""

from pathlib import Path

import numpy as np
import pytest

import visualglm
from visualglm.bandwidth import CpuReadBandwidth
from visualglm.benchmark import (
    Decoding,
    Figure,
    Plan,
    Result,
    export_step_bytes,
    load_subject,
    measure_model,
    peak_memory,
    random_prompt,
    step_bytes,
    stolen_share,
)
from visualglm.checkpoint.lite_dir import LiteDirectory
from visualglm.checkpoint.model_dir import open_model_directory, verify
from visualglm.config import VisualGLMConfig
from visualglm.errors import CheckpointError, ConfigError
from visualglm.export.onnx import ExportOptions, export_onnx
from visualglm.loading import choose
from visualglm.parameters import parameter_count
from visualglm.random_model import PRESETS, write_random_model

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


@pytest.fixture(scope="module", params=[("int4", True), ("fp32", False)], ids=["int4", "fp32 without a cache"])
def random_export(request: pytest.FixtureRequest, random_model_dir: Path, tmp_path_factory: pytest.TempPathFactory):
    precision, use_past = request.param
    path = tmp_path_factory.mktemp("export") / precision
    return export_onnx(open_model_directory(random_model_dir), path, ExportOptions(precision, use_past, method="rtn"))


def by_name(result: Result) -> dict[str, Figure]:
    """The figures, once it is clear that they belong together."""
    figures = {figure.name: figure for figure in result.figures}
    assert len(figures) == len(result.figures) == 16
    assert (result.threads, result.parameters) == (1, parameter_count(TINY))
    assert all(np.isfinite(figure.value) for figure in result.figures)
    first, second = figures["decoding, batch 1, context 128"].value, figures["decoding, batch 1"].value
    assert first * second == pytest.approx(1000)
    read, bandwidth = figures["read for a token"].value, figures["read bandwidth meanwhile"].value
    share = 100 * read / (first / 1000) / bandwidth
    assert figures["share of the read bandwidth"].value == pytest.approx(share, rel=0.9)
    assert figures["weights"].value < figures["peak memory"].value <= figures["peak memory, with the batches"].value
    return figures


def test_figures_of_torch(random_model_dir: Path):
    stages: list[str] = []
    choice = choose(random_model_dir, backend="torch", device="cpu", dtype="bfloat16")
    result = measure_model(choice, PLAN, threads=1, tell=stages.append)
    assert (len(stages), result.backend, result.model) == (6, "torch on cpu, bfloat16", str(random_model_dir))
    figures = by_name(result)
    assert figures["weights"].value == pytest.approx(2e-9 * parameter_count(TINY))
    # Behind a block to warm up, in the middle of the two that are measured.
    columns = PLAN.context + 2 * PLAN.steps
    assert 1e9 * figures["read for a token"].value == pytest.approx(step_bytes(TINY, columns, 2))


def test_figures_of_an_export(random_export: LiteDirectory):
    choice = choose(random_export.path, backend="auto", device="auto", dtype="auto")
    result = measure_model(choice, PLAN, threads=1)
    assert result.backend == f"onnx on cpu, {random_export.manifest.precision}"
    figures = by_name(result)
    assert figures["weights"].value == pytest.approx(1e-9 * random_export.weights_bytes)


def test_the_threads_are_those_of_every_day(random_export: LiteDirectory):
    """A small model is loaded with one thread, on however many cores; and so it is measured."""
    choice = choose(random_export.path, backend="auto", device="cpu", dtype="auto")
    assert load_subject(choice).backend.threads == choice.load().backend.threads == 1
    assert load_subject(choice, threads=2).backend.threads == 2


def test_what_an_export_reads_for_a_token(random_export: LiteDirectory):
    stored = (random_export.path / "decoder.onnx.data").stat().st_size
    text = TINY.text
    if random_export.manifest.use_past:
        assert export_step_bytes(random_export, 0) == stored
        # Keys and values of one byte.
        cache = 2 * text.num_hidden_layers * text.hidden_size * 130
        assert export_step_bytes(random_export, 130) == stored + cache
    else:
        # Widened from bfloat16 to float32, and there is no cache.
        assert export_step_bytes(random_export, 130) == step_bytes(TINY, 0, 4) > stored


def test_decoding_stays_near_its_context(random_export: LiteDirectory):
    """Batches go on where single rows stopped, and all begin again before the context is half as long again."""
    choice = choose(random_export.path, backend="onnx", device="cpu", dtype="auto")
    decoding = Decoding(load_subject(choice, threads=1).backend, context=128, steps=30)
    columns = []
    for batch_size in (1, 3):
        decoding.spread(batch_size)
        for _ in range(3):
            assert decoding.seconds_per_step() > 0
            columns.append(decoding.columns)
    assert columns == [158, 188, 158, 188, 158, 188]


@pytest.mark.parametrize("threads", [1, 3])
def test_the_read_bandwidth_is_that_of_a_machine(threads: int):
    assert 1e8 < CpuReadBandwidth(threads).measure() < 1e13


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
    choice = choose(tiny_model_dir, backend="torch", device="cpu", dtype="auto")
    with pytest.raises(ConfigError, match="needs 1004 tokens, but the model's window is 192"):
        measure_model(choice, Plan(context=1000))


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
