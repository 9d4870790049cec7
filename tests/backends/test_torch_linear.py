"""Linear layers in half precision on a CPU: every way to multiply gives the product rounded once."""

import pytest
import torch

from visualglm.backends.torch.linear import Linear, widened_product

# More than one tile, the last of them not full.
INPUTS, OUTPUTS = 1024, 4500
EPSILON = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def layer(dtype: torch.dtype) -> Linear:
    torch.manual_seed(0)
    return Linear(INPUTS, OUTPUTS).to(dtype)


def inputs(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, INPUTS, generator=torch.Generator().manual_seed(1)).to(dtype)


def check(found: torch.Tensor, x: torch.Tensor, layer: Linear) -> None:
    """Within one rounding of the exact product, and one of the bias where it is added after that."""
    bias = 0 if layer.bias is None else layer.bias.double()
    exact = x.double() @ layer.weight.double().T + bias
    assert found.dtype == x.dtype and found.shape == exact.shape
    scale = exact.abs() + layer.weight.double().abs().mean()
    assert ((found.double() - exact).abs() <= 2 * EPSILON[x.dtype] * scale).all()


@pytest.mark.parametrize("rows", [(1,), (2,), (1, 1), (3, 1), (1, 19), (2, 8)])
@pytest.mark.parametrize("has_bias", [True, False])
@torch.inference_mode()
def test_any_rows_at_inference(layer: Linear, dtype: torch.dtype, rows: tuple[int, ...], has_bias: bool) -> None:
    if not has_bias:
        layer.bias = None
    x = inputs(*rows, dtype=dtype)
    check(layer(x), x, layer)


@pytest.mark.parametrize("rows", [1, 2, 19])
@torch.inference_mode()
def test_widened_in_tiles(layer: Linear, dtype: torch.dtype, rows: int) -> None:
    x = inputs(rows, dtype=dtype)
    product = widened_product(x, layer.weight, layer.bias)
    check(product, x, layer)
    assert product.is_contiguous()
    # The bias is added before the one rounding.
    exact = (x.double() @ layer.weight.double().T + layer.bias.double()).to(dtype)
    assert (product != exact).float().mean() < 0.02


def test_gradients_flow_where_they_are_wanted(layer: Linear, dtype: torch.dtype) -> None:
    x = inputs(2, dtype=dtype).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is not None
    torch.testing.assert_close(x.grad[0].double(), layer.weight.double().sum(0), rtol=2**-6, atol=2**-5)


@pytest.mark.parametrize("rows", [1, 2, 64])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_flow_through_frozen_weights(
    layer: Linear, dtype: torch.dtype, rows: int, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded once, as the product is, whether or not PyTorch would multiply well."""
    monkeypatch.setattr("visualglm.backends.torch.linear.has_half_instructions", lambda: False)
    layer.requires_grad_(False)
    x = inputs(rows, dtype=dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        product = layer(x)
    check(product.detach(), x.detach(), layer)
    upstream = torch.randn(product.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    product.backward(upstream)
    assert x.grad is not None and x.grad.dtype == dtype
    exact = upstream.double() @ layer.weight.double()
    assert ((x.grad.double() - exact).abs() <= EPSILON[dtype] * exact.abs() + 1e-5).all()


def test_nothing_but_the_weight_is_kept_for_the_gradient(layer: Linear, dtype: torch.dtype) -> None:
    layer.requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        widened_product(inputs(4, dtype=dtype).requires_grad_(), layer.weight, layer.bias)
    assert kept == []


@torch.inference_mode()
def test_float32_is_left_alone() -> None:
    layer = Linear(INPUTS, OUTPUTS)
    x = inputs(5, dtype=torch.float32)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
