"""`visualglm ask`: one question."""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated

from PIL.Image import Image
from typer import Argument, Option

from visualglm.cli.answers import shown
from visualglm.cli.loading import load_model
from visualglm.cli.messages import Messages
from visualglm.cli.mindformers import with_config
from visualglm.cli.options import GenerationOptions, ImageOptions, ModelOptions
from visualglm.model import VisualGLM
from visualglm.processing.image import load_image


def ask(
    question: Annotated[str, Argument(metavar="QUESTION", help="What you want to know, in Chinese or English.")],
    image: Annotated[str | None, Option("--image", "-i", metavar="FILE", help="Image file or data: URL.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print answer and counts as one JSON object.")] = False,
    *,
    options: ModelOptions,
    generation: GenerationOptions,
    images: ImageOptions,
) -> None:
    """Ask one question, about an image or without one.

    The answer goes to stdout, all else to stderr. Write -- before a question that begins with -.
    """
    messages = Messages(options.quiet)
    options, generation = with_config(options, generation, messages)
    generation.config()
    # What is wrong with an image is told before a large model is loaded for it.
    picture = None if image is None else load_image(image, images.limits(), allow_urls=images.allow_urls)
    model = load_model(options, images, messages)
    generation = generation.fitted(model.config.text)
    if sys.stdout.isatty() and not as_json:
        _stream(model, picture, question, generation, messages)
    else:
        _print_reply(model, picture, question, generation, as_json, messages)


def _stream(
    model: VisualGLM, picture: Image | None, question: str, generation: GenerationOptions, messages: Messages
) -> None:
    start = time.perf_counter()
    answer = model.stream(picture, question, **generation.keywords())
    try:
        for _ in shown(answer):
            pass
    finally:
        print()
    messages.tell(_speed(answer.new_tokens, time.perf_counter() - start))


def _print_reply(
    model: VisualGLM,
    picture: Image | None,
    question: str,
    generation: GenerationOptions,
    as_json: bool,
    messages: Messages,
) -> None:
    start = time.perf_counter()
    [reply] = model.reply_batch([(picture, question)], **generation.keywords())
    seconds = time.perf_counter() - start
    if as_json:
        values = {
            "answer": reply.text,
            "prompt_tokens": reply.prompt_tokens,
            "new_tokens": reply.new_tokens,
            "seconds": round(seconds, 3),
            "model": model.name,
            "backend": model.backend.description,
        }
        print(json.dumps(values, ensure_ascii=False))
    else:
        print(reply.text)
    messages.tell(_speed(reply.new_tokens, seconds))


def _speed(tokens: int, seconds: float) -> str:
    return f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s"
