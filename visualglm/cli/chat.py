"""`visualglm chat`: a conversation about an image."""

from __future__ import annotations

import os
import re
import sys
from typing import Annotated

from PIL.Image import Image
from typer import Exit, Option

from visualglm.backends.base import ImageEmbeds
from visualglm.cli.answers import shown
from visualglm.cli.loading import load_model
from visualglm.cli.messages import Messages
from visualglm.cli.mindformers import with_config
from visualglm.cli.options import GenerationOptions, ImageOptions, ModelOptions
from visualglm.cli.output import print_error, print_note
from visualglm.cli.questions import read_questions
from visualglm.errors import PromptError, VisualGLMError
from visualglm.model import VisualGLM
from visualglm.processing.image import load_image
from visualglm.processing.prompt import Turn

HELP = """\
:image FILE   talk about another image (without FILE: about none)
:clear        forget what was said, keep the image      (or: clear)
:adapter NAME answer with another --adapter (without NAME: with none)
:help         show this
:quit         leave                                     (or: stop, quit, exit, Ctrl-D)
Ctrl-C stops an answer; at the prompt, twice leaves."""

# Words of the original program, alone on a line.
_PLAIN_WORDS = {"clear": ":clear", "stop": ":quit", "quit": ":quit", "exit": ":quit"}
_COMMANDS = (":image", ":clear", ":adapter", ":help", ":quit")
_COMMAND = re.compile(r":[A-Za-z]\w*")
Command = tuple[str, str]


def chat(
    image: Annotated[str | None, Option("--image", "-i", metavar="FILE", help="Image file or data: URL.")] = None,
    *,
    options: ModelOptions,
    generation: GenerationOptions,
    images: ImageOptions,
) -> None:
    """Talk about an image, question by question; type :help for what else can be typed.

    Where stdin is no terminal, each of its lines is a question, and the exit code is 1 if one could not be answered.
    """
    messages = Messages(options.quiet)
    options, generation = with_config(options, generation, messages)
    generation.config()
    questions = read_questions()
    picture = None if image is None else load_image(image, images.limits(), allow_urls=images.allow_urls)
    model = load_model(options, images, messages, switches=True)
    conversation = Conversation(model, generation.fitted(model.config.text), messages)
    conversation.show(picture)
    if len(model.adapters) > 1:
        messages.tell(f"Now with the adapter {model.adapter}, of {', '.join(model.adapters)}.")
    if sys.stdin.isatty():
        messages.tell("Type a question, or :help.")
    failed = False
    for line in questions:
        command = command_in(line)
        if command and command[0] == ":quit":
            break
        failed |= not _heed(conversation, line, command, messages)
    if failed and not sys.stdin.isatty():
        raise Exit(1)


def _heed(conversation: Conversation, line: str, command: Command | None, messages: Messages) -> bool:
    """Do what one line asks for; returns whether that went well. An error or Ctrl-C ends only that."""
    try:
        if command:
            conversation.obey(*command)
        else:
            conversation.answer(line)
    except VisualGLMError as error:
        print_error(error)
        return False
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        messages.tell("(stopped)")
    return True


def command_in(line: str) -> Command | None:
    """The command that a typed line is, and what follows it; None if the line is a question."""
    name, _, rest = line.partition(" ")
    name = _PLAIN_WORDS.get(line, name)
    return (name, rest.strip()) if _COMMAND.fullmatch(name) else None


class Conversation:
    """The image under discussion, encoded once, and what was said about it."""

    def __init__(self, model: VisualGLM, generation: GenerationOptions, messages: Messages) -> None:
        self.embeds: ImageEmbeds | None = None
        self._picture: Image | None = None
        self.history: list[Turn] = []
        self._model = model
        self._generation = generation
        self._messages = messages

    def show(self, picture: Image | None) -> None:
        """Talk about this image from now on, or about none."""
        self.embeds = None if picture is None else self._model.encode_image(picture)
        self._picture = picture

    def answer(self, question: str) -> None:
        """Answer on stdout; if that is interrupted, what was said stays said. Raises a `VisualGLMError`."""
        self._drop_what_does_not_fit(question)
        stream = self._model.stream(self.embeds, question, history=self.history, **self._generation.keywords())
        pieces: list[str] = []
        try:
            for piece in shown(stream):
                pieces.append(piece)
        finally:
            print(flush=True)
            if pieces:
                self.history.append((question, "".join(pieces)))

    def obey(self, command: str, rest: str) -> None:
        """Do what a command says; raises a `VisualGLMError`, such as `PromptError` if there is no such command."""
        if command not in _COMMANDS:
            raise PromptError(f"There is no command {command}; the commands are {', '.join(_COMMANDS)}.")
        if command == ":image":
            self.show(self._load(_typed_path(rest)) if rest else None)
            self.history.clear()
            self._messages.tell(f"Now about {rest or 'no image'}; what was said before is forgotten.")
        elif command == ":clear":
            self.history.clear()
            self._messages.tell("What was said is forgotten.")
        elif command == ":adapter":
            self._model.use_adapter(rest or None)
            # It may have changed what the model sees in an image.
            self.show(self._picture)
            self._messages.tell(f"Now with {f'the adapter {rest}' if rest else 'no adapter'}.")
        else:
            print_note(HELP)

    def _load(self, path: str) -> Image:
        return load_image(path, self._model.image_limits, allow_urls=self._model.allow_urls)

    def _drop_what_does_not_fit(self, question: str) -> None:
        prompt = self._model.prompt(
            question,
            history=self.history,
            has_image=self.embeds is not None,
            language=self._generation.language,
            config=self._generation.config(),
        )
        if prompt.dropped_turns:
            del self.history[: prompt.dropped_turns]
            self._messages.tell(f"(the model's window is full; oldest turns forgotten: {prompt.dropped_turns})")


def _typed_path(text: str) -> str:
    """A path as typed or dropped into a terminal: maybe in quotes, maybe beginning with ~."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1]
    return os.path.expanduser(text)
