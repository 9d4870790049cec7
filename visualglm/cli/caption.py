"""`visualglm caption`: many images in, their answers in a JSONL file out."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, Exit, Option

from visualglm.cli.batches import keep_batches, told_if_interrupted
from visualglm.cli.captioner import Captioner
from visualglm.cli.loading import choose_model, load_choice
from visualglm.cli.messages import Messages
from visualglm.cli.mindformers import with_config
from visualglm.cli.options import GenerationOptions, ImageOptions, ModelOptions
from visualglm.cli.row_log import RowLog, require_apart
from visualglm.cli.rows import read_rows

DEFAULT_PROMPT = "描述这张图片。"


def caption(
    source: Annotated[Path, Argument(metavar="INPUT", help="A folder of images, or a JSONL file.")],
    output: Annotated[Path, Option("--output", "-o", metavar="FILE", help="JSONL file that the answers go to.")],
    prompt: Annotated[str, Option(metavar="TEXT", help="For rows without a prompt of their own.")] = DEFAULT_PROMPT,
    batch_size: Annotated[int, Option(metavar="N", min=1, max=65_536, help="Rows answered at once.")] = 16,
    recursive: Annotated[bool, Option("--recursive", "-r", help="Look into the folders of INPUT too.")] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Begin anew instead of going on.")] = False,
    strict: Annotated[bool, Option("--strict", help="Exit with 1 if a row has an error.")] = False,
    *,
    options: ModelOptions,
    generation: GenerationOptions,
    images: ImageOptions,
) -> None:
    """Answer a folder or a JSONL of images into a JSONL; the same command goes on where it was stopped.

    A line of INPUT is {"image": FILE} with, if wanted, "prompt" and "id"; paths are relative to INPUT. There is one row
    of output for each of input, in the same order, with "answer", or with "error" if the image cannot be read.
    """
    messages = Messages(options.quiet)
    options, generation = with_config(options, generation, messages)
    generation.config()
    require_apart(output, source)
    rows = read_rows(source, prompt, recursive=recursive)
    choice = choose_model(options, messages)
    generation = generation.fitted(choice.config.text)
    origin = {
        "model": choice.fingerprint,
        "backend": options.backend,
        "dtype": options.dtype,
        **generation.keywords(),
        **asdict(images),
    }
    with RowLog(output, origin, overwrite=overwrite) as log:
        failed = log.resume(row.named() for row in rows)
        if failed:
            messages.tell(f"{output} has {len(failed):,} of {len(rows):,} rows already")
        if len(failed) < len(rows):
            captioner = Captioner(load_choice(choice, images, messages), generation, images)
            captioner.require_room(rows)
            answers = captioner.answers(rows, batch_size, len(failed))
            with told_if_interrupted(log, len(rows), messages):
                failed += keep_batches(answers, log.append, len(failed), len(rows), messages)
    messages.tell(f"{output}: {len(rows):,} rows, {sum(failed):,} with an error")
    if strict and any(failed):
        raise Exit(1)
