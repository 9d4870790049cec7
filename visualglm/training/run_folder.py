"""What a fine-tuning run leaves in its folder, and whether a run may begin or go on there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from visualglm.checkpoint.files import replace_file
from visualglm.errors import ConfigError
from visualglm.training.engine import TrainingBackend
from visualglm.training.recipe import FinetuneRecipe
from visualglm.training.recipe_file import RECIPE_NAME, recipe_to_yaml


@dataclass(frozen=True)
class RunFolder:
    """The names of what lies in it."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """The adapter with the lowest loss on rows that are not trained on."""
        return self.path / "best"

    @property
    def adapter(self) -> Path:
        """The adapter after the last step."""
        return self.path / "adapter"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def curve(self) -> Path:
        return self.path / "curve.png"

    @property
    def events(self) -> Path:
        """For TensorBoard."""
        return self.path / "runs"

    @property
    def recipe(self) -> Path:
        return self.path / RECIPE_NAME

    @property
    def backend(self) -> TrainingBackend | None:
        """What computed last in it, if that is known."""
        try:
            written = self._backend.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None
        return next((known for known in get_args(TrainingBackend) if known == written), None)

    @property
    def _backend(self) -> Path:
        return self.path / "backend.txt"

    def require_free(self, *, resume: bool) -> None:
        """Raises `ConfigError` if there is a run in the folder and it is not to be resumed, or the folder is a file."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file; give a folder for what the run makes.")
        found = next((path for path in (self.adapter, self.checkpoints, self.log) if path.exists()), None)
        if found is not None and not resume:
            raise ConfigError(f"{self.path} holds a run already; --resume goes on with it, or give another folder.")

    def begin(self, recipe: FinetuneRecipe, backend: TrainingBackend) -> None:
        """Make what is not there yet; raises `OSError`."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        replace_file(self.recipe, [recipe_to_yaml(recipe).encode()])
        replace_file(self._backend, [f"{backend}\n".encode()])
