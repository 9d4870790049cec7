"""Asks a model the questions of a data set, and scores each answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visualglm.backends.base import ImageEmbeds
from visualglm.errors import DataError, ImageError, PromptError
from visualglm.evaluation.loss import AnswerLoss, answer_losses
from visualglm.evaluation.metrics import exact_match, rouge_l, vqa_accuracy
from visualglm.evaluation.questions import Question
from visualglm.generation.config import GenerationConfig
from visualglm.model import Reply, VisualGLM
from visualglm.processing.ahead import prepared_batches
from visualglm.processing.image import load_image, preprocess
from visualglm.processing.prompt import Language
from visualglm.training.examples import Example, build_example


@dataclass(frozen=True)
class _Ready:
    """A question with its pixels float32 [3, S, S], if it has an image, and the example whose loss is wanted."""

    pixels: NDArray[np.float32] | None
    example: Example


_Prepared = _Ready | ImageError | PromptError | DataError


class Evaluator:
    """A model that is put to the test.

    with_loss: also the loss of the first reference, which costs a pass over each row.
    generation: options of `GenerationConfig`; raises `ConfigError` for those that are out of range.
    """

    def __init__(
        self, model: VisualGLM, *, with_loss: bool = True, language: Language = "auto", **generation: Any
    ) -> None:
        self._model = model
        self._with_loss = with_loss
        self._language = language
        self._generation = generation
        self._config = GenerationConfig.from_options(**generation)

    @contextmanager
    def results(
        self, questions: Iterable[Question], batch_size: int, start: int = 0
    ) -> Iterator[Iterator[list[dict[str, Any]]]]:
        """A result for each question from the one at `start` on, as JSON has it, a batch at a time.

        A question that cannot be answered has an "error" instead of an "answer". See `prepared_batches` for batches.
        """
        with prepared_batches(questions, self._prepare, batch_size, start) as batches:
            yield map(self._evaluate, batches)

    def _prepare(self, question: Question) -> _Prepared:
        model, row = self._model, question.row
        try:
            model.prompt(
                question.prompt, has_image=row.source is not None, language=self._language, config=self._config
            )
            window = model.config.text.max_sequence_length
            example = build_example(row, question.turn, model.tokenizer, model.config, window)
            if row.source is None:
                return _Ready(None, example)
            image = load_image(row.source, model.image_limits)
            return _Ready(preprocess(image, model.config.vision.image_size), example)
        except (ImageError, PromptError, DataError) as error:
            return error

    def _evaluate(self, batch: Sequence[tuple[Question, _Prepared]]) -> list[dict[str, Any]]:
        ready = [(question, prepared) for question, prepared in batch if isinstance(prepared, _Ready)]
        embeds = self._encode(ready)
        replies = self._model.reply_batch(
            [(image, question.prompt) for image, (question, _) in zip(embeds, ready, strict=True)],
            histories=[question.history for question, _ in ready],
            batch_size=len(batch),
            language=self._language,
            **self._generation,
        )
        losses: list[AnswerLoss | None] = [None] * len(ready)
        if self._with_loss:
            losses = [*answer_losses(self._model.backend, [prepared.example for _, prepared in ready], embeds)]
        results = iter(zip(replies, losses, strict=True))
        return [
            question.named()
            | (_scored(question, *next(results)) if isinstance(prepared, _Ready) else {"error": str(prepared)})
            for question, prepared in batch
        ]

    def _encode(self, ready: Sequence[tuple[Question, _Ready]]) -> list[ImageEmbeds | None]:
        """The image of each question, encoded once for all questions about it."""
        pixels = {question.row.source: row.pixels for question, row in ready if row.pixels is not None}
        encoded = self._model.backend.encode_images(np.stack([*pixels.values()])) if pixels else []
        by_source = dict(zip(pixels, encoded, strict=True))
        return [by_source.get(question.row.source) for question, _ in ready]


def _scored(question: Question, reply: Reply, loss: AnswerLoss | None) -> dict[str, Any]:
    """What is known of one answer by itself; CIDEr-D and BLEU are of the whole data set."""
    judged = (reply.text, question.references)
    return {
        "answer": reply.text,
        "prompt_tokens": reply.prompt_tokens,
        "new_tokens": reply.new_tokens,
        **({"dropped_turns": reply.dropped_turns} if reply.dropped_turns else {}),
        **({} if loss is None else {"loss": loss[0] / loss[1], "loss_tokens": loss[1]}),
        "exact_match": exact_match(*judged),
        "vqa_accuracy": vqa_accuracy(*judged),
        "rouge_l": rouge_l(*judged),
    }
