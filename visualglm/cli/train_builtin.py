"""`visualglm train-builtin`: trains the built-in model from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from visualglm.cli.extras import needs_training
from visualglm.cli.messages import Messages
from visualglm.cli.options import Quiet


def train_builtin(
    recipe: Annotated[Path, Argument(metavar="RECIPE", help="The recipe, such as configs/builtin.yaml.")],
    output: Annotated[Path, Argument(metavar="OUT", help="Folder for checkpoints, log, curve and model directory.")],
    workers: Annotated[int, Option(metavar="N", min=0, help="Processes that draw scenes, for each that trains.")] = 1,
    device: Annotated[
        str, Option(metavar="NAME", help="cpu, cuda or auto; with torchrun each process has its own.")
    ] = "auto",
    quiet: Quiet = False,
) -> None:
    """Train the built-in model (needs the extra "train"); goes on from the newest checkpoint in OUT.

    On several cores or cards: torchrun --nproc_per_node 4 -m visualglm.cli train-builtin RECIPE OUT.
    """
    messages = Messages(quiet)
    with needs_training():
        from visualglm.training.torch.builtin import read_recipe, train

        chosen = read_recipe(recipe)
        with messages.row_progress("training") as report:
            directory = train(chosen, output, workers=workers, device=device, report=report, tell=messages.tell)
    if directory is not None:
        messages.tell(f"The model is in {directory}; `visualglm ask --model {directory}` asks it.")
