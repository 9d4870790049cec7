"""Ctrl-C and SIGTERM, put off while code runs that could not bear what Python makes of them: an exception anywhere."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

ENDING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def held_signals() -> Iterator[None]:
    """What comes in the block is acted upon at its end, by whoever does so outside.

    For libraries that call Python back and lose an exception from there, or garble it, and that put up handlers of
    their own, as MindSpore does in every run of a graph. Threads that start in the block never take these signals.
    In other threads than the main one this does nothing: no handler runs there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    with ExitStack() as stack:
        stack.callback(_send_first, came)
        if hasattr(signal, "pthread_sigmask"):
            stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, signal.pthread_sigmask(signal.SIG_BLOCK, ()))
            keep_signals_away()
        for number in ENDING:
            handler = signal.getsignal(number)
            stack.callback(signal.signal, number, handler)
            if callable(handler):
                # A thread may take them that is older than the block.
                signal.signal(number, lambda number, frame: came.append(number))
        yield


def keep_signals_away() -> None:
    """Leave Ctrl-C and SIGTERM to other threads than this one, and those that it starts from now on."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)


def _send_first(numbers: list[int]) -> None:
    if numbers:
        signal.raise_signal(numbers[0])
