"""A linear layer that keeps a CPU busy with weights in half precision, whatever the processor can multiply.

PyTorch's own product of a bfloat16 or float16 matrix with several rows is up to a hundred times slower than one of
float32 on processors without instructions for these types: they are emulated, and hardly in parallel.
"""

from __future__ import annotations

import platform
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

# Weights that are widened to float32 at once: they stay in the caches until they have been multiplied.
_TILE_ELEMENTS = 1 << 19


class Linear(nn.Linear):
    """`nn.Linear`, [..., in] → [..., out]; at inference on a CPU, half-precision weights are read at full speed."""

    def forward(self, x: Tensor) -> Tensor:
        is_half_on_cpu = self.weight.device.type == "cpu" and self.weight.itemsize == 2
        if torch.is_grad_enabled() or not is_half_on_cpu:
            return super().forward(x)
        rows = x.flatten(0, -2)
        if len(rows) == 1:
            product = vector_product(rows[0], self.weight, self.bias)
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
    """`x @ weight.T + bias`, [in] → [out]: a third faster than the product that takes several rows."""
    return torch.mv(weight, x) if bias is None else torch.addmv(bias, weight, x)


def widened_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias`, [rows, in] → [rows, out], in the type of `x` but multiplied and added up in float32."""
    columns = x.float().T.contiguous()
    result = x.new_empty(len(x), len(weight))
    step = max(1, _TILE_ELEMENTS // weight.shape[1])
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        product = weight[part].float() @ columns
        result[:, part] = (product if bias is None else product + bias[part, None]).T
    return result
