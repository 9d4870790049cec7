"""Fine-tuning in MindSpore: `TrainingEngine` on its CPU backend, and by the same code on Ascend processors."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mindspore as ms
from mindspore import Tensor, ops
from mindspore.nn.utils import no_init_parameters

from visualglm.backends.base import ImageEmbeds
from visualglm.backends.mindspore.joined import VisualGLMModel
from visualglm.backends.mindspore.load import CPU, choose_dtype, find_device, mapped_tensor, use_device
from visualglm.checkpoint.model_dir import ModelDirectory
from visualglm.checkpoint.progress import Report, each_reported
from visualglm.config import DType, VisualGLMConfig
from visualglm.errors import ConfigError
from visualglm.memory import available_memory
from visualglm.signals import held_signals
from visualglm.training.batches import ReadAhead, read_by_threads
from visualglm.training.engine import Adapter, ScalarWriter
from visualglm.training.image_cache import Encode
from visualglm.training.loop import loop_config
from visualglm.training.mindspore.distributed import Processes, join_processes, local_rank, lost_process_named
from visualglm.training.mindspore.inputs import Shape
from visualglm.training.mindspore.learner import MindSporeLearner
from visualglm.training.mindspore.lora import Pairs, add_lora
from visualglm.training.parts import Trained, lora_settings, lora_summary
from visualglm.training.recipe import FinetuneRecipe

_IMAGE_PARTS, _TEXT_PARTS = ("vision", "qformer", "projection"), ("text",)
_ALL_PARTS = _IMAGE_PARTS + _TEXT_PARTS


class MindSporeEngine:
    """One process's side of a run.

    compiled: whether a step runs as one graph, which all batches are padded to fit, or operator by operator.
    """

    def __init__(self, device: str, *, compiled: bool = True) -> None:
        found = find_device(device)
        # On a machine with several processors each process has its own.
        name = str(found) if found.kind == CPU or ":" in device else f"{found.kind}:{local_rank()}"
        self._device = use_device(name)
        self._compiled = compiled
        self.processes = join_processes(name)
        self.read_ahead: ReadAhead = read_by_threads

    @contextmanager
    def faults_named(self) -> Iterator[None]:
        with lost_process_named(self.processes):
            yield

    def precision(self, recipe: FinetuneRecipe, config: VisualGLMConfig) -> DType:
        if recipe.tune.methods != ("lora",):
            other = next(method for method in recipe.tune.methods if method != "lora")
            raise ConfigError(f"The MindSpore side trains lora, and tune.methods names {other}; use --backend torch.")
        return choose_dtype(recipe.run.precision, config, self._device)

    def free_memory(self) -> int:
        """On Ascend what the card has free; on a CPU this process's share."""
        if self._device.kind == CPU:
            return available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        card = ms.hal.get_device_properties(self._device.index, "Ascend")
        return int(card.total_memory) - int(ms.runtime.memory_reserved())

    def image_encoder(self, directory: ModelDirectory, recipe: FinetuneRecipe) -> Encode:
        model = _load(directory, self.precision(recipe, directory.config), _IMAGE_PARTS)

        def encode(pixels: Any) -> list[ImageEmbeds]:
            embeds = ops.cast(model.encode_images(Tensor(pixels)), ms.float32)
            return [ImageEmbeds(array) for array in embeds.asnumpy()]

        return encode

    def load(
        self, directory: ModelDirectory, recipe: FinetuneRecipe, *, with_encoder: bool, report: Report | None = None
    ) -> MindSporeTuned:
        dtype = self.precision(recipe, directory.config)
        model = _load(directory, dtype, _ALL_PARTS if with_encoder else _TEXT_PARTS, report)
        pairs = add_lora(model, recipe.tune, recipe.run.seed)
        for layer in model.text.layers if recipe.run.activation_checkpointing else ():
            layer.recompute()
        return MindSporeTuned(model, pairs, recipe, self.processes, dtype, compiled=self._compiled)

    def scalar_writer(self, folder: Path, first_step: int) -> ScalarWriter | None:
        """What writes TensorBoard's events is torch's."""
        return None


class MindSporeTuned:
    """A model with LoRA in one process of a run."""

    def __init__(
        self,
        model: VisualGLMModel,
        pairs: Pairs,
        recipe: FinetuneRecipe,
        processes: Processes,
        dtype: DType,
        *,
        compiled: bool,
    ) -> None:
        self.model = model
        self.pairs = pairs
        self._recipe = recipe
        self._processes = processes
        self._dtype = dtype
        self._compiled = compiled

    def summary(self) -> list[Trained]:
        count = sum(parameter.size for parameter in self.pairs.parameters().values())
        return [lora_summary(self._recipe.tune, self.model.config.text, count)]

    def learner(self, total_steps: int, longest: tuple[int, int]) -> MindSporeLearner:
        recipe, (columns, labels) = self._recipe, longest
        rows = recipe.run.batch_size
        self.pairs.reserve(rows, columns)
        return MindSporeLearner(
            loop_config(recipe, total_steps),
            self.model,
            self.pairs,
            self._processes,
            shape=Shape(rows, columns, rows * labels) if self._compiled else None,
            seed=recipe.run.seed,
            scaled=self._dtype == "float16",
        )

    def adapter(self) -> Adapter | None:
        if self._processes.rank:
            return None
        return Adapter(lora_settings(self._recipe.tune, self.model.config.text), self.pairs.stored())


def _load(
    directory: ModelDirectory, dtype: DType, parts: Collection[str], report: Report | None = None
) -> VisualGLMModel:
    """The model of `directory`; what of it is not in `parts` takes no memory."""
    with no_init_parameters():
        model = VisualGLMModel(directory.config)
    for part in _ALL_PARTS:
        if part not in parts:
            delattr(model, part)
    own = getattr(ms, dtype)
    parameters = dict(model.parameters_and_names())
    for name, stored in each_reported({name: directory.tensors[name] for name in parameters}, report):
        with held_signals():
            parameters[name].set_dtype(own)
            parameters[name].set_data(mapped_tensor(stored).astype(own))
    return model.set_train(False)
