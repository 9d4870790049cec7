"""A fine-tuning run, as one of its processes does it: from a recipe to an adapter directory."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

from visualglm.checkpoint.adapter_dir import write_adapter
from visualglm.checkpoint.files import locked_folder
from visualglm.checkpoint.instead import is_adapter
from visualglm.checkpoint.manifest import Source
from visualglm.checkpoint.model_dir import ModelDirectory, open_model_directory
from visualglm.errors import DISK_FULL, CheckpointError, ConfigError, TokenizerError
from visualglm.export_cache import cache_folder
from visualglm.loading import BUILTIN_NAME, builtin_path
from visualglm.memory import gib
from visualglm.parameters import parameter_count
from visualglm.processing.tokenizer import Tokenizer
from visualglm.training.batches import Batch
from visualglm.training.engine import TrainingBackend, TrainingEngine, Tuned, join_engine
from visualglm.training.fingerprint import newest_of_run
from visualglm.training.image_cache import ImageCache
from visualglm.training.loop import Course, StepReport, Trainer, loop_config
from visualglm.training.parts import is_sharded, whole_parts
from visualglm.training.recipe import FinetuneRecipe
from visualglm.training.recipe_file import RECIPE_NAME
from visualglm.training.run_data import PlannedData, RunData, plan_data
from visualglm.training.run_folder import RunFolder
from visualglm.training.run_log import RunLog
from visualglm.training.schedule import learning_rate, pace_note
from visualglm.training.training_memory import TrainingCase, TrainingMemory, require_training_memory

# A process of an earlier run that was killed may hold the folder a little longer: its workers look now and then.
_PATIENCE_SECONDS = 30.0
# What does not change what is learnt; of files the content counts, not the name.
_NOT_COMPARED: dict[str, Any] = {
    "model": True,
    "data": {"train", "validation", "workers"},
    "run": {"checkpoint_every", "keep_checkpoints", "log_every"},
}


class RunUI(Protocol):
    """What a run tells its user; `cli.messages.Messages` is one."""

    def tell(self, text: str) -> None: ...

    def show_table(self, rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> None: ...

    def byte_progress(self, title: str) -> AbstractContextManager[Callable[[int, int], None]]: ...

    def row_progress(self, title: str) -> AbstractContextManager[Callable[[int, int], None]]: ...

    def noted_progress(self, title: str) -> AbstractContextManager[Callable[[int, int, str], None]]: ...


class Silent:
    """Tells nothing: for all processes but the first."""

    def tell(self, text: str) -> None:
        pass

    def show_table(self, rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> None:
        pass

    def byte_progress(self, title: str) -> AbstractContextManager[Callable[[int, int], None]]:
        return nullcontext(lambda done, total: None)

    def row_progress(self, title: str) -> AbstractContextManager[Callable[[int, int], None]]:
        return nullcontext(lambda done, total: None)

    def noted_progress(self, title: str) -> AbstractContextManager[Callable[[int, int, str], None]]:
        return nullcontext(lambda done, total, note: None)


def finetune(
    recipe: FinetuneRecipe,
    output: Path,
    *,
    resume: bool = False,
    backend: TrainingBackend = "torch",
    device: str = "auto",
    compiled: bool = True,
    ui: RunUI | None = None,
) -> Path:
    """Train, and return the folder of the adapter, `output/adapter`; one process of a run, which launches no others.

    resume: go on from the last checkpoint in `output`, or begin if there is none. Raises a `VisualGLMError` if rows
    are bad, the memory does not suffice, `output` holds another run, a checkpoint cannot be written, or another
    process of the run is gone. compiled: whether MindSpore runs a step as one graph.
    """
    engine = join_engine(backend, device, compiled=compiled)
    folder = RunFolder(output)
    with engine.faults_named(), _disk_named(output):
        engine.processes.first_does(lambda: folder.require_free(resume=resume))
        _Run(recipe, folder, backend, engine, (ui or Silent()) if engine.processes.rank == 0 else Silent()).run()
    engine.processes.leave()
    return folder.adapter


@contextmanager
def _disk_named(output: Path) -> Iterator[None]:
    """Turns what goes wrong with files of the run, other than adapters and checkpoints, into a sentence."""
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno in DISK_FULL else error.strerror or error
        raise CheckpointError(
            f"A file in {output} could not be written ({reason}); "
            "mend that, and --resume goes on from the last checkpoint."
        ) from error


@dataclass(frozen=True)
class _Base:
    """The model that is tuned."""

    directory: ModelDirectory
    tokenizer: Tokenizer
    name: str | None

    @classmethod
    def open(cls, path: Path | None) -> _Base:
        if path is not None:
            _require_no_adapter(path)
        directory = open_model_directory(path or builtin_path())
        if directory.tokenizer_path is None:
            raise TokenizerError(
                f"The model {directory.path} has no tokenizer.model, so it cannot learn words; "
                "convert it again with --tokenizer ice_text.model."
            )
        tokenizer = Tokenizer.for_model(directory.tokenizer_path, directory.config.text)
        return cls(directory, tokenizer, BUILTIN_NAME if path is None else None)


def _require_no_adapter(path: Path) -> None:
    """Of one, or the folder of a run, other commands say that it goes beside its model: not to be done here."""
    adapter = RunFolder(path).adapter if (path / RECIPE_NAME).is_file() else path
    if is_adapter(adapter):
        said = "is an adapter" if adapter == path else f"is the folder of a run, with the adapter {adapter}"
        raise CheckpointError(
            f"{path} {said}, and fine-tuning begins with a model; give the one that the adapter belongs to, "
            f"or merge both with `visualglm merge MODEL {shlex.quote(str(adapter))} OUT`, and give OUT."
        )


class _Run:
    """One process of a run."""

    def __init__(
        self, recipe: FinetuneRecipe, folder: RunFolder, backend: TrainingBackend, engine: TrainingEngine, ui: RunUI
    ) -> None:
        self.recipe = recipe
        self.folder = folder
        self.backend = backend
        self.engine = engine
        self.processes = engine.processes
        self.is_first = engine.processes.rank == 0
        self.ui = ui
        self.base = _Base.open(recipe.model)
        self.dtype = engine.precision(recipe, self.base.directory.config)
        self.trains_image = any(part != "text" for part in whole_parts(recipe.tune))
        self.encodes_first = recipe.data.cache_images and not self.trains_image

    def run(self) -> None:
        """Nothing is written, and no model loaded, before all that can be known to be wrong is."""
        planned = self._plan()
        fingerprint = self._fingerprint(planned)
        newest_of_run(self.folder.checkpoints, fingerprint)
        with_encoder = self.trains_image or (planned.has_images and not self.encodes_first)
        memory = self._require_memory(planned.longest, with_encoder)
        with self._held_folder():
            self.processes.first_does(lambda: self.folder.begin(self.recipe, self.backend))
            data = self._data(planned)
            tuned = self._load(with_encoder)
            self._show(tuned, memory, data)
            trainer = self._trainer(tuned, data, planned.longest, fingerprint)
            if trainer.resume():
                self.ui.tell(f"Going on from step {trainer.step} of {data.total_steps}.")
            self._train(trainer, tuned, data)
            self._write(self.folder.adapter, tuned, trainer.step)
        if trainer.skipped_steps:
            self.ui.tell(f"{trainer.skipped_steps} steps were left out, because their gradients were not finite.")

    def _held_folder(self) -> AbstractContextManager[None]:
        """The first process holds it against other runs."""
        if not self.is_first:
            return nullcontext()
        self.folder.path.mkdir(parents=True, exist_ok=True)
        return locked_folder(self.folder.path, patience=_PATIENCE_SECONDS)

    def _plan(self) -> PlannedData:
        with self.ui.row_progress("checking rows") as report:
            planned = self.processes.first_does(
                lambda: plan_data(self.recipe, self.base.tokenizer, self.base.directory.config, report)
            )
        for note in planned.notes:
            self.ui.tell(note)
        return planned

    def _fingerprint(self, planned: PlannedData) -> dict[str, Any]:
        files = {f"data.{name} (its content)": sha256 for name, sha256 in planned.hashes.items()}
        return {
            **self.recipe.model_dump(mode="json", exclude=_NOT_COMPARED),
            **files,
            "model (its fingerprint)": self.base.directory.fingerprint,
            "processes": self.processes.world_size,
        }

    def _require_memory(self, longest: tuple[int, int], with_encoder: bool) -> tuple[TrainingMemory, int]:
        """What the run takes, and what there is for this process."""
        available, world_size = self.engine.free_memory(), self.processes.world_size
        case = TrainingCase(
            self.base.directory.config,
            self.recipe,
            self.dtype,
            *longest,
            image_encoder=with_encoder,
            shards=world_size if is_sharded(self.recipe.tune, world_size) else 1,
        )
        return require_training_memory(case, available, self.processes.device_name), available

    def _data(self, planned: PlannedData) -> RunData:
        directory = self.base.directory
        cache = ImageCache(cache_folder() / "images", directory.config, directory.fingerprint, self.dtype)
        data = RunData(
            planned,
            self.recipe,
            self.base.tokenizer,
            directory.config,
            cache if self.encodes_first else None,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            read_ahead=self.engine.read_ahead,
        )
        if self.encodes_first:
            self._encode(data.images(), cache)
            self.processes.wait()
        return data

    def _encode(self, images: Sequence[Path], cache: ImageCache) -> None:
        """Encode those that are not in the cache; ViT and Q-Former are in memory only for that."""
        missing = cache.missing(images)
        if not missing:
            return
        encode = self.engine.image_encoder(self.base.directory, self.recipe)
        with self.ui.row_progress("encoding images") as report:
            cache.fill(missing, encode, report=report)

    def _load(self, with_encoder: bool) -> Tuned:
        """At the released size this takes minutes where the decoder is quantised."""
        tune = self.recipe.tune
        bits = f" in {tune.base_bits} bits" if "qlora" in tune.methods else ""
        with self.ui.byte_progress(f"loading the model{bits}") as report:
            return self.engine.load(self.base.directory, self.recipe, with_encoder=with_encoder, report=report)

    def _show(self, tuned: Tuned, memory: tuple[TrainingMemory, int], data: RunData) -> None:
        """What is trained and what it takes, before the first step."""
        summary = tuned.summary()
        rows = [(part.what, part.layers, f"{part.parameters:,}") for part in summary]
        self.ui.show_table(rows, ("trained", "layers", "parameters"))
        trained = sum(part.parameters for part in summary)
        total = parameter_count(self.base.directory.config)
        needed, available = memory
        self.ui.tell(f"{trained:,} parameters are trained, {trained / total:.3%} beside the model's {total:,}.")
        self.ui.tell(f"Memory: {needed}; {gib(available)} are free on {self.processes.device_name}, in {self.dtype}.")
        held_out = len(data.validation) if data.validation else 0
        count = self.processes.world_size
        self.ui.tell(
            f"{len(data.train):,} answers to learn, {held_out:,} held out; {data.total_steps:,} steps, "
            f"{data.steps_per_epoch:,} an epoch, in {'one process' if count == 1 else f'{count} processes'}."
        )
        if note := pace_note(self.recipe.optimizer, data.total_steps):
            self.ui.tell(note)

    def _trainer(
        self, tuned: Tuned, data: RunData, longest: tuple[int, int], fingerprint: dict[str, Any]
    ) -> Trainer[Batch]:
        total = data.total_steps
        course = Course(data.batches, lambda step: learning_rate(self.recipe.optimizer, step, total))
        config, learner = loop_config(self.recipe, total), tuned.learner(total, longest)
        return Trainer(config, learner, course, self.processes, self.folder.checkpoints, fingerprint)

    def _train(self, trainer: Trainer[Batch], tuned: Tuned, data: RunData) -> None:
        log = self._log(trainer.step) if self.is_first else None
        every = self.recipe.run.validate_every or data.steps_per_epoch
        with self.ui.noted_progress("training") as report:
            for step in trainer.run():
                is_last = step.step == data.total_steps
                validation = {}
                if data.validation and (step.step % every == 0 or is_last):
                    validation = self._validate(trainer, tuned, data, step)
                if log and (validation or is_last or step.step % trainer.config.log_every == 0):
                    log.append(step, validation)
                if log and (validation or step.step % trainer.config.checkpoint_every == 0):
                    log.show()
                report(step.step, data.total_steps, f"loss {step.losses['loss']:.4f}")
                if is_last:
                    self._require_finite(step, validation)
        if log:
            log.close()

    def _require_finite(self, last: StepReport, validation: Mapping[str, float]) -> None:
        """What has diverged is no result, and must not be saved as one."""
        found = {"the loss of the last step": last.losses} | (
            {"that of held-out rows": validation} if validation else {}
        )
        for what, losses in found.items():
            loss = losses["loss"]
            if not isfinite(loss):
                rate = self.recipe.optimizer.learning_rate
                raise ConfigError(
                    f"The training has diverged: {what} is {loss}, so no adapter was written; begin again with an "
                    f"optimizer.learning_rate below {rate:g}."
                )

    def _log(self, first_step: int) -> RunLog:
        folder = self.folder
        title = f"{folder.path.name}: {', '.join(self.recipe.tune.methods)}"
        scalars = self.engine.scalar_writer(folder.events, first_step)
        return RunLog(folder.log, folder.curve, title=title, scalars=scalars, first_step=first_step)

    def _validate(self, trainer: Trainer[Batch], tuned: Tuned, data: RunData, step: StepReport) -> dict[str, float]:
        """Losses of the rows that are not trained on; the best adapter by them is kept."""
        losses = trainer.learner.evaluate(data.validation_batches())
        best = trainer.notes.get("best")
        is_best = isfinite(losses["loss"]) and (best is None or losses["loss"] < best["loss"])
        if is_best:
            trainer.notes["best"] = {"step": step.step, **losses}
            self._write(self.folder.best, tuned, step.step)
        self.ui.tell(
            f"step {step.step}: loss {step.losses['loss']:.4f}, held-out rows {losses['loss']:.4f}"
            f"{' (the best)' if is_best else ''}"
        )
        return losses

    def _write(self, path: Path, tuned: Tuned, step: int) -> None:
        """Write an adapter; all processes help to gather it."""
        adapter = tuned.adapter()
        if adapter is None:
            return
        write_adapter(
            path,
            base=self.base.directory,
            lora_settings=adapter.lora_settings,
            lora=adapter.lora,
            trained=adapter.trained,
            prefix=adapter.prefix,
            source=Source(format="visualglm-finetune"),
            base_name=self.base.name,
            settings={"step": step, **self.recipe.model_dump(mode="json", include={"tune", "optimizer"})},
            force=True,
        )
