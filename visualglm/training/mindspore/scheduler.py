"""Holds the process by which those of a run meet: `python -m visualglm.training.mindspore.scheduler`.

MindSpore waits in it without letting go of the interpreter, so that another has to see whether the run still lives.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

_POLL_SECONDS = 0.5


def main() -> None:
    """Returns when all processes of the run have left, or the one that started this has ended."""
    run = os.getppid()
    meeting = subprocess.Popen([sys.executable, "-c", "from mindspore import communication; communication.init()"])
    try:
        while meeting.poll() is None and os.getppid() == run:
            time.sleep(_POLL_SECONDS)
    finally:
        meeting.kill()


if __name__ == "__main__":
    main()
