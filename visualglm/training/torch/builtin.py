"""Trains the built-in model from nothing, in stages: first it learns to see, then to speak of what it sees."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from visualglm.backends.torch.joined import VisualGLMModel
from visualglm.config import VisualGLMConfig
from visualglm.errors import ConfigError
from visualglm.faults import first_fault
from visualglm.processing.tokenizer import Tokenizer
from visualglm.scenes.dataset import BatchPlan, Rows, SceneBatch, SceneBatches, sample_pixels
from visualglm.scenes.teacher import SceneTeacher
from visualglm.scenes.vocabulary import train_tokenizer
from visualglm.training.loop import Course, LoopConfig, Trainer
from visualglm.training.run_log import RunLog
from visualglm.training.schedule import warmup_cosine
from visualglm.training.torch.distributed import Processes, join_processes
from visualglm.training.torch.initialize import initialize
from visualglm.training.torch.learner import Task, TorchLearner
from visualglm.training.torch.publish import publish
from visualglm.yaml_file import read_yaml

Part = Literal["vision", "qformer", "projection", "text", "teacher"]
LICENSE = "The built-in model was trained by this project on scenes it draws itself; Apache-2.0, like the code.\n"


@dataclass(frozen=True, kw_only=True)
class StageLoop(LoopConfig):
    """How long and how fast a stage trains."""

    learning_rate: float
    warmup_steps: int = 100

    def rate(self, step: int) -> float:
        """The learning rate of a step, which counts from 0."""
        return self.learning_rate * warmup_cosine(step, warmup_steps=self.warmup_steps, total_steps=self.total_steps)


class Stage(BaseModel):
    """A run of steps in which some parts learn and the others stay as they are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    learns: tuple[Part, ...]
    batches: BatchPlan
    loop: StageLoop


class BuiltinRecipe(BaseModel):
    """Everything that decides what the built-in model becomes, but for the number of processes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: VisualGLMConfig
    vocab_size: int
    seed: int
    stages: tuple[Stage, ...]


def read_recipe(path: Path) -> BuiltinRecipe:
    """Raises `ConfigError` naming the first fault."""
    values = read_yaml(path)
    try:
        return BuiltinRecipe.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"The recipe {path} is not valid: {first_fault(error)}.") from error


class Builtin(nn.Module):
    """The model, its teacher, and their losses."""

    def __init__(self, recipe: BuiltinRecipe) -> None:
        super().__init__()
        self.model = VisualGLMModel(recipe.model)
        initialize(self.model, recipe.seed, torch.from_numpy(sample_pixels(recipe.model.vision.image_size)))
        self.teacher = SceneTeacher(recipe.model)

    def learn(self, parts: Iterable[Part]) -> None:
        """Only `parts` get gradients from here on."""
        self.requires_grad_(False)
        for part in parts:
            (self.teacher if part == "teacher" else getattr(self.model, part)).requires_grad_(True)

    def forward(self, batch: SceneBatch) -> dict[str, Tensor]:
        """What the teacher says of the eye, while it learns, and of the answers where the batch has some."""
        eye_learns = self.model.vision.class_token.requires_grad
        with torch.set_grad_enabled(eye_learns):
            vision = self.model.vision(self._tensor(batch.pixels))
        losses = {}
        if eye_learns:
            losses["patch"] = self.teacher.patch_loss(vision, self._tensor(batch.patch_targets))
        if batch.slot_targets is None:
            return losses
        with torch.set_grad_enabled(eye_learns):
            embeds = self.model.projection(self.model.qformer(vision))
        if eye_learns:
            losses["slot"] = self.teacher.slot_loss(embeds, self._tensor(batch.slot_targets))
        if batch.rows:
            answered = [self._answers(rows, embeds) for rows in batch.rows]
            tokens = sum(count for _, count in answered)
            losses["answer"] = torch.stack([loss * (count / tokens) for loss, count in answered]).sum()
        return losses

    def _answers(self, rows: Rows, scene_embeds: Tensor) -> tuple[Tensor, int]:
        layout = rows.layout
        scenes = self._tensor(rows.scene_index)
        hidden = self.model.hidden_states(
            self._tensor(layout.input_ids),
            scene_embeds[scenes[scenes >= 0]],
            self._tensor(layout.image_starts),
            self._tensor(layout.position_ids()),
            self._tensor(layout.attention_mask()).unsqueeze(1),
        )
        counted = int((rows.labels[:, 1:] >= 0).sum())
        return self.model.answer_loss(hidden, self._tensor(rows.labels)), counted

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.model.projection.weight.device)


def train(
    recipe: BuiltinRecipe,
    output: Path,
    *,
    workers: int,
    device: str,
    report: Callable[[int, int], None],
    tell: Callable[[str], None],
) -> Path | None:
    """Train all stages, or what is left of them, and write `output/model`.

    Under torchrun the processes share the work; only the first writes, and only it returns the path.
    """
    processes = join_processes(device)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(recipe, output, processes)
    builtin = Builtin(recipe).to(processes.device)
    done, total = 0, sum(stage.loop.total_steps for stage in recipe.stages)
    for index, stage in enumerate(recipe.stages):
        builtin.learn(stage.learns)
        trainer = _stage_trainer(recipe, index, builtin, tokenizer, output, processes, workers)
        if trainer.resume():
            tell(f"stage {stage.name}: going on from step {trainer.step}")
        _run_stage(trainer, stage, output, lambda step, before=done: report(before + step, total))  # type: ignore[misc]
        done += stage.loop.total_steps
    is_first = processes.is_first
    processes.leave()
    return _finish(builtin, recipe, tokenizer, output) if is_first else None


def _run_stage(trainer: Trainer[SceneBatch], stage: Stage, output: Path, report: Callable[[int], None]) -> None:
    log = None
    if trainer.processes.rank == 0:
        paths = (output / f"{stage.name}.{suffix}" for suffix in ("jsonl", "png"))
        log = RunLog(*paths, title=f"{output.name}: {stage.name}", first_step=trainer.step)
    for step in trainer.run():
        if log is not None and step.step % stage.loop.log_every == 0:
            log.append(step)
        if log is not None and step.step % stage.loop.checkpoint_every == 0:
            log.show()
        report(step.step)
    if log is not None:
        log.close()


def _stage_trainer(
    recipe: BuiltinRecipe,
    index: int,
    builtin: Builtin,
    tokenizer: Tokenizer,
    output: Path,
    processes: Processes,
    workers: int,
) -> Trainer[SceneBatch]:
    stage = recipe.stages[index]
    data = SceneBatches(recipe.model, tokenizer, stage.batches, seed=recipe.seed + 1000 * index)

    def batches(first_step: int) -> Iterator[Sequence[SceneBatch]]:
        world_size = processes.world_size
        mine = range(first_step * world_size + processes.rank, stage.loop.total_steps * world_size, world_size)
        loader = DataLoader(
            cast("Dataset[SceneBatch]", data),
            batch_size=None,
            sampler=mine,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
        )
        return ([batch] for batch in loader)

    fingerprint = {
        **recipe.model_dump(mode="json", include={"model", "vocab_size", "seed"}),
        "stages": [earlier.model_dump(mode="json") for earlier in recipe.stages[: index + 1]],
        "processes": processes.world_size,
    }
    task: Task[SceneBatch] = Task(
        builtin,
        lambda module, batch: module(batch),
        lambda batch: 1.0,  # the losses are means already, of equally many scenes
        kept=builtin.state_dict(),
    )
    learner = TorchLearner(stage.loop, task, processes)
    course = Course(batches, stage.loop.rate)
    return Trainer(stage.loop, learner, course, processes, output / f"{index + 1}-{stage.name}", fingerprint)


def _tokenizer(recipe: BuiltinRecipe, output: Path, processes: Processes) -> Tokenizer:
    path = output / "tokenizer.model"
    if processes.is_first and not path.is_file():
        train_tokenizer(path, vocab_size=recipe.vocab_size)
    processes.wait()
    return Tokenizer.for_model(path, recipe.model.text)


def _finish(builtin: Builtin, recipe: BuiltinRecipe, tokenizer: Tokenizer, output: Path) -> Path:
    state = {name: parameter.cpu() for name, parameter in builtin.model.state_dict().items()}
    return publish(
        state,
        recipe.model,
        tokenizer.path,
        output / "model",
        source="visualglm-builtin",
        license_text=LICENSE,
        force=True,
    ).path
