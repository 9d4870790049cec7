"""The frozen base of qlora: the weights it means, its product and the gradient that flows through it."""

import numpy as np
import pytest
import torch
from torch import Tensor

from visualglm.backends.torch.quantized_linear import Bits, QuantizedLinear
from visualglm.export.packed_weight import QuantizedWeight
from visualglm.export.quantize import quantize_blocks

# The last block of a row is not full, and there is more than one tile.
INPUTS, OUTPUTS, BLOCK = 1000, 700, 64


def quantized(bits: Bits, symmetric: bool = False) -> QuantizedWeight:
    weight = np.random.default_rng(0).normal(0, 0.02, (OUTPUTS, INPUTS)).astype(np.float32)
    return quantize_blocks(weight, bits, BLOCK, symmetric=symmetric)


def layer_of(weight: QuantizedWeight) -> QuantizedLinear:
    data, scales, zeros = (torch.from_numpy(array) for array in (weight.data, weight.scales, weight.zeros()))
    bias = torch.linspace(-1, 1, OUTPUTS)
    return QuantizedLinear(data, scales, zeros, bias, bits=weight.bits, in_features=weight.in_features)


def inputs(dtype: torch.dtype) -> Tensor:
    return torch.randn(2, 3, INPUTS, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_it_means_what_was_quantised(bits: Bits, symmetric: bool) -> None:
    weight = quantized(bits, symmetric)
    layer = layer_of(weight)
    np.testing.assert_array_equal(layer.rows(slice(None)).numpy(), weight.dequantize())
    np.testing.assert_array_equal(layer.rows(slice(5, 9)).numpy(), weight.dequantize()[5:9])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
def test_product_and_gradient(bits: Bits, dtype: torch.dtype, tolerance: float) -> None:
    weight = quantized(bits)
    layer, x, matrix = layer_of(weight), inputs(dtype), torch.from_numpy(weight.dequantize()).double()
    product = layer(x)
    assert product.dtype == dtype and product.shape == (2, 3, OUTPUTS)
    torch.testing.assert_close(
        product.double(), x.double() @ matrix.T + layer.bias.double(), rtol=tolerance, atol=tolerance
    )
    upstream = torch.randn(product.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    product.backward(upstream)
    assert x.grad is not None and x.grad.dtype == dtype
    torch.testing.assert_close(x.grad.double(), upstream.double() @ matrix, rtol=tolerance, atol=tolerance)
    assert layer.weight.grad is None and layer.bias.grad is None


def test_codes_survive_a_change_of_precision() -> None:
    """Of the bias alone: whole numbers and scales are what they are."""
    layer = layer_of(quantized(4))
    before = layer.rows(slice(None))
    assert layer.to(torch.device("cpu")).weight.dtype == torch.uint8
    assert torch.equal(layer.rows(slice(None)), before)
    assert "bits=4" in repr(layer)
