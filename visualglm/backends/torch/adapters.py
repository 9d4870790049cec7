"""Adapters beside one loaded model, of which one at a time is in use; the model's own weights stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visualglm.backends.torch.joined import VisualGLMModel
from visualglm.backends.torch.prefix import set_prefixes
from visualglm.checkpoint.adapter_dir import AdapterDirectory
from visualglm.checkpoint.tensors import Tensor as StoredTensor
from visualglm.checkpoint.tensors import as_float32


@dataclass(frozen=True)
class _Loaded:
    """An adapter on the device. lora: float32 `a` [rank, in] and scaled `b` [out, rank] by module."""

    lora: Mapping[str, tuple[Tensor, Tensor]]
    trained: Mapping[str, Tensor]
    prefix: Mapping[str, Tensor]


class TorchAdapters:
    """The adapters of a model, by name."""

    def __init__(self, model: VisualGLMModel) -> None:
        self._model = model
        self._loaded: dict[str, _Loaded] = {}
        self._undo: list[Callable[[], None]] = []

    def add(self, name: str, adapter: AdapterDirectory) -> None:
        """Load an adapter that fits the model, in place of another of that name; what is in use stays in use."""
        weight = self._model.projection.weight
        self._loaded[name] = _Loaded(
            lora={
                module: (_float_tensor(pair.a, weight.device), pair.scale * _float_tensor(pair.b, weight.device))
                for module, pair in adapter.lora.items()
            },
            trained={
                key: _float_tensor(tensor, weight.device).to(weight.dtype) for key, tensor in adapter.trained.items()
            },
            prefix={key: _float_tensor(tensor, weight.device) for key, tensor in adapter.prefix.items()},
        )

    def use(self, name: str | None) -> None:
        """Compute with the adapter of that name from now on, or with none."""
        while self._undo:
            self._undo.pop()()
        if name is None:
            return
        loaded = self._loaded[name]
        self._undo += [self._add_pair(module, *pair) for module, pair in loaded.lora.items()]
        self._undo += [self._replace(key, tensor) for key, tensor in loaded.trained.items()]
        if loaded.prefix:
            set_prefixes(self._model.text, loaded.prefix)
            self._undo.append(lambda: set_prefixes(self._model.text, None))

    def _add_pair(self, module: str, a: Tensor, b: Tensor) -> Callable[[], None]:
        """Returns what takes the pair away again."""

        def add(linear: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            # In float32, whatever the model computes in: half precision is slow on a CPU for several rows.
            x: Tensor = inputs[0].float()
            return (output.float() + x @ a.T @ b.T).to(output.dtype)

        return self._model.get_submodule(module).register_forward_hook(add).remove

    def _replace(self, name: str, tensor: Tensor) -> Callable[[], None]:
        """Returns what puts the model's own parameter back."""
        parent, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(parent)
        own = getattr(module, leaf)
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
        return lambda: setattr(module, leaf, own)


def _float_tensor(stored: StoredTensor, device: torch.device) -> Tensor:
    return torch.from_numpy(as_float32(stored.array(), stored.dtype)).to(device)
