"""A linear layer whose weights are whole numbers of 4 or 8 bits: the frozen base that an adapter is trained on."""

from __future__ import annotations

from torch import Tensor, nn


class QuantizedLinear(nn.Linear):
    """[..., in] → [..., out] in the type of the input; no gradient for its weights.

    weight: uint8 [out, k_blocks, block_size * bits / 8]; scales: float32 [out, k_blocks].
    """

    def __init__(self, weight: Tensor, scales: Tensor, zero_points: Tensor | None, bias: Tensor | None) -> None:
        raise NotImplementedError
