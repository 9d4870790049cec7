"""The process by which those of a run meet: `python -m visualglm.training.mindspore.scheduler`.

MindSpore waits in it without letting go of the interpreter, so that another has to see whether it, and the run, still
live; and the processes that meet wait likewise, so that they cannot see it themselves.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping

from visualglm.signals import keep_signals_away
from visualglm.training.launch import leave_fault

_POLL_SECONDS = 0.5
_STDIN = 0
_MEET = "meet"
_COMMAND = (sys.executable, "-P", "-m", "visualglm.training.mindspore.scheduler")
_FAULT = (
    "The process by which those of the run meet was stopped ({name}), so the run was too; "
    "--resume goes on from the last checkpoint, if there is one."
)


class Scheduler:
    """The watched process, as the first process of the run has it. If it ends before `leave`, the run ends too."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._has_left = False
        # Nothing is ever written: the other side sees when this one is closed. Ctrl-C is for the run to tell of.
        self._process = subprocess.Popen(
            _COMMAND, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
        )
        threading.Thread(target=self._watch, daemon=True, name="scheduler-watch").start()

    def leave(self) -> None:
        """From now on it may end."""
        self._has_left = True
        if self._process.stdin:
            self._process.stdin.close()

    def _watch(self) -> None:
        keep_signals_away()
        self._process.wait()
        if not self._has_left:
            leave_fault(_FAULT.format(name=_name(self._process.returncode)))
            os._exit(1)


def main() -> None:
    """Returns when all processes of the run have left, or the one that started this has ended.

    That one is killed, with a sentence about why, if they can no longer meet.
    """
    run = os.getppid()
    meeting = subprocess.Popen([*_COMMAND, _MEET], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        while meeting.poll() is None and os.getppid() == run:
            time.sleep(_POLL_SECONDS)
    finally:
        meeting.kill()
    if os.getppid() == run and not _is_closed(_STDIN):
        leave_fault(_FAULT.format(name=_name(meeting.returncode)))
        os.kill(run, signal.SIGKILL)


def meet() -> None:
    """Let the processes of the run meet, until all have left; ends with the process that started this."""
    _end_when_closed(_STDIN)
    from mindspore import communication

    communication.init()


def _end_when_closed(pipe: int) -> None:
    """Let the system end this process when the other side of `pipe` does: no thread would come to do so."""
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    if _is_closed(pipe):
        sys.exit(1)


def _is_closed(pipe: int) -> bool:
    """Whether nothing can come from it any more; for one into which nothing is written."""
    return bool(select.select([pipe], [], [], 0)[0])


def _name(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


if __name__ == "__main__":
    meet() if _MEET in sys.argv else main()
