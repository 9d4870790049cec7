"""Blocks of whole numbers: what ONNX Runtime makes of them, how near they are, and what odd weights do to them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.export.blocks import Floats, builtin_linear_weights, heavy_tailed, product, run_operator
from visualglm.errors import CheckpointError, ConfigError
from visualglm.export.packed_weight import pack, unpack
from visualglm.export.quantize import Bits, Method, quantize_blocks, quantize_embedding

HUGE = np.finfo(np.float32).max


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("shape", "block_size"),
    [((48, 160), 32), ((48, 256), 128), ((11, 80), 32), ((11, 80), 16), ((7, 24), 64), ((1, 7), 16), ((5, 129), 128)],
)
def test_onnx_runtime_multiplies_by_what_is_dequantised(
    bits: Bits, symmetric: bool, shape: tuple[int, int], block_size: int
):
    weight = quantize_blocks(heavy_tailed(*shape), bits, block_size, symmetric=symmetric)
    blocks = -(-shape[1] // block_size)
    assert weight.shape == shape
    assert weight.data.shape == (shape[0], blocks, block_size * bits // 8)
    assert weight.scales.shape == (shape[0], blocks)
    if symmetric:
        assert weight.zero_points is None
    else:
        assert weight.zero_points is not None
        assert weight.zero_points.shape == (shape[0], -(-blocks * bits // 8))
    for batch in (1, 5):
        x = np.random.default_rng(batch).normal(size=(batch, shape[1])).astype(np.float32)
        expected = x @ weight.dequantize().T
        np.testing.assert_allclose(product(x, weight), expected, atol=1e-4 * np.abs(expected).max(), rtol=0)
        # With int8 activations, as exports use it.
        np.testing.assert_allclose(product(x, weight, 4), expected, atol=0.03 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize(("width", "block_size"), [(160, 32), (256, 128), (80, 32), (24, 32)])
def test_onnx_runtime_gathers_the_rows_that_were_quantised(width: int, block_size: int):
    table = heavy_tailed(40, width)
    embedding = quantize_embedding(table, block_size)
    assert embedding.data.shape == table.shape
    assert embedding.scales.shape == (40, -(-width // block_size))
    ids = np.array([[3, 0], [39, 3]])
    rows = run_operator(
        "GatherBlockQuantized",
        {"data": embedding.data, "ids": ids, "scales": embedding.scales},
        "ids",
        bits=8,
        block_size=block_size,
        gather_axis=0,
        quantize_axis=1,
    )
    scales = np.repeat(embedding.scales, block_size, axis=1)[:, :width]
    np.testing.assert_array_equal(rows, ((embedding.data.astype(np.float32) - 128) * scales)[ids])
    assert relative_error(table[ids], rows) < 3e-4
    assert embedding.error < 2e-4


def relative_error(weight: Floats, approximate: Floats, energy: Floats | float = 1.0) -> float:
    return float((energy * (weight - approximate) ** 2).sum() / (energy * weight**2).sum())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", ["rtn", "search"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [256, 80])
def test_the_error_is_that_of_the_dequantised_weight(bits: Bits, method: Method, symmetric: bool, columns: int):
    weight = heavy_tailed(900, columns)
    energy = np.random.default_rng(1).lognormal(0, 1, columns).astype(np.float32)
    plain = quantize_blocks(weight, bits, 32, method, symmetric=symmetric)
    assert plain.error == pytest.approx(relative_error(weight, plain.dequantize()), rel=1e-3)
    weighted = quantize_blocks(weight, bits, 32, method, energy, symmetric=symmetric)
    assert weighted.error == pytest.approx(relative_error(weight, weighted.dequantize(), energy), rel=1e-3)


def test_rounding_to_nearest_is_what_onnx_runtime_does_itself():
    # Worked by hand: symmetric codes map the largest magnitude to -8; asymmetric ones span the range with 15 steps.
    weight = np.array([[-4.0, 3.5, 1.0, 0.2] * 4, [0.0, 7.5, 3.0, 1.2] * 4], np.float32)
    symmetric = quantize_blocks(weight, 4, 16, "rtn", symmetric=True)
    np.testing.assert_array_equal(symmetric.scales, np.float32([[4 / 8], [-7.5 / 8]]))
    np.testing.assert_array_equal(unpack(symmetric.data, 4)[:, 0, :4], [[0, 15, 10, 8], [8, 0, 5, 7]])
    asymmetric = quantize_blocks(weight, 4, 16, "rtn", symmetric=False)
    np.testing.assert_array_equal(asymmetric.scales, np.float32([[0.5], [0.5]]))
    np.testing.assert_array_equal(asymmetric.zero_points, [[8], [0]])
    np.testing.assert_array_equal(unpack(asymmetric.data, 4)[:, 0, :4], [[0, 15, 10, 8], [0, 15, 6, 2]])


@pytest.mark.parametrize(
    ("bits", "block_size", "symmetric", "rtn", "gain"),
    [
        (4, 32, True, 1.321e-2, 0.935),
        (4, 32, False, 9.288e-3, 0.95),
        (4, 128, True, 2.859e-2, 0.875),
        (4, 128, False, 2.110e-2, 0.91),
        (8, 32, True, 5.489e-5, 0.98),
        (8, 32, False, 3.281e-5, 0.97),
        (8, 128, True, 1.236e-4, 0.992),
        (8, 128, False, 7.571e-5, 0.99),
    ],
)
def test_search_beats_rounding_to_nearest(bits: Bits, block_size: int, symmetric: bool, rtn: float, gain: float):
    weight = heavy_tailed(512, 1024)
    nearest = quantize_blocks(weight, bits, block_size, "rtn", symmetric=symmetric)
    searched = quantize_blocks(weight, bits, block_size, "search", symmetric=symmetric)
    assert nearest.error == pytest.approx(rtn, rel=0.01)
    assert searched.error < gain * nearest.error


@pytest.mark.parametrize("bits", [4, 8])
def test_search_knows_what_matters(bits: Bits):
    weight = heavy_tailed(256, 512)
    energy = np.random.default_rng(1).lognormal(0, 1.5, 512).astype(np.float32)
    blind = relative_error(weight, quantize_blocks(weight, bits, 32).dequantize(), energy)
    knowing = quantize_blocks(weight, bits, 32, "search", energy)
    assert knowing.error < 0.85 * blind


def test_search_beats_rounding_on_every_layer_of_the_builtin_model(builtin_model_dir: Path):
    for name, weight in builtin_linear_weights(builtin_model_dir).items():
        errors = [quantize_blocks(weight, 4, 32, method).error for method in ("rtn", "search")]
        assert errors[1] < 0.96 * errors[0], name


def test_the_smaller_error_decides_about_zero_points():
    lopsided = np.abs(heavy_tailed(64, 256))
    assert quantize_blocks(lopsided, 4, 32).zero_points is not None
    assert quantize_blocks(np.zeros((4, 64), np.float32), 4, 32).zero_points is None


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_that_lie_on_a_grid_are_found_on_it(symmetric: bool):
    codes = np.random.default_rng(0).integers(-8, 8, (64, 256)).astype(np.float32)
    codes[:, ::32], codes[:, 1::32] = -8, 7
    np.testing.assert_allclose(
        quantize_blocks(codes / 3, 4, 32, symmetric=symmetric).dequantize(), codes / 3, rtol=1e-6
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", ["rtn", "search"])
@pytest.mark.parametrize("symmetric", [True, False, None])
def test_zeros_stay_zeros(bits: Bits, method: Method, symmetric: bool | None):
    weight = heavy_tailed(6, 96)
    weight[0] = 0
    weight[1:, 32:64] = 0
    packed = quantize_blocks(weight, bits, 32, method, symmetric=symmetric)
    assert not packed.dequantize()[weight == 0].any()
    assert relative_error(weight, packed.dequantize()) < 0.02
    nothing = quantize_blocks(np.zeros_like(weight), bits, 32, method, symmetric=symmetric)
    assert not nothing.dequantize().any()
    assert nothing.error == 0


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ["rtn", "search"])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1e30, 3e37])
def test_magnitude_does_not_matter(bits: Bits, symmetric: bool, method: Method, magnitude: float):
    weight = np.clip(heavy_tailed(32, 64), -10, 10)
    usual = quantize_blocks(weight, bits, 32, method, symmetric=symmetric)
    scaled = quantize_blocks(weight * np.float32(magnitude), bits, 32, method, symmetric=symmetric)
    assert scaled.error == pytest.approx(usual.error, rel=1e-2)
    np.testing.assert_allclose(scaled.scales, usual.scales * np.float32(magnitude), rtol=0.05)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ["rtn", "search"])
def test_the_extremes_of_float32_neither_overflow_nor_fail(bits: Bits, symmetric: bool, method: Method):
    weight = np.zeros((5, 32), np.float32)
    weight[0, :2] = HUGE, -HUGE
    weight[1] = HUGE
    weight[2] = -HUGE
    weight[3] = np.finfo(np.float32).smallest_subnormal
    weight[4] = np.linspace(-1, 0.9, 32) * HUGE
    packed = quantize_blocks(weight, bits, 32, method, symmetric=symmetric)
    assert np.isfinite(packed.dequantize()).all()
    np.testing.assert_allclose(packed.dequantize()[:3] / HUGE, weight[:3] / HUGE, atol=0.13 if bits == 4 else 0.008)
    assert 0 < packed.error < 0.02


def test_a_constant_block_is_exact():
    weight = np.repeat(np.float32([[0.3], [-0.3], [5e-3]]), 32, axis=1)
    for symmetric in (True, False):
        np.testing.assert_allclose(quantize_blocks(weight, 4, 32, symmetric=symmetric).dequantize(), weight, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_weights_of_other_float_types_are_read_as_they_are(dtype: type[np.floating[Any]]):
    weight = heavy_tailed(64, 96).astype(np.float16)
    expected = quantize_blocks(weight.astype(np.float32), 4, 32)
    packed = quantize_blocks(weight.astype(dtype), 4, 32)
    np.testing.assert_array_equal(packed.data, expected.data)
    np.testing.assert_array_equal(packed.scales, expected.scales)


def test_tiles_and_threads_change_nothing():
    weight = heavy_tailed(700, 288)
    whole = quantize_blocks(weight, 4, 32, symmetric=False, threads=3)
    row = quantize_blocks(weight[650:651], 4, 32, symmetric=False, threads=1)
    np.testing.assert_array_equal(whole.data[650:651], row.data)
    np.testing.assert_allclose(whole.scales[650:651], row.scales, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_not_finite_is_named(bad: float, bits: Bits):
    weight = heavy_tailed(2000, 64)
    weight[1999, 40] = bad
    with pytest.raises(CheckpointError, match=r"tensor text\.lm_head\.weight holds values that are not finite"):
        quantize_blocks(weight, bits, 32, symmetric=False, name="text.lm_head.weight")
    with pytest.raises(CheckpointError, match=r"tensor words holds values that are not finite"):
        quantize_embedding(weight, 32, name="words")


def test_what_cannot_be_quantised_is_told():
    weight = heavy_tailed(4, 64)
    with pytest.raises(CheckpointError, match=r"bias has the shape \[64\]"):
        quantize_blocks(weight[0], 4, 32, name="bias")
    with pytest.raises(CheckpointError, match=r"shape \[0, 64\]"):
        quantize_blocks(weight[:0], 4, 32)
    for block_size in (0, 8, 48):
        with pytest.raises(ConfigError, match=f"Blocks of {block_size} weights .* power of two from 16"):
            quantize_blocks(weight, 4, block_size)
    for energy in (np.ones(63), np.full(64, np.nan), -np.ones(64)):
        with pytest.raises(ConfigError, match="64 finite numbers that are not negative"):
            quantize_blocks(weight, 4, 32, "search", energy)


def test_inputs_that_calibration_never_saw_still_count():
    weight = heavy_tailed(64, 64)
    energy = np.zeros(64)
    assert quantize_blocks(weight, 4, 32, "search", energy).error < 0.01
    energy[:32] = 1
    packed = quantize_blocks(weight, 4, 32, "search", energy)
    assert relative_error(weight[:, 32:], packed.dequantize()[:, 32:]) < 0.01


def test_bytes_hold_the_first_code_in_the_low_half():
    codes = np.array([[1, 2, 3]], np.uint8)
    np.testing.assert_array_equal(pack(codes, 4), [[0x21, 0x03]])
    np.testing.assert_array_equal(unpack(pack(codes, 4), 4), [[1, 2, 3, 0]])
    np.testing.assert_array_equal(unpack(pack(codes, 8), 8), codes)
