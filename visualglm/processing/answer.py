"""Clean-up of the model's answer, at once or while it is being written."""

from __future__ import annotations

import re

_PLACEHOLDER, _PLACEHOLDER_TEXT = "[[训练时间]]", "2023年"
_HAN = "[\u4e00-\u9fff]"
_MARKS = ",!:;?"
_FULL_WIDTH = str.maketrans(_MARKS, "，！：；？")
_MARK_BESIDE_HAN = re.compile(f"(?<={_HAN})[{_MARKS}]|[{_MARKS}](?={_HAN})")
_OPEN_MARK = re.compile(f"(?<!{_HAN})[{_MARKS}]$")


def clean_answer(text: str) -> str:
    """`text` stripped, with its year filled in, and , ! : ; ? beside a Chinese character in their full width."""
    cleaner = AnswerCleaner()
    return cleaner.push(text) + cleaner.flush()


class AnswerCleaner:
    """`clean_answer` for text that comes in pieces: gives out what later pieces can no longer change."""

    def __init__(self) -> None:
        self._held = ""
        self._last = ""

    def push(self, text: str) -> str:
        """The cleaned text that `text` decides."""
        text = self._held + text
        if not self._last:
            text = text.lstrip()
        decided = len(text) - self._undecided(text)
        self._held = text[decided:]
        return self._clean(text[:decided])

    def flush(self) -> str:
        """What was held back, at the end of the answer."""
        rest, self._held = self._held.rstrip(), ""
        return self._clean(rest)

    def _undecided(self, text: str) -> int:
        """Length of the end that depends on what follows: blanks, half a placeholder, or a mark after no Chinese."""
        blanks = len(text) - len(text.rstrip())
        if blanks or not text:
            return blanks
        for length in range(min(len(text), len(_PLACEHOLDER) - 1), 0, -1):
            if text.endswith(_PLACEHOLDER[:length]):
                return length
        return 1 if _OPEN_MARK.search(self._last + text) else 0

    def _clean(self, text: str) -> str:
        """`text` with marks judged beside the character given out last."""
        text = self._last + text.replace(_PLACEHOLDER, _PLACEHOLDER_TEXT)
        cleaned = _MARK_BESIDE_HAN.sub(lambda mark: mark[0].translate(_FULL_WIDTH), text)[len(self._last) :]
        self._last = text[-1:]
        return cleaned
