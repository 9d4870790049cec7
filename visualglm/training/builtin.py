"""Trains the built-in model from nothing: tokenizer, weights, and the model directory with both.

    python -m visualglm.training.builtin configs/builtin.yaml runs/builtin
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from visualglm.backends.torch.joined import VisualGLMModel
from visualglm.config import VisualGLMConfig
from visualglm.processing.tokenizer import Tokenizer
from visualglm.scenes.dataset import Rows, SceneBatch, SceneBatches
from visualglm.scenes.teacher import SceneTeacher
from visualglm.training.initialize import initialize
from visualglm.training.loop import LoopConfig, Trainer


class BuiltinRecipe(BaseModel):
    """Everything that decides what the built-in model becomes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: VisualGLMConfig
    loop: LoopConfig
    scenes_per_step: int = 32
    questions_per_scene: int = 4
    vocab_size: int = 768
    patch_weight: float = 1.0
    slot_weight: float = 1.0
    seed: int = 1


class Builtin:
    """The modules under training and their losses."""

    def __init__(self, recipe: BuiltinRecipe) -> None:
        self.recipe = recipe
        self.model = VisualGLMModel(recipe.model)
        initialize(self.model, recipe.seed)
        self.teacher = SceneTeacher(recipe.model)

    def compute_losses(self, batch: SceneBatch) -> dict[str, Tensor]:
        """The answers' loss over all rows, weighted by tokens, and the two of the teacher."""
        vision = self.model.vision(torch.from_numpy(batch.pixels))
        embeds = self.model.projection(self.model.qformer(vision))
        answered = [self._answers(rows, embeds) for rows in batch.rows]
        tokens = sum(count for _, count in answered)
        return {
            "answer": torch.stack([loss * (count / tokens) for loss, count in answered]).sum(),
            "patch": self.recipe.patch_weight * self.teacher.patch_loss(vision, torch.from_numpy(batch.patch_targets)),
            "slot": self.recipe.slot_weight * self.teacher.slot_loss(embeds, torch.from_numpy(batch.slot_targets)),
        }

    def _answers(self, rows: Rows, scene_embeds: Tensor) -> tuple[Tensor, int]:
        layout = rows.layout
        scenes = torch.from_numpy(rows.scene_index)
        hidden = self.model.hidden_states(
            torch.from_numpy(layout.input_ids),
            scene_embeds[scenes[scenes >= 0]],
            torch.from_numpy(layout.image_starts),
            torch.from_numpy(layout.position_ids()),
            torch.from_numpy(layout.attention_mask()).unsqueeze(1),
        )
        labels = torch.from_numpy(rows.labels)
        return self.model.answer_loss(hidden, labels), int((labels[:, 1:] >= 0).sum())


def make_trainer(recipe: BuiltinRecipe, tokenizer: Tokenizer, folder: Path, *, workers: int = 1) -> Trainer[SceneBatch]:
    """A trainer whose checkpoints lie in `folder`."""
    builtin = Builtin(recipe)
    data = SceneBatches(
        recipe.model,
        tokenizer,
        steps=recipe.loop.total_steps,
        scenes=recipe.scenes_per_step,
        questions=recipe.questions_per_scene,
        seed=recipe.seed,
    )

    def batches(first_step: int) -> Iterable[SceneBatch]:
        rest = Subset(data, range(first_step, len(data)))
        return DataLoader(rest, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None)

    fingerprint: dict[str, Any] = {**recipe.model_dump(mode="json"), "tokenizer": tokenizer.sha256}
    modules = {"model": builtin.model, "teacher": builtin.teacher}
    return Trainer(recipe.loop, modules, builtin.compute_losses, batches, folder, fingerprint)
