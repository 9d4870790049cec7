"""Signals that wait for the end of a block."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from visualglm.signals import ENDING, held_signals, keep_signals_away


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Those of a program, whatever the tests run in."""
    before = {number: signal.getsignal(number) for number in ENDING}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _terminate)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _terminate(number: int, frame: object) -> None:
    raise SystemExit(143)


def blocked() -> set[int]:
    return {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())} & set(ENDING)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
@pytest.mark.parametrize("helper", [False, True], ids=["alone", "beside a thread"])
def test_what_comes_in_the_block_comes_at_its_end(number: int, error: type[BaseException], helper: bool):
    """Also where a thread is there that would take it at once."""
    told = threading.Event()
    thread = threading.Thread(target=told.wait)
    if helper:
        thread.start()
    done = []
    with pytest.raises(error), held_signals():
        with held_signals():
            os.kill(os.getpid(), number)
            done.append("inner")
        done.append("outer")
    told.set()
    assert done == ["inner", "outer"] and not blocked()
    assert signal.getsignal(signal.SIGTERM) is _terminate
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_handlers_of_others_do_not_stay():
    with held_signals():
        signal.signal(signal.SIGINT, _terminate)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and not blocked()


def test_what_is_ignored_stays_so():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with held_signals():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_threads_leave_signals_to_the_first_one():
    found = []

    def look() -> None:
        with held_signals():
            found.append(blocked())
        keep_signals_away()
        found.append(blocked())

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    with held_signals():
        thread = threading.Thread(target=lambda: found.append(blocked()))
        thread.start()
    thread.join()
    assert found == [set(), set(ENDING), set(ENDING)] and not blocked()
