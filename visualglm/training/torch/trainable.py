"""What of a model is trained: LoRA, prefixes or whole parts; everything else stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from visualglm.backends.torch.chatglm import ChatGLM
from visualglm.backends.torch.joined import VisualGLMModel
from visualglm.backends.torch.prefix import random_prefixes, set_prefixes
from visualglm.backends.torch.qformer import QFormer
from visualglm.backends.torch.vit import ViT
from visualglm.config import DType
from visualglm.errors import CheckpointError
from visualglm.training.parts import Trained, WholePart, lora_settings, lora_summary, whole_parts
from visualglm.training.recipe import TuneRecipe
from visualglm.training.torch.lora import add_lora, is_lora, peft_name
from visualglm.training.torch.loss import AnswerLoss

_PART_NAMES: dict[WholePart, str] = {
    "vision": "ViT", "qformer": "Q-Former", "projection": "projection", "text": "ChatGLM",
}  # fmt: skip


class Trainable:
    """A model of which some parameters are trained; `make_trainable` makes it.

    model: on its device. loss: the module whose forward is `compute_loss`: what DDP or FSDP wraps.
    """

    def __init__(self, model: VisualGLMModel, tune: TuneRecipe, autocast: torch.dtype | None) -> None:
        self.model = model
        self.loss = AnswerLoss(model, autocast)
        self._tune = tune
        self._lora_layers = tune.layers(model.config.text.num_hidden_layers) if tune.has_lora else ()
        self._whole = whole_parts(tune)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Those that are trained, by their names in `model`, always in the same order."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def frozen_names(self) -> list[str]:
        """Names in `loss` of all parameters and buffers that are not trained: what DDP need not broadcast."""
        frozen = [name for name, parameter in self.loss.named_parameters() if not parameter.requires_grad]
        return frozen + [name for name, _ in self.loss.named_buffers()]

    @property
    def lowest_layer(self) -> int:
        """The first layer of the decoder in or below which something is trained."""
        if self._whole or "ptuning" in self._tune.methods:
            return 0
        return self._lora_layers[0]

    @property
    def trains_vision(self) -> bool:
        """Whether image embeddings change while training, so that they must not be cached."""
        return any(part != "text" for part in self._whole)

    def summary(self) -> list[Trained]:
        """What is trained, one row a kind."""
        rows, tune = [], self._tune
        if tune.has_lora:
            rows.append(lora_summary(tune, self.model.config.text, self._count(is_lora)))
        if "ptuning" in tune.methods:
            rows.append(Trained(f"prefixes of {tune.prefix_length}", "all", self._count(_is_prefix)))
        for part in self._whole:
            rows.append(Trained(_PART_NAMES[part], "all", self._count(partial(_is_whole, part=part))))
        return rows

    def lora_settings(self) -> dict[str, Any] | None:
        """What `adapter_config.json` of PEFT holds; None without LoRA."""
        return lora_settings(self._tune, self.model.config.text) if self._tune.has_lora else None

    def adapter_tensors(self) -> dict[str, Tensor]:
        """LoRA in PEFT's names (`base_model.model.text.layers.0.attention.qkv.lora_A.weight`), float32 on the CPU."""
        return self._stored(is_lora)

    def prefix_tensors(self) -> dict[str, Tensor]:
        """Prefixes by `parameters.prefix_name`, float32 on the CPU."""
        return self._stored(_is_prefix)

    def whole_tensors(self, *, kept: bool = True) -> dict[str, Tensor]:
        """Parameters trained as a whole, by the names of `visualglm.parameters`, float32 on the CPU.

        Under FSDP all processes must ask for them together, each with memory for all of them unless they are not
        `kept`: then it gets none, and only gives its parts to the others.
        """
        return self._stored(lambda name: not is_lora(name) and not _is_prefix(name), kept=kept)

    def load_adapter_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `adapter_tensors`, `prefix_tensors` and `whole_tensors` gave (together, in one mapping).

        Raises `CheckpointError` if one is missing, too many, or of another shape.
        """
        own = {_stored_name(name): parameter for name, parameter in self.parameters().items()}
        for name in sorted(own.keys() ^ tensors.keys()):
            raise CheckpointError(
                f"The adapter {'lacks' if name in own else 'has'} the tensor {name}, but this recipe "
                f"{'trains it' if name in own else 'does not train it'}; use the recipe it was made with."
            )
        for name, parameter in own.items():
            if parameter.shape != tensors[name].shape:
                raise CheckpointError(
                    f"The adapter's tensor {name} has the shape {list(tensors[name].shape)}, but this recipe trains "
                    f"{list(parameter.shape)}; use the recipe it was made with."
                )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])

    def _stored(self, belongs: Callable[[str], bool], *, kept: bool = True) -> dict[str, Tensor]:
        stored = {}
        for name, parameter in self.parameters().items():
            if belongs(name) and (kept or isinstance(parameter, DTensor)):
                whole = _whole(parameter)
                if kept:
                    stored[_stored_name(name)] = whole.to("cpu", torch.float32, copy=True)
        return stored

    def _count(self, belongs: Callable[[str], bool]) -> int:
        return sum(parameter.numel() for name, parameter in self.parameters().items() if belongs(name))


def make_trainable(
    model: VisualGLMModel,
    tune: TuneRecipe,
    seed: int,
    *,
    dtype: DType = "float32",
    activation_checkpointing: bool = False,
) -> Trainable:
    """Freeze `model` except for what `tune` names, and give it LoRA and prefixes where `tune` asks for them.

    dtype: what is computed in (`load.training_dtype`). Where whole parts are trained, whose weights are in float32,
    an accelerator computes in `dtype` under autocast; a CPU does not, which has nothing to gain from it.
    Raises `ConfigError` for a layer that the model does not have, or a rank above the width of its layers.
    """
    whole = whole_parts(tune)
    model.requires_grad_(False)
    if tune.has_lora:
        add_lora(model, tune, seed)
    if "ptuning" in tune.methods:
        set_prefixes(model.text, random_prefixes(model.text, tune.prefix_length, torch.Generator().manual_seed(seed)))
    for part in whole:
        getattr(model, part).requires_grad_(True)
    for module in model.modules():
        if isinstance(module, ViT | QFormer | ChatGLM):
            module.recompute_activations = activation_checkpointing
    on_cpu = model.text.norm.weight.device.type == "cpu"
    autocast = None if not whole or on_cpu or dtype == "float32" else getattr(torch, dtype)
    return Trainable(model.train(), tune, autocast)


def _is_prefix(name: str) -> bool:
    return name.endswith(".prefix")


def _is_whole(name: str, part: WholePart) -> bool:
    return name.startswith(f"{part}.") and not is_lora(name) and not _is_prefix(name)


def _stored_name(name: str) -> str:
    return peft_name(name) if is_lora(name) else name


def _whole(parameter: nn.Parameter) -> Tensor:
    data = parameter.detach()
    return data.full_tensor() if isinstance(data, DTensor) else data
