"""How near an export comes to the model in float32: logits of right answers, and answers about held-out scenes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visualglm.backends.base import Backend
from visualglm.checkpoint.lite_dir import LiteForm
from visualglm.checkpoint.model_dir import ModelDirectory
from visualglm.export.examples import DrawnScenes, Examples, ExampleSource, answer_columns
from visualglm.export.graphs import open_graphs, write_graphs
from visualglm.export.layerwise import LayerwiseModel
from visualglm.model import VisualGLM
from visualglm.scenes.held_out import Answered, answer_scenes

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class LogitFigures:
    """Of the tokens of right answers. perplexity: what this model and that in float32 make of them.

    logit_error: root mean square of what the logits are off, as a share of that of the exact ones. divergence: of the
    exact probabilities from those of this model (Kullback and Leibler's), in nats a token.
    """

    answer_tokens: int
    perplexity: float
    float32_perplexity: float
    logit_error: float
    divergence: float


@dataclass(frozen=True)
class AnswerFigures:
    """Of greedy answers to questions about held-out scenes: shares of those that are right, and the same in float32."""

    questions: int
    exact_match: float
    float32_exact_match: float
    same_as_float32: float


@dataclass(frozen=True)
class Judgement:
    """What was found of an export. `count`: of rows or scenes; answers are known to be right of scenes alone."""

    examples: str
    count: int
    logits: LogitFigures
    answers: AnswerFigures | None


def judge(
    folder: Path, directory: ModelDirectory, form: LiteForm, source: ExampleSource, count: int, scratch: Path
) -> Judgement:
    """Judge the graphs in `folder` by `count` examples, or as many as there are, that no calibration saw.

    The model in float32 that they are compared with is run a layer at a time, in `scratch`.
    """
    examples = list(source.to_judge(count))
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    exact = LayerwiseModel(directory, examples, scratch, beside=size)
    backend = open_graphs(folder, directory, form)
    logits = compare_logits(answer_logits(backend, examples), exact.answer_logits(), answer_tokens(examples))
    if not isinstance(source, DrawnScenes):
        return Judgement(source.name, exact.rows, logits, None)
    float32 = LiteForm(precision="fp32", kv_cache="float32", use_past=True)
    write_graphs(scratch, directory, float32)
    models = [VisualGLM(each, source.tokenizer) for each in (backend, open_graphs(scratch, directory, float32))]
    answers = compare_answers(*(answer_scenes(model, range(count)) for model in models))
    return Judgement(source.name, count, logits, answers)


def answer_logits(backend: Backend, examples: Iterable[Examples]) -> Iterator[Floats]:
    """Logits [tokens, vocab] of the answers of each group of rows."""
    for batch in examples:
        images = backend.encode_images(batch.pixels) if len(batch.pixels) else []
        for group in batch.groups:
            logits = backend.logits(group.layout, [images[index] for index in group.scene_index if index >= 0])
            yield logits[answer_columns(group.layout)]


def answer_tokens(examples: Iterable[Examples]) -> Iterator[NDArray[np.int64]]:
    """The tokens that those logits should tell, [tokens], eos among them."""
    for group in (group for batch in examples for group in batch.groups):
        yield np.roll(group.layout.input_ids, -1, axis=1)[answer_columns(group.layout)]


def compare_logits(
    found: Iterable[Floats], exact: Iterable[Floats], tokens: Iterable[NDArray[np.int64]]
) -> LogitFigures:
    """Logits of an export and of the model in float32, [tokens, vocab] in pieces, and the right tokens."""
    count, sums = 0, np.zeros(5)
    for one, other, right in zip(found, exact, tokens, strict=True):
        wide, expected = one.astype(np.float64), other.astype(np.float64)
        squares = np.square(wide - expected).sum(), np.square(expected).sum()
        for logits in (wide, expected):
            logits -= logits.max(axis=-1, keepdims=True)
            logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        rows = np.arange(len(right))
        divergence = (np.exp(expected) * (expected - wide)).sum()
        sums += (-wide[rows, right].sum(), -expected[rows, right].sum(), *squares, divergence)
        count += len(right)
    loss, exact_loss, error, energy, divergence = sums
    return LogitFigures(
        answer_tokens=count,
        perplexity=float(np.exp(loss / count)),
        float32_perplexity=float(np.exp(exact_loss / count)),
        logit_error=float(np.sqrt(error / energy)),
        divergence=float(divergence / count),
    )


def compare_answers(found: Sequence[Answered], exact: Sequence[Answered]) -> AnswerFigures:
    """Answers of an export and of the model in float32 to the same questions."""
    return AnswerFigures(
        questions=len(found),
        exact_match=_share(answer == question.answer for question, answer in found),
        float32_exact_match=_share(answer == question.answer for question, answer in exact),
        same_as_float32=_share(one == other for (_, one), (_, other) in zip(found, exact, strict=True)),
    )


def _share(hits: Iterable[bool]) -> float:
    return float(np.mean(list(hits)))
