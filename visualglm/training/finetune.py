"""A fine-tuning run, as one of its processes does it: from a recipe to an adapter directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from visualglm.backends.base import ImageEmbeds
from visualglm.backends.torch.load import memory_of
from visualglm.checkpoint.adapter_dir import write_adapter
from visualglm.checkpoint.files import locked_folder
from visualglm.checkpoint.manifest import Source
from visualglm.checkpoint.model_dir import ModelDirectory, open_model_directory
from visualglm.config import DType
from visualglm.errors import DISK_FULL, CheckpointError, TokenizerError
from visualglm.export_cache import cache_folder
from visualglm.loading import BUILTIN_NAME, builtin_path
from visualglm.memory import gib
from visualglm.parameters import parameter_count
from visualglm.processing.tokenizer import Tokenizer
from visualglm.training.batches import Batch, dead_workers_named
from visualglm.training.distributed import Processes, join_processes, lost_process_named, shard
from visualglm.training.fingerprint import newest_of_run
from visualglm.training.image_cache import ImageCache
from visualglm.training.load import ALL_PARTS, Part, load_for_training, training_dtype
from visualglm.training.loop import LoopConfig, StepReport, Task, Trainer
from visualglm.training.loss import AnswerLoss
from visualglm.training.parts import whole_parts
from visualglm.training.recipe import FinetuneRecipe
from visualglm.training.run_data import PlannedData, RunData, plan_data
from visualglm.training.run_folder import RunFolder
from visualglm.training.run_log import RunLog
from visualglm.training.schedule import learning_rate, pace_note
from visualglm.training.trainable import Trainable, make_trainable
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

    def row_progress(self, title: str) -> AbstractContextManager[Callable[[int, int], None]]: ...

    def noted_progress(self, title: str) -> AbstractContextManager[Callable[[int, int, str], None]]: ...


class Silent:
    """Tells nothing: for all processes but the first."""

    def tell(self, text: str) -> None:
        pass

    def show_table(self, rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> None:
        pass

    def row_progress(self, title: str) -> AbstractContextManager[Callable[[int, int], None]]:
        return nullcontext(lambda done, total: None)

    def noted_progress(self, title: str) -> AbstractContextManager[Callable[[int, int, str], None]]:
        return nullcontext(lambda done, total, note: None)


def finetune(
    recipe: FinetuneRecipe, output: Path, *, resume: bool = False, device: str = "auto", ui: RunUI | None = None
) -> Path:
    """Train, and return the folder of the adapter, `output/adapter`; one process of a run, which launches no others.

    resume: go on from the last checkpoint in `output`, or begin if there is none. Raises a `VisualGLMError` if rows
    are bad, the memory does not suffice, `output` holds another run, a checkpoint cannot be written, or another
    process of the run is gone.
    """
    processes = join_processes(device)
    folder = RunFolder(output)
    with lost_process_named(), dead_workers_named(), _disk_named(output):
        processes.first_does(lambda: folder.require_free(resume=resume))
        _Run(recipe, folder, processes, (ui or Silent()) if processes.is_first else Silent()).run()
    processes.leave()
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
        directory = open_model_directory(path or builtin_path())
        if directory.tokenizer_path is None:
            raise TokenizerError(
                f"The model {directory.path} has no tokenizer.model, so it cannot learn words; "
                "convert it again with --tokenizer ice_text.model."
            )
        tokenizer = Tokenizer.for_model(directory.tokenizer_path, directory.config.text)
        return cls(directory, tokenizer, BUILTIN_NAME if path is None else None)


class _Run:
    """One process of a run."""

    def __init__(self, recipe: FinetuneRecipe, folder: RunFolder, processes: Processes, ui: RunUI) -> None:
        self.recipe = recipe
        self.folder = folder
        self.processes = processes
        self.ui = ui
        self.base = _Base.open(recipe.model)
        self.dtype: DType = training_dtype(recipe.run.precision, self.base.directory.config, processes.device)
        self.trains_image = any(part != "text" for part in whole_parts(recipe.tune))
        self.is_sharded = "full" in recipe.tune.methods and processes.world_size > 1
        self.encodes_first = recipe.data.cache_images and not self.trains_image

    def run(self) -> None:
        """Nothing is written, and no model loaded, before all that can be known to be wrong is."""
        planned = self._plan()
        fingerprint = self._fingerprint(planned)
        newest_of_run(self.folder.checkpoints, fingerprint)
        with_encoder = self.trains_image or (planned.has_images and not self.encodes_first)
        memory = self._require_memory(planned.longest, with_encoder)
        with self._held_folder():
            self.processes.first_does(lambda: self.folder.begin(self.recipe))
            data = self._data(planned)
            trainable = self._load(with_encoder)
            self._show(trainable, memory, data)
            trainer = self._trainer(trainable, data, fingerprint)
            if trainer.resume():
                self.ui.tell(f"Going on from step {trainer.step} of {data.total_steps}.")
            self._train(trainer, trainable, data)
            self._write(self.folder.adapter, trainable, trainer.step)
        if trainer.skipped_steps:
            self.ui.tell(f"{trainer.skipped_steps} steps were left out, because their gradients were not finite.")

    def _held_folder(self) -> AbstractContextManager[None]:
        """The first process holds it against other runs."""
        if not self.processes.is_first:
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
        device = self.processes.device
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
        available = memory_of(device) // sharing
        case = TrainingCase(
            self.base.directory.config,
            self.recipe,
            self.dtype,
            *longest,
            image_encoder=with_encoder,
            shards=self.processes.world_size if self.is_sharded else 1,
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
        device = self.processes.device
        model = load_for_training(self.base.directory, self.recipe, device, ["image"])

        def encode(pixels: Any) -> list[ImageEmbeds]:
            with torch.no_grad():
                embeds = model.encode_images(torch.from_numpy(pixels).to(device, getattr(torch, self.dtype)))
            return [ImageEmbeds(array) for array in embeds.float().cpu().numpy()]

        with self.ui.row_progress("encoding images") as report:
            cache.fill(missing, encode, report=report)

    def _load(self, with_encoder: bool) -> Trainable:
        recipe = self.recipe
        parts: Sequence[Part] = ALL_PARTS if with_encoder else ["text"]
        model = load_for_training(self.base.directory, recipe, self.processes.device, parts)
        return make_trainable(
            model,
            recipe.tune,
            recipe.run.seed,
            dtype=self.dtype,
            activation_checkpointing=recipe.run.activation_checkpointing,
        )

    def _show(self, trainable: Trainable, memory: tuple[TrainingMemory, int], data: RunData) -> None:
        """What is trained and what it takes, before the first step."""
        rows = [(part.what, part.layers, f"{part.parameters:,}") for part in trainable.summary()]
        self.ui.show_table(rows, ("trained", "layers", "parameters"))
        trained = sum(part.parameters for part in trainable.summary())
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

    def _trainer(self, trainable: Trainable, data: RunData, fingerprint: dict[str, Any]) -> Trainer[Batch]:
        recipe, total = self.recipe, data.total_steps
        loss, device = trainable.loss, self.processes.device
        module = _WithImage(loss, device) if trainable.trains_vision else loss
        if self.is_sharded:
            shard(module, self.processes)
        # What dropout leaves out is another matter in each process.
        torch.manual_seed(recipe.run.seed + self.processes.rank)
        task = Task(
            module,
            _answer_loss,
            lambda batch: batch.token_count,
            data.batches,
            lambda step: learning_rate(recipe.optimizer, step, total),
            sharded=self.is_sharded,
            scaled=self.dtype == "float16",
        )
        config = LoopConfig(
            total_steps=total,
            weight_decay=recipe.optimizer.weight_decay,
            betas=recipe.optimizer.betas,
            eps=recipe.optimizer.eps,
            max_grad_norm=recipe.optimizer.max_grad_norm,
            checkpoint_every=recipe.run.checkpoint_every,
            keep_checkpoints=recipe.run.keep_checkpoints,
            log_every=recipe.run.log_every,
        )
        return Trainer(config, task, self.processes, self.folder.checkpoints, fingerprint)

    def _train(self, trainer: Trainer[Batch], trainable: Trainable, data: RunData) -> None:
        log = self._log(trainer.step) if self.processes.is_first else None
        every = self.recipe.run.validate_every or data.steps_per_epoch
        with self.ui.noted_progress("training") as report:
            for step in trainer.run():
                is_last = step.step == data.total_steps
                validation = {}
                if data.validation and (step.step % every == 0 or is_last):
                    validation = self._validate(trainer, trainable, data, step)
                if log and (validation or is_last or step.step % trainer.config.log_every == 0):
                    log.append(step, validation)
                if log and (validation or step.step % trainer.config.checkpoint_every == 0):
                    log.show()
                report(step.step, data.total_steps, f"loss {step.losses['loss']:.4f}")
        if log:
            log.close()

    def _log(self, first_step: int) -> RunLog:
        folder = self.folder
        title = f"{folder.path.name}: {', '.join(self.recipe.tune.methods)}"
        return RunLog(folder.log, folder.curve, title=title, events=folder.events, first_step=first_step)

    def _validate(
        self, trainer: Trainer[Batch], trainable: Trainable, data: RunData, step: StepReport
    ) -> dict[str, float]:
        """Losses of the rows that are not trained on; the best adapter by them is kept."""
        losses = trainer.evaluate(data.validation_batches())
        best = trainer.notes.get("best")
        is_best = isfinite(losses["loss"]) and (best is None or losses["loss"] < best["loss"])
        if is_best:
            trainer.notes["best"] = {"step": step.step, **losses}
            self._write(self.folder.best, trainable, step.step)
        self.ui.tell(
            f"step {step.step}: loss {step.losses['loss']:.4f}, held-out rows {losses['loss']:.4f}"
            f"{' (the best)' if is_best else ''}"
        )
        return losses

    def _write(self, path: Path, trainable: Trainable, step: int) -> None:
        """Write an adapter; all processes help to gather it."""
        whole = trainable.whole_tensors(kept=self.processes.is_first)
        if not self.processes.is_first:
            return
        lora, prefix = trainable.adapter_tensors(), trainable.prefix_tensors()
        write_adapter(
            path,
            base=self.base.directory,
            lora_settings=trainable.lora_settings(),
            lora={name: tensor.numpy() for name, tensor in lora.items()},
            trained={name: tensor.numpy() for name, tensor in whole.items()},
            prefix={name: tensor.numpy() for name, tensor in prefix.items()},
            source=Source(format="visualglm-finetune"),
            base_name=self.base.name,
            settings={"step": step, **self.recipe.model_dump(mode="json", include={"tune", "optimizer"})},
            force=True,
        )


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
