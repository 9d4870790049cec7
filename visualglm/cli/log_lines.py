"""Progress for a file, or whatever else is no terminal: a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

_PARTS = 10
# What is done sooner needs no line.
_LEAST_SECONDS = 2.0
# Parts that take longer have lines within them, each after twice the time, so that there are few in a long run.
_FIRST_WAIT_SECONDS = 30.0


class LogLines:
    """A line for every tenth of the way: what is done, the note, and how long the rest takes.

    Where there was one at all, there is one at the end too.
    """

    def __init__(self, title: str, tell: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._title = title
        self._tell = tell
        self._clock = clock
        self._told = clock()
        self._part = 0
        self._has_told = False
        self._wait = _FIRST_WAIT_SECONDS
        self._start: tuple[float, int] | None = None

    def report(self, done: int, total: int, note: str) -> None:
        """To be called as often as one likes, with what is done and with what there is in all."""
        now = self._clock()
        if self._start is None:
            # A run that goes on begins in the middle; and what came before the first report is not like the rest.
            self._start = now, done
            self._part = max(0, done - 1) * _PARTS // max(1, total)
        part = done * _PARTS // max(1, total)
        since = now - self._told
        is_late = since > self._wait
        is_end = self._has_told and done >= total
        if is_late or (part > self._part and (since > _LEAST_SECONDS or is_end)):
            self._wait *= 2 if is_late else 1
            self._told, self._part, self._has_told = now, part, True
            self._tell(
                f"{self._title}: {done:,} of {total:,}{', ' if note else ''}{note}{self._left(now, done, total)}"
            )

    def _left(self, now: float, done: int, total: int) -> str:
        since, first = self._start or (now, done)
        if not first < done < total:
            return ""
        return f", {timedelta(seconds=round((now - since) / (done - first) * (total - done)))} left"
