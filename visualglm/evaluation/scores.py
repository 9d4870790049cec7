"""From results to figures: of each row, of a whole data set, and of two evaluations side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import exp, inf
from typing import Literal

from visualglm.evaluation.metrics import CiderD, bleu_4, exact_match, has_bleu, rouge_l, vqa_accuracy
from visualglm.evaluation.results import Result
from visualglm.processing.prompt import is_chinese

Verdict = Literal["improved", "worse", "same"]
VERDICTS: tuple[Verdict, ...] = ("worse", "improved", "same")

# Of scores from 0 to 1 and of nats: sums in another order are no change.
_TOLERANCE = 1e-4
_LARGEST_EXPONENT = 700


@dataclass(frozen=True)
class Metric:
    """How a figure is called, by what it is multiplied to be shown, and which way is better."""

    name: str
    scale: float = 1.0
    lower_is_better: bool = False


EXACT_MATCH = Metric("exact match (%)", 100)
VQA_ACCURACY = Metric("VQA accuracy (%)", 100)
ROUGE_L = Metric("ROUGE-L (%)", 100)
CIDER_D = Metric("CIDEr-D (0-10)")
BLEU_4 = Metric("BLEU-4 (0-100)")
LOSS = Metric("loss (nats a token)", lower_is_better=True)
PERPLEXITY = Metric("perplexity", lower_is_better=True)
METRICS = (EXACT_MATCH, VQA_ACCURACY, ROUGE_L, CIDER_D, BLEU_4, LOSS, PERPLEXITY)

Scores = Mapping[Metric, float]
"""What could be computed: no loss that was not asked for, and BLEU only with the package for it."""


class Scored:
    """The results of one evaluation with their scores. Those with an error have none."""

    def __init__(self, results: Sequence[Result]) -> None:
        self.results = results

    @cached_property
    def rows(self) -> list[Scores]:
        """Scores of each result by itself."""
        cider = CiderD(result.references for result in self.results)
        return [_row_scores(result, cider) for result in self.results]

    def overall(self, chosen: Iterable[int]) -> Scores:
        """Scores of a part of the results as if it were all, but for the idf of CIDEr-D, which is of all."""
        answered = [index for index in chosen if self.results[index].answer is not None]
        if not answered:
            return {}
        scores = {metric: _mean(self.rows[index][metric] for index in answered) for metric in _MEANS}
        if has_bleu():
            pairs = ((self.results[index].answer or "", self.results[index].references) for index in answered)
            scores[BLEU_4] = bleu_4(pairs)
        return scores | self._losses(answered)

    def tokens(self, chosen: Iterable[int]) -> int:
        """Labels that the loss of a part of the results is the mean over."""
        return sum(self.results[index].loss_tokens for index in chosen)

    def _losses(self, chosen: Sequence[int]) -> dict[Metric, float]:
        """Weighted by tokens: the mean over all labels, wherever rows begin and end."""
        losses = [(result.loss, result.loss_tokens) for result in map(self.results.__getitem__, chosen)]
        known = [(loss, tokens) for loss, tokens in losses if loss is not None]
        if len(known) < len(losses):
            return {}
        loss = sum(loss * tokens for loss, tokens in known) / sum(tokens for _, tokens in known)
        return {LOSS: loss, PERPLEXITY: inf if loss > _LARGEST_EXPONENT else exp(loss)}


_MEANS = (EXACT_MATCH, VQA_ACCURACY, ROUGE_L, CIDER_D)


def _row_scores(result: Result, cider: CiderD) -> Scores:
    if result.answer is None:
        return {}
    judges: dict[Metric, Callable[[str, Sequence[str]], float]] = {
        EXACT_MATCH: exact_match,
        VQA_ACCURACY: vqa_accuracy,
        ROUGE_L: rouge_l,
        CIDER_D: cider.score,
    }
    scores = {metric: judge(result.answer, result.references) for metric, judge in judges.items()}
    return scores if result.loss is None else scores | {LOSS: result.loss}


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def by_language(results: Sequence[Result]) -> dict[str, list[int]]:
    """The numbers of all results, and, where there are both, of those with and without Chinese references."""
    groups: dict[str, list[int]] = {"all": [], "Chinese": [], "other": []}
    for index, result in enumerate(results):
        groups["all"].append(index)
        groups["Chinese" if any(map(is_chinese, result.references)) else "other"].append(index)
    return groups if groups["Chinese"] and groups["other"] else {"all": groups["all"]}


def verdict(metric: Metric, before: Scores, after: Scores) -> Verdict | None:
    """What became of one row by one metric; None where one of the two does not have it."""
    if metric not in before or metric not in after:
        return None
    gain = after[metric] - before[metric]
    if metric.lower_is_better:
        gain = -gain
    return "same" if abs(gain) < _TOLERANCE else "improved" if gain > 0 else "worse"


def row_verdict(before: Scores, after: Scores) -> Verdict:
    """What became of one row: by the first metric of its answer that has changed. An answer is better than none."""
    if bool(before) != bool(after):
        return "improved" if after else "worse"
    changes = (verdict(metric, before, after) for metric in _MEANS)
    return next((change for change in changes if change in ("improved", "worse")), "same")
