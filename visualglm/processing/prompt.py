"""Prompts: the templates of the original, a conversation that fits the model's length, and where the image goes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from visualglm.config import VisualGLMConfig
from visualglm.errors import PromptError
from visualglm.faults import brief
from visualglm.processing.tokenizer import Tokenizer

Language = Literal["auto", "zh", "en"]
Turn = tuple[str, str]

IMAGE_OPEN, IMAGE_CLOSE = "<img>", "</img>"
_CJK = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")


@dataclass(frozen=True)
class Template:
    """How the model was shown questions and answers in one language."""

    question_prefix: str
    answer_prefix: str

    def question(self, question: str) -> str:
        return f"{self.question_prefix}{question}\n{self.answer_prefix}"

    def turn(self, question: str, answer: str) -> str:
        return f"{self.question(question)}{answer}\n"


TEMPLATES = {"zh": Template("问：", "答："), "en": Template("Q:", "A:")}


@dataclass(frozen=True)
class Prompt:
    """Ids up to and with `<sop>`; `image_start` is the index of the first image slot, None without an image."""

    input_ids: tuple[int, ...]
    image_start: int | None
    dropped_turns: int


def is_chinese(text: str) -> bool:
    """Whether `text` holds a Chinese character."""
    return bool(_CJK.search(text))


def template_for(question: str, language: Language = "auto") -> Template:
    """The template of `language`; "auto" takes the Chinese one if the question holds a Chinese character."""
    if language == "auto":
        return TEMPLATES["zh" if is_chinese(question) else "en"]
    if not isinstance(language, str) or language not in TEMPLATES:
        raise PromptError(f"The language {brief(language)} is unknown; give auto, {' or '.join(TEMPLATES)}.")
    return TEMPLATES[language]


def build_prompt(
    tokenizer: Tokenizer,
    config: VisualGLMConfig,
    question: str,
    *,
    history: Sequence[Turn] = (),
    has_image: bool,
    language: Language = "auto",
    max_new_tokens: int,
) -> Prompt:
    """A prompt that leaves room for `max_new_tokens`: the oldest turns are dropped, never the image or the question.

    The image has its slots, filled with the pad token, at the very beginning. Raises `PromptError` if the question is
    empty, if `history` is no sequence of (question, answer) pairs, or if the question does not fit by itself.
    """
    _check(question, history, max_new_tokens)
    template = template_for(question, language)
    special, image_length = config.text, config.qformer.num_query_tokens
    head = [*tokenizer.encode(IMAGE_OPEN), *[special.pad_token_id] * image_length] if has_image else []
    close = IMAGE_CLOSE if has_image else ""

    def ids_of(text: str) -> list[int]:
        return [*head, *tokenizer.encode(close + text), special.gmask_token_id, special.bos_token_id]

    text = template.question(question)
    ids = ids_of(text)
    room = special.max_sequence_length - max_new_tokens
    if len(ids) > room:
        raise PromptError(
            f"The question takes {len(ids)} tokens{' with the image' if has_image else ''} and {max_new_tokens} are "
            f"kept for the answer, more than the window of {special.max_sequence_length}; shorten the question, ask "
            "for fewer new tokens, or give a model or an export with a longer one."
        )
    kept = 0
    for turn in reversed(history):
        text = template.turn(*turn) + text
        longer = ids_of(text)
        if len(longer) > room:
            break
        ids, kept = longer, kept + 1
    return Prompt(tuple(ids), len(head) - image_length if has_image else None, len(history) - kept)


def _check(question: str, history: Sequence[Turn], max_new_tokens: int) -> None:
    if question is not None and not isinstance(question, str):
        raise PromptError(f"The question must be text, not {type(question).__name__}; write what you want to know.")
    if not question or not question.strip():
        raise PromptError("The question is empty; write what you want to know.")
    if isinstance(history, str) or not isinstance(history, Sequence):
        raise PromptError("The history is not a list; give a list of (question, answer) pairs.")
    for number, turn in enumerate(history, 1):
        is_pair = isinstance(turn, tuple | list) and len(turn) == 2
        if not is_pair or not all(isinstance(part, str) for part in turn):
            raise PromptError(f"Entry {number} of the history is not a pair of texts; give (question, answer).")
    if max_new_tokens < 0:
        raise PromptError(f"max_new_tokens is {max_new_tokens}; give 0 or more.")
