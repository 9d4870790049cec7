"""What of a model is trained: LoRA, prefixes or whole parts; everything else stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from visualglm.backends.torch.joined import VisualGLMModel
from visualglm.training.recipe import TuneRecipe


class Trained(NamedTuple):
    """A row of the table shown before training: what is trained, in which layers, and how many parameters."""

    what: str
    layers: str
    parameters: int


class Trainable:
    """A model of which some parameters are trained.

    model: on its device, in training mode where something is trained.
    loss: the module whose forward is `compute_loss`: what DDP or FSDP wraps.
    """

    model: VisualGLMModel
    loss: nn.Module

    def parameters(self) -> dict[str, nn.Parameter]:
        """Those that are trained, by their names in `model`, always in the same order."""
        raise NotImplementedError

    def frozen_names(self) -> list[str]:
        """Names in `loss` of all parameters and buffers that are not trained: what DDP need not broadcast."""
        raise NotImplementedError

    def summary(self) -> list[Trained]:
        """What is trained, one row a kind."""
        raise NotImplementedError

    @property
    def lowest_layer(self) -> int:
        """The first layer of the decoder in or below which something is trained."""
        raise NotImplementedError

    @property
    def trains_vision(self) -> bool:
        """Whether image embeddings change while training, so that they must not be cached."""
        raise NotImplementedError

    def lora_settings(self) -> dict[str, Any] | None:
        """What `adapter_config.json` of PEFT holds; None without LoRA."""
        raise NotImplementedError

    def adapter_tensors(self) -> dict[str, Tensor]:
        """LoRA in PEFT's names (`base_model.model.text.layers.0.attention.qkv.lora_A.weight`), float32 on the CPU."""
        raise NotImplementedError

    def prefix_tensors(self) -> dict[str, Tensor]:
        """Prefixes by `backends.torch.prefix.prefix_name`, float32 on the CPU."""
        raise NotImplementedError

    def whole_tensors(self) -> dict[str, Tensor]:
        """Parameters trained as a whole, by the names of `visualglm.parameters`, float32 on the CPU."""
        raise NotImplementedError

    def load_adapter_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `adapter_tensors`, `prefix_tensors` and `whole_tensors` gave (together, in one mapping).

        Raises `CheckpointError` if one is missing, too many, or of another shape.
        """
        raise NotImplementedError


def make_trainable(
    model: VisualGLMModel, tune: TuneRecipe, seed: int, *, activation_checkpointing: bool = False
) -> Trainable:
    """Freeze `model` except for what `tune` names, and give it LoRA and prefixes where `tune` asks for them.

    Raises `ConfigError` for a layer that the model does not have, or methods that exclude each other.
    """
    raise NotImplementedError
