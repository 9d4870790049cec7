"""The model on PyTorch as a `Backend`: numpy in, numpy out, any device and precision torch has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visualglm.backends.base import ImageEmbeds
from visualglm.backends.out_of_memory import tells_out_of_memory
from visualglm.backends.torch.adapters import TorchAdapters
from visualglm.backends.torch.chatglm import rotary_table
from visualglm.backends.torch.joined import VisualGLMModel
from visualglm.backends.torch.kv_cache import KVCache
from visualglm.checkpoint.adapter_dir import AdapterDirectory
from visualglm.config import VisualGLMConfig
from visualglm.processing.layout import Layout

P = ParamSpec("P")
R = TypeVar("R")

# Images that go through the ViT at once: more would only grow its activations.
_IMAGES_AT_ONCE = 16


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def _computes(method: Callable[P, R]) -> Callable[P, R]:
    """Without gradients; and memory that runs out is told in a sentence, as `DeviceError`."""
    return tells_out_of_memory(_is_out_of_memory)(torch.inference_mode()(method))


class TorchCache:
    """A `KVCache` and the one question that is asked of it at every step: are there pads to hide?"""

    def __init__(self, buffers: KVCache, pad_lengths: NDArray[np.int64]) -> None:
        self.buffers = buffers
        self.has_pads = bool(pad_lengths.any())

    @property
    def length(self) -> int:
        return self.buffers.length

    def keep_rows(self, rows: NDArray[np.int64]) -> None:
        self.buffers.keep_rows(torch.from_numpy(rows).to(self.buffers.keys[0].device))


class TorchBackend:
    """A `VisualGLMModel` on one device in one precision."""

    def __init__(self, model: VisualGLMModel) -> None:
        self.model = model.eval().requires_grad_(False)
        self.device = model.projection.weight.device
        self.dtype = model.projection.weight.dtype
        self._adapters = TorchAdapters(model)

    @classmethod
    def from_tensors(
        cls,
        config: VisualGLMConfig,
        tensors: Iterable[tuple[str, Tensor]],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> TorchBackend:
        """Take over tensors one by one; those already of `device` and `dtype` are used where they lie (memory maps)."""
        with torch.device("meta"):
            model = VisualGLMModel(config)
        state: dict[str, Any] = {}
        for name, tensor in tensors:
            state[name] = tensor.to(device=device, dtype=dtype)
        model.load_state_dict(state, assign=True)
        model.text.rotary = rotary_table(config.text, device)
        return cls(model)

    @property
    def config(self) -> VisualGLMConfig:
        return self.model.config

    @property
    def description(self) -> str:
        return f"torch on {self.device}, {str(self.dtype).removeprefix('torch.')}"

    @property
    def threads(self) -> int:
        return torch.get_num_threads()

    def add_adapter(self, name: str, adapter: AdapterDirectory) -> None:
        """See `AdaptableBackend`."""
        self._adapters.add(name, adapter)

    def use_adapter(self, name: str | None) -> None:
        """See `AdaptableBackend`."""
        self._adapters.use(name)

    @_computes
    def encode_images(self, pixels: NDArray[np.float32]) -> list[ImageEmbeds]:
        encoded = [
            self.model.encode_images(torch.from_numpy(chunk).to(self.device, self.dtype)).float().cpu().numpy()
            for chunk in np.split(pixels, range(_IMAGES_AT_ONCE, len(pixels), _IMAGES_AT_ONCE))
        ]
        return [ImageEmbeds(array) for array in np.concatenate(encoded)]

    @_computes
    def prefill(
        self, layout: Layout, image_embeds: Sequence[ImageEmbeds], capacity: int
    ) -> tuple[NDArray[np.float32], TorchCache]:
        buffers = KVCache(self.config.text, layout.batch_size, capacity, device=self.device, dtype=self.dtype)
        hidden = self._hidden_states(layout, image_embeds, buffers)
        return self._to_numpy(self.model.text.lm_head(hidden[:, -1])), TorchCache(buffers, layout.pad_lengths)

    @_computes
    def step(self, token_ids: NDArray[np.int64], layout: Layout, cache: TorchCache) -> NDArray[np.float32]:
        column = cache.length
        mask = None
        if cache.has_pads:
            visible = np.arange(column + 1) >= layout.pad_lengths[:, None]
            mask = self._tensor(visible)[:, None, None]
        positions = self._tensor(layout.position_ids(column, column + 1))
        return self._to_numpy(self.model.step(self._tensor(token_ids), positions, mask, cache.buffers))

    @_computes
    def logits(self, layout: Layout, image_embeds: Sequence[ImageEmbeds]) -> NDArray[np.float32]:
        return self._to_numpy(self.model.text.lm_head(self._hidden_states(layout, image_embeds, None)))

    def _hidden_states(self, layout: Layout, image_embeds: Sequence[ImageEmbeds], buffers: KVCache | None) -> Tensor:
        embeds = self._tensor(np.stack([image.array for image in image_embeds])) if image_embeds else None
        return self.model.hidden_states(
            self._tensor(layout.input_ids),
            embeds,
            torch.from_numpy(layout.image_starts),
            self._tensor(layout.position_ids()),
            self._tensor(layout.attention_mask())[:, None],
            buffers,
        )

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    @staticmethod
    def _to_numpy(tensor: Tensor) -> NDArray[np.float32]:
        array: NDArray[np.float32] = tensor.float().cpu().numpy()
        return array
