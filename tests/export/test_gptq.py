"""GPTQ against the search for scales alone, by what happens to a layer's outputs."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.export.blocks import Floats, builtin_linear_weights, heavy_tailed, product
from visualglm.errors import CheckpointError, ConfigError
from visualglm.export.gptq import _factorize, _invert_triangle, gptq
from visualglm.export.quantize import Bits, quantize_blocks


def correlated_hessian(size: int, seed: int = 0) -> NDArray[np.float64]:
    """Of inputs of which a few directions hold most, as hidden states do: eigenvalues fall as 1 / rank."""
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.normal(size=(size, size)))[0]
    return (directions / np.arange(1, size + 1)) @ directions.T


def output_error(weight: Floats, approximate: Floats, hessian: NDArray[np.float64]) -> float:
    """Squared error of the outputs as a share of their square."""
    difference = weight - approximate
    return float(((difference @ hessian) * difference).sum() / ((weight @ hessian) * weight).sum())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_outputs_are_nearer_than_by_search(bits: Bits, symmetric: bool):
    weight, hessian = heavy_tailed(300, 256), correlated_hessian(256)
    searched = quantize_blocks(weight, bits, 32, "search", np.diag(hessian), symmetric=symmetric)
    feeding_back = gptq(weight, hessian, bits, 32, symmetric=symmetric)
    errors = [output_error(weight, each.dequantize(), hessian) for each in (searched, feeding_back)]
    assert errors[1] < 0.7 * errors[0]
    assert feeding_back.error == pytest.approx(errors[1], rel=0.1)  # but for the damping


def test_every_layer_of_the_builtin_model_gains(builtin_model_dir: Path):
    for name, weight in builtin_linear_weights(builtin_model_dir).items():
        hessian = correlated_hessian(weight.shape[1])
        searched = quantize_blocks(weight, 4, 32, "search", np.diag(hessian))
        feeding_back = gptq(weight, hessian, 4, 32)
        errors = [output_error(weight, each.dequantize(), hessian) for each in (searched, feeding_back)]
        assert errors[1] < 0.75 * errors[0], name


def test_inputs_that_are_not_correlated_leave_nothing_to_feed_back():
    weight, energy = heavy_tailed(64, 128), np.random.default_rng(1).lognormal(0, 1, 128)
    alone = quantize_blocks(weight, 4, 32, "search", energy + 0.01 * energy.mean(), symmetric=False)
    feeding_back = gptq(weight, np.diag(energy), 4, 32, symmetric=False)
    assert feeding_back.error == pytest.approx(alone.error, rel=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("columns", "block_size"), [(80, 32), (24, 64), (7, 16), (129, 128)])
def test_odd_widths_are_multiplied_by_onnx_runtime(bits: Bits, columns: int, block_size: int):
    weight, hessian = heavy_tailed(11, columns), correlated_hessian(columns)
    packed = gptq(weight, hessian, bits, block_size)
    assert packed.shape == weight.shape
    x = heavy_tailed(3, columns, seed=1)
    expected = x @ packed.dequantize().T
    np.testing.assert_allclose(product(x, packed), expected, atol=1e-4 * np.abs(expected).max(), rtol=0)
    searched = quantize_blocks(weight, bits, block_size)
    errors = [output_error(weight, each.dequantize(), hessian) for each in (searched, packed)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e37])
def test_magnitude_does_not_matter(magnitude: float):
    weight, hessian = np.clip(heavy_tailed(40, 64), -10, 10), correlated_hessian(64)
    usual = gptq(weight, hessian, 4, 32, symmetric=False)
    scaled = gptq(weight * np.float32(magnitude), hessian * 1e30, 4, 32, symmetric=False)
    assert scaled.error == pytest.approx(usual.error, rel=0.02)
    assert np.isfinite(scaled.dequantize()).all()


def test_zeros_and_inputs_that_never_occur():
    weight, hessian = heavy_tailed(8, 96), correlated_hessian(96)
    weight[:, 64:] = 0
    hessian[5], hessian[:, 5] = 0, 0
    packed = gptq(weight, hessian, 4, 32)
    assert output_error(weight, packed.dequantize(), hessian) < 0.01
    assert not gptq(np.zeros_like(weight), hessian, 4, 32).dequantize().any()


@pytest.mark.parametrize("size", [1, 7, 256, 257, 700])
def test_factor_and_inverse_of_any_width(size: int):
    hessian = correlated_hessian(size) + 0.01 * np.eye(size)
    factor = hessian.copy()
    _factorize(factor)
    np.testing.assert_allclose(factor @ factor.T, hessian, atol=1e-12)
    np.testing.assert_array_equal(factor, np.triu(factor))
    inverse = factor.copy()
    _invert_triangle(inverse)
    np.testing.assert_allclose(inverse @ factor, np.eye(size), atol=1e-10)


def test_what_cannot_be_quantised_is_told():
    weight, hessian = heavy_tailed(8, 64), correlated_hessian(64)
    for bad in (np.eye(63), np.zeros((64, 64)), np.full((64, 64), np.nan)):
        with pytest.raises(ConfigError, match=r"Hessian of fc1 must be \[64, 64\]"):
            gptq(weight, bad, 4, 32, name="fc1")
    with pytest.raises(ConfigError, match="Hessian of fc1 is not positive"):
        gptq(weight, np.eye(64) + 2 * np.eye(64, k=1) + 2 * np.eye(64, k=-1), 4, 32, name="fc1")
    with pytest.raises(ConfigError, match="Blocks of 24"):
        gptq(weight, hessian, 4, 24)
    weight[3, 3] = np.nan
    with pytest.raises(CheckpointError, match="tensor fc1 holds values that are not finite"):
        gptq(weight, hessian, 4, 32, name="fc1")
