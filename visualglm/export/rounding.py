"""How the weights of the decoder's linear layers become whole numbers: of how many bits, and by which method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from visualglm.checkpoint.lite_dir import LiteForm
from visualglm.errors import ConfigError
from visualglm.export.gptq import gptq
from visualglm.export.packed_weight import Bits, QuantizedWeight
from visualglm.export.quantize import Matrix, quantize_blocks

RoundingMethod = Literal["search", "rtn", "gptq"]
LAYER_KINDS = ("qkv", "proj", "fc1", "fc2", "lm_head")
"""The linear layers of the decoder: the last parts of their names."""


class Hessians(Protocol):
    """What is known of the inputs of layers."""

    def hessian(self, layer: str) -> NDArray[Any]:
        """The mean of x xᵀ over inputs x of the layer, [in, in]; asked for once, in the order of the layers."""
        ...


def bits_of(form: LiteForm, layer: str) -> Bits:
    """Of the weight of a linear layer of the decoder, by its name; `form` is one that rounds."""
    return 4 if form.precision == "int4" and layer.rpartition(".")[2] not in form.int8_layers else 8


@dataclass(frozen=True)
class Rounding:
    """hessians: what the method "gptq" has to know."""

    form: LiteForm
    method: RoundingMethod = "search"
    hessians: Hessians | None = None

    @property
    def measure(self) -> Literal["weights", "outputs"]:
        """Of what errors are a share."""
        return "outputs" if self.method == "gptq" else "weights"

    def quantize(self, weight: Matrix, layer: str) -> QuantizedWeight:
        """The weight [out, in] of the layer of that name."""
        bits, block_size, name = bits_of(self.form, layer), self.form.block_size or 0, f"{layer}.weight"
        if self.method != "gptq":
            return quantize_blocks(weight, bits, block_size, self.method, name=name)
        if self.hessians is None:
            raise ConfigError(f"gptq cannot round {name} without a calibration; give one, or another method.")
        return gptq(weight, self.hessians.hessian(layer), bits, block_size, name=name)
