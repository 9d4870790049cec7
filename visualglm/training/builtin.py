"""Trains the built-in model from nothing, in stages: first it learns to see, then to speak of what it sees."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, Dataset

from visualglm.backends.torch.joined import VisualGLMModel
from visualglm.config import VisualGLMConfig
from visualglm.errors import ConfigError
from visualglm.faults import first_fault
from visualglm.processing.tokenizer import Tokenizer
from visualglm.scenes.dataset import BatchPlan, Rows, SceneBatch, SceneBatches, sample_pixels
from visualglm.scenes.teacher import SceneTeacher
from visualglm.scenes.vocabulary import train_tokenizer
from visualglm.training.curve import draw_curve
from visualglm.training.initialize import initialize
from visualglm.training.loop import LoopConfig, StepReport, Trainer, append_log, share_parameters
from visualglm.training.publish import publish

Part = Literal["vision", "qformer", "projection", "text", "teacher"]
LICENSE = "The built-in model was trained by this project on scenes it draws itself; Apache-2.0, like the code.\n"


class Stage(BaseModel):
    """A run of steps in which some parts learn and the others stay as they are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    learns: tuple[Part, ...]
    batches: BatchPlan
    loop: LoopConfig


class BuiltinRecipe(BaseModel):
    """Everything that decides what the built-in model becomes, but for the number of processes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: VisualGLMConfig
    vocab_size: int
    seed: int
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class Process:
    """One of the processes that train together, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def read_recipe(path: Path) -> BuiltinRecipe:
    """Raises `ConfigError` naming the first fault."""
    try:
        return BuiltinRecipe.model_validate(yaml.safe_load(path.read_text("utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"The recipe {path} cannot be read ({error}); give a YAML file.") from error
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

    def compute_losses(self, batch: SceneBatch) -> dict[str, Tensor]:
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
    process = _join_processes(device)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(recipe, output, process)
    builtin = Builtin(recipe).to(process.device)
    share_parameters(builtin)
    done, total = 0, sum(stage.loop.total_steps for stage in recipe.stages)
    for index, stage in enumerate(recipe.stages):
        builtin.learn(stage.learns)
        trainer = _stage_trainer(recipe, index, builtin, tokenizer, output, process, workers)
        if trainer.resume():
            tell(f"stage {stage.name}: going on from step {trainer.step}")
        for step in trainer.run():
            _log(step, stage, output, process)
            report(done + step.step, total)
        done += stage.loop.total_steps
    return _finish(builtin, recipe, tokenizer, output) if process.is_first else None


def _stage_trainer(
    recipe: BuiltinRecipe,
    index: int,
    builtin: Builtin,
    tokenizer: Tokenizer,
    output: Path,
    process: Process,
    workers: int,
) -> Trainer[SceneBatch]:
    stage = recipe.stages[index]
    data = SceneBatches(recipe.model, tokenizer, stage.batches, seed=recipe.seed + 1000 * index)

    def batches(first_step: int) -> Iterable[SceneBatch]:
        world_size = process.world_size
        mine = range(first_step * world_size + process.rank, stage.loop.total_steps * world_size, world_size)
        return DataLoader(
            cast("Dataset[SceneBatch]", data),
            batch_size=None,
            sampler=mine,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
        )

    fingerprint = {
        **recipe.model_dump(mode="json", include={"model", "vocab_size", "seed"}),
        "stages": [earlier.model_dump(mode="json") for earlier in recipe.stages[: index + 1]],
        "world_size": process.world_size,
    }
    folder = output / f"{index + 1}-{stage.name}"
    return Trainer(
        stage.loop, {"builtin": builtin}, builtin.compute_losses, batches, folder, fingerprint, saves=process.is_first
    )


def _join_processes(device: str) -> Process:
    """Meets the processes that torchrun started; alone without it."""
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    on_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_cuda else torch.device("cpu")
    if world_size > 1 and not distributed.is_initialized():
        distributed.init_process_group("nccl" if on_cuda else "gloo")
    return Process(rank, world_size, chosen)


def _tokenizer(recipe: BuiltinRecipe, output: Path, process: Process) -> Tokenizer:
    path = output / "tokenizer.model"
    if process.is_first and not path.is_file():
        train_tokenizer(path, vocab_size=recipe.vocab_size)
    if process.world_size > 1:
        distributed.barrier()
    return Tokenizer.for_model(path, recipe.model.text)


def _log(step: StepReport, stage: Stage, output: Path, process: Process) -> None:
    if not process.is_first or step.step % stage.loop.log_every:
        return
    log = output / f"{stage.name}.jsonl"
    append_log(log, step)
    if step.step % stage.loop.checkpoint_every == 0 or step.step == stage.loop.total_steps:
        draw_curve(log, output / f"{stage.name}.png", title=f"{output.name}: {stage.name}")


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
