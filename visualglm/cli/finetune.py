"""`visualglm finetune`: trains a model on rows of pictures, questions and answers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, get_args

from typer import Argument, Exit, Option

from visualglm.cli.extras import needs_training
from visualglm.cli.messages import Messages
from visualglm.cli.options import Quiet
from visualglm.errors import ConfigError
from visualglm.loading import BUILTIN_NOTICE
from visualglm.training.engine import TrainingBackend
from visualglm.training.launch import faults_told_once, launch
from visualglm.training.recipe import FinetuneRecipe, Precision
from visualglm.training.recipe_file import RECIPE_NAME, read_recipe, recipe_to_yaml
from visualglm.training.run_folder import RunFolder

_RECIPE = "Recipe"
# What torchrun, msrun, and those who start the processes of a rank table, call the number of a process.
_RANKS = ("RANK", "MS_NODE_ID", "RANK_ID")


@dataclass(frozen=True)
class RecipeOptions:
    """Keys of the recipe that have an option of their own; `_KEYS` says which."""

    train: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="Rows to train on: JSONL or a JSON list of img, prompt, label.",
            rich_help_panel=_RECIPE,
        ),
    ] = None
    validation: Annotated[
        Path | None,
        Option(metavar="FILE", help="Rows to validate on; else a tenth of the others.", rich_help_panel=_RECIPE),
    ] = None
    model: Annotated[
        Path | None,
        Option("--model", "-m", metavar="DIR", help="Model directory; else the built-in.", rich_help_panel=_RECIPE),
    ] = None
    method: Annotated[
        str | None,
        Option(
            metavar="NAMES",
            help="Of lora, qlora, ptuning, qformer, vit, full: one or, with commas, several.",
            rich_help_panel=_RECIPE,
        ),
    ] = None
    lr: Annotated[float | None, Option(metavar="X", help="Learning rate at its peak.", rich_help_panel=_RECIPE)] = None
    steps: Annotated[int | None, Option(metavar="N", help="Steps to train; or --epochs.", rich_help_panel=_RECIPE)] = (
        None
    )
    epochs: Annotated[
        float | None, Option(metavar="X", help="Times that each row is seen.", rich_help_panel=_RECIPE)
    ] = None
    rank: Annotated[int | None, Option(metavar="N", help="Rank of LoRA.", rich_help_panel=_RECIPE)] = None
    alpha: Annotated[
        float | None, Option(metavar="X", help="Alpha of LoRA, whose scale is alpha / rank.", rich_help_panel=_RECIPE)
    ] = None
    layers: Annotated[
        str | None,
        Option(metavar="LIST", help="Those with LoRA: 0,14, a number of first ones, or all.", rich_help_panel=_RECIPE),
    ] = None
    batch_size: Annotated[
        int | None, Option(metavar="N", help="Rows at once, in each process.", rich_help_panel=_RECIPE)
    ] = None
    accumulation: Annotated[
        int | None, Option(metavar="N", help="Batches of each process to a step.", rich_help_panel=_RECIPE)
    ] = None
    precision: Annotated[Precision | None, Option(help="Of what is computed.", rich_help_panel=_RECIPE)] = None
    seed: Annotated[int | None, Option(metavar="N", help="Makes a run repeatable.", rich_help_panel=_RECIPE)] = None
    set: Annotated[
        list[str] | None,
        Option(metavar="KEY=VALUE", help="Any key of the recipe; may be repeated.", rich_help_panel=_RECIPE),
    ] = None

    def settings(self) -> dict[str, object]:
        """The options that were given, by their keys in the recipe; raises `ConfigError`."""
        given = asdict(self)
        settings = {key: given[name] for name, key in _KEYS.items() if given[name] is not None}
        for assignment in self.set or ():
            key, sign, value = assignment.partition("=")
            if not sign:
                raise ConfigError(f"--set {assignment} sets nothing; write it as --set KEY=VALUE.")
            settings[key.strip()] = value.strip()
        return settings


_KEYS = {
    "train": "data.train",
    "validation": "data.validation",
    "model": "model",
    "method": "tune.methods",
    "lr": "optimizer.learning_rate",
    "steps": "run.steps",
    "epochs": "run.epochs",
    "rank": "tune.lora_rank",
    "alpha": "tune.lora_alpha",
    "layers": "tune.layer_range",
    "batch_size": "run.batch_size",
    "accumulation": "run.accumulation",
    "precision": "run.precision",
    "seed": "run.seed",
}


def finetune(
    recipe_options: RecipeOptions,
    output: Annotated[
        Path, Option("--output", "-o", metavar="OUT", help="Folder for adapter, checkpoints, log and curve.")
    ],
    recipe: Annotated[
        Path | None, Argument(metavar="RECIPE", help="A YAML file such as configs/lora.yaml, or one of MindFormers.")
    ] = None,
    backend: Annotated[
        TrainingBackend | None, Option(help="What computes; else torch, or with --resume what did so before.")
    ] = None,
    device: Annotated[
        str, Option(metavar="NAME", help="auto, cpu; torch: cuda, cuda:1, npu; mindspore: ascend, ascend:1.")
    ] = "auto",
    graph_mode: Annotated[
        int, Option(metavar="N", min=0, max=1, help="mindspore: 0 steps are one graph, 1 they run by operators.")
    ] = 0,
    nproc: Annotated[int, Option(metavar="N", min=1, help="Processes on this machine, which share the rows.")] = 1,
    resume: Annotated[bool, Option("--resume", help="Go on from the last checkpoint in OUT.")] = False,
    print_recipe: Annotated[
        bool, Option("--print-recipe", help="Only show the whole recipe, as the run would take it.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Train a model on your own pictures (needs the extra "train" or "mindspore"); --train and --output are enough.

    On several machines: torchrun … -m visualglm.cli finetune …, or accelerate launch, the same in each; with
    --backend mindspore msrun, or a rank table.
    """
    # torchrun starts many of these, and one says it all.
    messages = Messages(quiet or _rank() != "0")
    if backend is None:
        backend = _default_backend(output, resume=resume, messages=messages)
    way = _Way(backend, device.lower(), graph_mode, resume)
    with faults_told_once(), needs_training(backend):
        settings = recipe_options.settings()
        source = _source(recipe, output, resume=resume, given=bool(settings))
        chosen = read_recipe(source, settings, tell=messages.tell)
        if print_recipe:
            print(recipe_to_yaml(chosen), end="")
        elif nproc > 1:
            _launch(chosen, nproc, ["--output", str(output), *way.options(), *(["--quiet"] if quiet else [])])
        else:
            _run(chosen, output, way, messages)


@dataclass(frozen=True)
class _Way:
    """How a run is to be done, whatever its recipe says."""

    backend: TrainingBackend
    device: str
    graph_mode: int
    resume: bool

    def options(self) -> list[str]:
        """The options of the command that say so."""
        options = ["--backend", self.backend, "--device", self.device, "--graph-mode", str(self.graph_mode)]
        return options + (["--resume"] if self.resume else [])


def _rank() -> str:
    """Which process of a run this is, as torchrun, msrun or whoever starts those of a rank table says it."""
    return next((os.environ[name] for name in _RANKS if name in os.environ), "0")


def _default_backend(output: Path, *, resume: bool, messages: Messages) -> TrainingBackend:
    """What computed last in a run to go on with, or else torch; but one that is installed, if any is."""
    before = RunFolder(output).backend if resume else None
    known: tuple[TrainingBackend, ...] = get_args(TrainingBackend)
    wanted = (before, *known) if before else known
    found = next((name for name in wanted if find_spec(name)), wanted[0])
    if {before, found} - {None, "torch"}:
        messages.tell(f"--backend is not given, and is {found}.")
    return found


def _source(recipe: Path | None, output: Path, *, resume: bool, given: bool) -> Path | None:
    """The recipe's file; without one, that of the run to go on with. given: whether options say what to train."""
    written = output / RECIPE_NAME
    if recipe is not None or not resume or (given and not written.is_file()):
        return recipe
    if not written.is_file():
        raise ConfigError(f"{output} holds no run to go on with; leave out --resume, or give the folder of one.")
    return written


def _run(recipe: FinetuneRecipe, output: Path, way: _Way, messages: Messages) -> None:
    # Read when torch is loaded. Of its warnings one would be told in every process: that DDP looked for parameters
    # without a gradient, and in the first step there were none.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from visualglm.training.finetune import finetune as train

    if recipe.model is None:
        messages.tell(BUILTIN_NOTICE)
    adapter = train(
        recipe,
        output,
        resume=way.resume,
        backend=way.backend,
        device=way.device,
        compiled=way.graph_mode == 0,
        ui=messages,
    )
    model = f"--model {recipe.model} " if recipe.model is not None else ""
    messages.tell(f"The adapter is in {adapter}; `visualglm ask {model}--adapter {adapter} --image FILE` uses it.")


def _launch(recipe: FinetuneRecipe, count: int, options: Sequence[str]) -> None:
    """The same command in `count` processes, which read the recipe as it was understood here."""
    if any(name in os.environ for name in _RANKS):
        raise ConfigError(
            "This process was started by torchrun, msrun or the like, which says how many there are; leave out --nproc."
        )
    with TemporaryDirectory(prefix="visualglm-") as folder:
        path = Path(folder, RECIPE_NAME)
        path.write_text(recipe_to_yaml(recipe), "utf-8")
        code = launch(["-P", "-m", "visualglm.cli", "finetune", str(path), *options], count)
    if code:
        raise Exit(code)
