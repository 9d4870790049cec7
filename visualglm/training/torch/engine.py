"""Fine-tuning in torch: `TrainingEngine` over Accelerate, on CPUs, CUDA devices and those of Ascend."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from visualglm.backends.base import ImageEmbeds
from visualglm.backends.torch.load import memory_of
from visualglm.checkpoint.model_dir import ModelDirectory
from visualglm.checkpoint.progress import Report
from visualglm.config import DType, VisualGLMConfig
from visualglm.training.batches import Batch, ReadAhead
from visualglm.training.engine import Adapter, ScalarWriter
from visualglm.training.image_cache import Encode
from visualglm.training.loop import loop_config
from visualglm.training.parts import Trained, is_sharded
from visualglm.training.recipe import FinetuneRecipe
from visualglm.training.torch.distributed import Processes, join_processes, lost_process_named, shard
from visualglm.training.torch.learner import Task, TorchLearner
from visualglm.training.torch.load import ALL_PARTS, Part, load_for_training, training_dtype
from visualglm.training.torch.loss import AnswerLoss
from visualglm.training.torch.read_ahead import dead_workers_named, read_by_processes
from visualglm.training.torch.trainable import Trainable, make_trainable


class TorchEngine:
    """One process's side of a run."""

    def __init__(self, device: str) -> None:
        self.processes = join_processes(device)
        self.read_ahead: ReadAhead = read_by_processes

    @contextmanager
    def faults_named(self) -> Iterator[None]:
        with lost_process_named(), dead_workers_named():
            yield

    def precision(self, recipe: FinetuneRecipe, config: VisualGLMConfig) -> DType:
        return training_dtype(recipe.run.precision, config, self.processes.device)

    def free_memory(self) -> int:
        device = self.processes.device
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
        return memory_of(device) // sharing

    def image_encoder(self, directory: ModelDirectory, recipe: FinetuneRecipe) -> Encode:
        device = self.processes.device
        model = load_for_training(directory, recipe, device, ["image"])
        dtype = getattr(torch, self.precision(recipe, directory.config))

        def encode(pixels: Any) -> list[ImageEmbeds]:
            with torch.no_grad():
                embeds = model.encode_images(torch.from_numpy(pixels).to(device, dtype))
            return [ImageEmbeds(array) for array in embeds.float().cpu().numpy()]

        return encode

    def load(
        self, directory: ModelDirectory, recipe: FinetuneRecipe, *, with_encoder: bool, report: Report | None = None
    ) -> TorchTuned:
        parts: tuple[Part, ...] = ALL_PARTS if with_encoder else ("text",)
        dtype = self.precision(recipe, directory.config)
        trainable = make_trainable(
            load_for_training(directory, recipe, self.processes.device, parts, report),
            recipe.tune,
            recipe.run.seed,
            dtype=dtype,
            activation_checkpointing=recipe.run.activation_checkpointing,
        )
        return TorchTuned(trainable, recipe, self.processes, dtype)

    def scalar_writer(self, folder: Path, first_step: int) -> ScalarWriter:
        return SummaryWriter(str(folder), purge_step=first_step + 1)


class TorchTuned:
    """A `Trainable` in one process of a run."""

    def __init__(self, trainable: Trainable, recipe: FinetuneRecipe, processes: Processes, dtype: DType) -> None:
        self.trainable = trainable
        self._recipe = recipe
        self._processes = processes
        self._dtype = dtype

    def summary(self) -> list[Trained]:
        return self.trainable.summary()

    def learner(self, total_steps: int, longest: tuple[int, int]) -> TorchLearner[Batch]:
        recipe, device, loss = self._recipe, self._processes.device, self.trainable.loss
        module = _WithImage(loss, device) if self.trainable.trains_vision else loss
        sharded = is_sharded(recipe.tune, self._processes.world_size)
        if sharded:
            shard(module, self._processes)
        # What dropout leaves out is another matter in each process.
        torch.manual_seed(recipe.run.seed + self._processes.rank)
        task = Task(
            module,
            _answer_loss,
            lambda batch: batch.token_count,
            sharded=sharded,
            scaled=self._dtype == "float16",
        )
        return TorchLearner(loop_config(recipe, total_steps), task, self._processes)

    def adapter(self) -> Adapter | None:
        is_first = self._processes.is_first
        trained = self.trainable.whole_tensors(kept=is_first)
        if not is_first:
            return None
        parts = self.trainable.adapter_tensors(), trained, self.trainable.prefix_tensors()
        arrays = ({name: tensor.numpy() for name, tensor in part.items()} for part in parts)
        return Adapter(self.trainable.lora_settings(), *arrays)


class _WithImage(nn.Module):
    """The loss where the image encoder learns: every batch goes through it, in all processes and in the same order.

    FSDP needs that, since all have parts of its weights. An image that a batch lacks is made up, and counts for
    nothing; gradients are then 0, not missing, whatever the number of processes.
    """

    def __init__(self, loss: AnswerLoss, device: torch.device) -> None:
        super().__init__()
        self.loss = loss
        self.device = device

    def forward(self, batch: Batch) -> tuple[Tensor, int]:
        if batch.pixels is not None:
            return self.loss(batch)  # type: ignore[no-any-return]
        model = self.loss.model
        size = model.config.vision.image_size
        blank = model.encode_images(torch.zeros(1, 3, size, size, device=self.device))
        total, count = self.loss(batch)
        return total + 0.0 * blank.sum(), count


def _answer_loss(module: nn.Module, batch: Batch) -> dict[str, Tensor]:
    total, _ = module(batch)
    return {"loss": total}
