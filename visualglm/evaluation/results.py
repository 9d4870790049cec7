"""Results of an evaluation, as a JSONL file keeps them: a question, what the model answered, and the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visualglm.errors import DataError
from visualglm.evaluation.questions import Question
from visualglm.json_lines import json_lines

# What must be the same in two results for them to be of the same question.
_QUESTION = ("image", "prompt", "history", "references")


@dataclass(frozen=True)
class Result:
    """One answer, or the reason why there is none; `loss` is the mean over `loss_tokens` labels, if it is known."""

    references: tuple[str, ...]
    answer: str | None
    error: str | None
    loss: float | None
    loss_tokens: int

    @classmethod
    def from_values(cls, where: str, values: Mapping[str, Any]) -> Result:
        """The result in a line of JSON; raises `DataError` if there is none in it."""
        result = cls(
            tuple(values.get("references") or ()) if isinstance(values.get("references"), list) else (),
            values.get("answer"),
            values.get("error"),
            values.get("loss"),
            values.get("loss_tokens", 0),
        )
        if not result._is_whole():
            raise DataError(f"{where} is no result of an evaluation; give a file that evaluate has written.")
        return result

    def _is_whole(self) -> bool:
        texts = [*self.references, self.error if self.answer is None else self.answer]
        has_loss = isinstance(self.loss, float) and isinstance(self.loss_tokens, int) and self.loss_tokens > 0
        return len(texts) > 1 and all(isinstance(text, str) for text in texts) and (self.loss is None or has_loss)


def read_results(path: Path, questions: Sequence[Question]) -> list[Result]:
    """The results in a file that an evaluation has written, one for each of `questions`.

    Raises `DataError` if they are of other questions, of fewer or of more, or if the file is none of results.
    """
    results = []
    for where, values in json_lines(path):
        results.append(Result.from_values(where, values))
        asked = questions[len(results) - 1].named() if len(results) <= len(questions) else {}
        if any(values.get(name) != asked.get(name) for name in _QUESTION):
            raise DataError(f"{where} is of another data set: only results of the same questions can be compared.")
    if len(results) < len(questions):
        raise DataError(
            f"{path} has {len(results):,} results of {len(questions):,} questions; finish that evaluation first."
        )
    return results
