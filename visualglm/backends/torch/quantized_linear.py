"""A linear layer whose weights are whole numbers of 4 or 8 bits: the frozen base that an adapter is trained on."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from visualglm.backends.torch.linear import tiled_product

Bits = Literal[4, 8]


class QuantizedLinear(nn.Linear):
    """[..., in] → [..., out] in the type of the input: `weight = scale * (code - zero)` by blocks of inputs.

    weight: uint8 [out, blocks, block size * bits / 8]; of two codes in a byte, the first is the low half.
    scales: float32 [out, blocks]. zeros: uint8 [out, blocks].
    It has no gradients of its own. That it is an `nn.Linear` is what PEFT asks of a layer that it adapts.
    """

    scales: Tensor
    zeros: Tensor

    def __init__(
        self, weight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, *, bits: Bits, in_features: int
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bits = in_features, len(weight), bits
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.float32 if x.device.type == "cpu" else x.dtype
        rows = partial(self.rows, dtype=dtype)
        product = tiled_product(x.flatten(0, -2), rows, self.out_features, self.bias)
        return product.view(*x.shape[:-1], self.out_features)

    def rows(self, part: slice, dtype: torch.dtype = torch.float32) -> Tensor:
        """Some rows of the matrix that is meant, [rows, in]."""
        codes = self.weight[part]
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(2)
        values = codes.float().sub_(self.zeros[part].unsqueeze(-1)).mul_(self.scales[part].unsqueeze(-1))
        return values.flatten(1)[:, : self.in_features].to(dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"
