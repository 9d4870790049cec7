"""What a run of fine-tuning needs of the library that computes: `training/torch` and `training/mindspore` have it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from visualglm.backends.mindspore.environment import prepare_mindspore
from visualglm.checkpoint.model_dir import ModelDirectory
from visualglm.checkpoint.progress import Report
from visualglm.config import DType, VisualGLMConfig
from visualglm.signals import held_signals
from visualglm.training.batches import Batch, ReadAhead
from visualglm.training.image_cache import Encode
from visualglm.training.loop import Learner
from visualglm.training.parts import Trained
from visualglm.training.recipe import FinetuneRecipe

T = TypeVar("T")
Arrays = Mapping[str, NDArray[np.float32]]

TrainingBackend = Literal["torch", "mindspore"]


@dataclass(frozen=True)
class Adapter:
    """What training has changed: the contents of an adapter directory, by the names that `write_adapter` wants."""

    lora_settings: Mapping[str, Any] | None
    lora: Arrays
    trained: Arrays = field(default_factory=dict)
    prefix: Arrays = field(default_factory=dict)


class Processes(Protocol):
    """This process among those of its run, on its device."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def device_name(self) -> str:
        """For messages."""

    def wait(self) -> None:
        """Until all processes are here."""

    def first_does(self, work: Callable[[], T]) -> T:
        """What `work` returns in the first process, or the `VisualGLMError` it raises there, in all of them."""

    def leave(self) -> None:
        """The end of what these processes do together."""


class Tuned(Protocol):
    """A model on its device, some of whose parameters are trained."""

    def summary(self) -> list[Trained]:
        """What is trained, one row a kind."""

    def learner(self, total_steps: int, longest: tuple[int, int]) -> Learner[Batch]:
        """What trains it, from the first step.

        longest: tokens of the longest row that will come, and most of those that are learnt of one.
        """

    def adapter(self) -> Adapter | None:
        """What was learnt so far; all processes must ask together, and only the first one gets it."""


class ScalarWriter(Protocol):
    """Where numbers go that are to be seen while training goes on; a `SummaryWriter` is one."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class TrainingEngine(Protocol):
    """One process's side of a run, on one backend.

    read_ahead: how workers read rows.
    """

    @property
    def processes(self) -> Processes: ...

    @property
    def read_ahead(self) -> ReadAhead: ...

    def faults_named(self) -> AbstractContextManager[None]:
        """Turns what the backend raises when a worker dies, or another process is gone, into a `VisualGLMError`."""

    def precision(self, recipe: FinetuneRecipe, config: VisualGLMConfig) -> DType:
        """What is computed in.

        Raises `ConfigError` for what this backend does not train, `DeviceError` for what the device cannot compute in.
        """

    def free_memory(self) -> int:
        """Bytes that there are for this process."""

    def image_encoder(self, directory: ModelDirectory, recipe: FinetuneRecipe) -> Encode:
        """ViT and Q-Former of a model, without its decoder."""

    def load(
        self, directory: ModelDirectory, recipe: FinetuneRecipe, *, with_encoder: bool, report: Report | None = None
    ) -> Tuned:
        """The model, ready to be trained; without its ViT and Q-Former it takes embeddings of images only."""

    def scalar_writer(self, folder: Path, first_step: int) -> ScalarWriter | None:
        """What writes a run's numbers from `first_step` on for TensorBoard; None if this backend has none."""


def join_engine(backend: TrainingBackend, device: str, *, compiled: bool) -> TrainingEngine:
    """Meet the other processes of the run, if it has any; raises `DeviceError` if the device is not there.

    compiled: whether MindSpore runs a step as one graph.
    """
    if backend == "mindspore":
        prepare_mindspore()
        with held_signals():
            from visualglm.training.mindspore.engine import MindSporeEngine

        return MindSporeEngine(device, compiled=compiled)
    from visualglm.training.torch.engine import TorchEngine

    return TorchEngine(device)
