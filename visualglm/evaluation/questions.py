"""The questions of a data set: each turn of each row, with the turns before it and the answers it may have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visualglm.processing.prompt import Turn
from visualglm.training.rows import Report, TrainingRow, check_rows, open_rows


@dataclass(frozen=True)
class Question:
    """Turn number `turn`, from 0, of a row; `number` is that of the row in its file, from 1."""

    number: int
    turn: int
    row: TrainingRow

    @property
    def prompt(self) -> str:
        return self.row.turns[self.turn][0]

    @property
    def history(self) -> tuple[Turn, ...]:
        """The turns before, with their true answers."""
        return self.row.turns[: self.turn]

    @property
    def references(self) -> tuple[str, ...]:
        """The answers of equal right, the first the one that training would learn."""
        return (self.row.turns[self.turn][1], *self.row.alternatives)

    def named(self) -> dict[str, Any]:
        """The part of a result that comes from the data, as JSON has it."""
        named: dict[str, Any] = {"row": self.number}
        if len(self.row.turns) > 1:
            named |= {"turn": self.turn + 1, "history": [list(turn) for turn in self.history]}
        return {**named, "image": self.row.image, "prompt": self.prompt, "references": list(self.references)}


def read_questions(path: Path, report: Report | None = None) -> list[Question]:
    """All questions of a JSONL file or a JSON list of rows, every row and every image checked.

    Raises one `DataError` that lists the bad rows by line.
    """
    questions: list[Question] = []

    def take(index: int, row: TrainingRow) -> None:
        questions.extend(Question(index + 1, turn, row) for turn in range(len(row.turns)))

    check_rows(open_rows(path), take, report=report)
    return questions
