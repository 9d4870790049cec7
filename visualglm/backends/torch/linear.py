"""A linear layer that keeps a CPU busy with weights in half precision, whatever the processor can multiply.

PyTorch's own product of a bfloat16 or float16 matrix with several rows is up to a hundred times slower than one of
float32 on processors without instructions for these types: they are emulated, and hardly in parallel.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

# Weights that are widened to float32 at once: they stay in the caches until they have been multiplied. Many rows keep
# the processor busy whatever the caches hold; there it counts how seldom its threads wait for one another.
_TILE_ELEMENTS, _LARGE_TILE_ELEMENTS = 1 << 19, 1 << 22
_MANY_ROWS = 64

Rows = Callable[[slice], Tensor]
"""Rows of a weight [out, in] in the type that is multiplied in."""


class Linear(nn.Linear):
    """`nn.Linear`, [..., in] → [..., out]; frozen half-precision weights are read at full speed on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        is_half_on_cpu = self.weight.device.type == "cpu" and self.weight.itemsize == 2
        is_trained = torch.is_grad_enabled() and self.weight.requires_grad
        if is_trained or not is_half_on_cpu:
            return super().forward(x)
        rows = x.flatten(0, -2)
        needs_gradient = torch.is_grad_enabled() and x.requires_grad
        if len(rows) == 1 and not needs_gradient:
            product = vector_product(rows, self.weight, self.bias)
        elif has_half_instructions():
            product = functional.linear(rows, self.weight, self.bias)
        else:
            product = widened_product(rows, self.weight, self.bias)
        return product.view(*x.shape[:-1], self.out_features)


@cache
def has_half_instructions() -> bool:
    """Whether PyTorch has quick kernels for half precision here; known to be missing on most x86 processors only."""
    return platform.machine().lower() not in ("x86_64", "amd64") or torch.cpu._is_avx512_bf16_supported()


def vector_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias`, [1, in] → [1, out]: a third faster than the product that takes several rows."""
    return (torch.mv(weight, x[0]) if bias is None else torch.addmv(bias, weight, x[0]))[None]


def widened_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias`, [rows, in] → [rows, out], in the type of `x` but multiplied and added up in float32.

    Gradients flow to `x` alone.
    """
    return tiled_product(x, lambda rows: weight[rows].float(), len(weight), bias)


def tiled_product(x: Tensor, rows: Rows, outputs: int, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias`, [n, in] → [n, outputs], for a frozen weight that is made a tile of its `rows` at a time.

    It is multiplied in the type that `rows` gives; the result is of the type of `x`. Nothing but `rows` is kept for
    the backward pass, in which gradients flow to `x` alone.
    """
    return _TiledProduct.apply(x, rows, outputs, bias)  # type: ignore[no-any-return, no-untyped-call]


class _TiledProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows, outputs: int, bias: Tensor | None) -> Tensor:
        ctx.rows, ctx.inputs, ctx.dtype = rows, x.shape[1], x.dtype
        columns = x.to(_factor_type(x)).T.contiguous()
        result = x.new_empty(len(x), outputs)
        with _as_it_is(x):
            for part in _tiles(outputs, x):
                product = rows(part) @ columns
                result[:, part] = (product if bias is None else product + bias[part, None]).T
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        factor = gradient.to(_factor_type(gradient))
        result = factor.new_zeros(len(factor), ctx.inputs)
        with _as_it_is(factor):
            for part in _tiles(factor.shape[1], result):
                result.addmm_(factor[:, part], ctx.rows(part))
        return result.to(ctx.dtype), None, None, None


def _as_it_is(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast, where it is on, would narrow again what was widened."""
    return torch.autocast(x.device.type, enabled=False)


def _factor_type(x: Tensor) -> torch.dtype:
    """On a CPU that of tiles, float32; other devices multiply in the type of `x`."""
    return torch.float32 if x.device.type == "cpu" else x.dtype


def _tiles(outputs: int, x: Tensor) -> Iterator[slice]:
    """Parts of the rows of a weight for `x` [n, in]; all at once on devices that need not be spared."""
    elements = _TILE_ELEMENTS if len(x) < _MANY_ROWS else _LARGE_TILE_ELEMENTS
    step = max(1, elements // x.shape[1]) if x.device.type == "cpu" else max(1, outputs)
    return (slice(start, start + step) for start in range(0, outputs, step))
