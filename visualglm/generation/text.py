"""From token ids to the text a user sees: decoded, stopped and cleaned, a piece at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from visualglm.generation.decoding import Decoding
from visualglm.processing.answer import AnswerCleaner
from visualglm.processing.tokenizer import StreamDecoder, Tokenizer


class StopFinder:
    """Lets text through up to the stop string that is complete first; holds back what may be the start of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        if self.found or not self._stop:
            return "" if self.found else text
        self._held += text
        # The first to be complete, not the first to begin: so the text does not depend on the pieces it came in.
        found = [(start + len(stop), start) for stop in self._stop if (start := self._held.find(stop)) >= 0]
        if found:
            self.found = True
            return self._held[: min(found)[1]]
        keep = max(_overlap(self._held, stop) for stop in self._stop)
        safe, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return safe

    def flush(self) -> str:
        return "" if self.found else self._held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper start of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)


class AnswerStream:
    """One answer in the making: ids in, text out. The pieces joined are the whole answer."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._finder = StopFinder(stop)
        self._cleaner = AnswerCleaner()
        self.new_tokens = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string has been met."""
        return self._finder.found

    def push(self, token_id: int) -> str:
        self.new_tokens += 1
        return self._cleaner.push(self._finder.push(self._decoder.push(token_id)))

    def flush(self) -> str:
        """What was held back, once no more ids come."""
        rest = self._finder.push(self._decoder.flush()) + self._finder.flush()
        return self._cleaner.push(rest) + self._cleaner.flush()


def answer_pieces(decoding: Decoding, streams: Sequence[AnswerStream]) -> Iterator[tuple[int, str]]:
    """Run a batch to its end: (row, piece of its answer), some of them empty. A row ends early at a stop string."""
    for pairs in decoding:
        for row, token in pairs:
            yield row, streams[row].push(token)
            if streams[row].stopped:
                decoding.stop(row)
    yield from ((row, stream.flush()) for row, stream in enumerate(streams))
