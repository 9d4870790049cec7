"""A terminal to run the program in: what is typed goes through the system's own line discipline."""

import fcntl
import os
import pty
import select
import termios
import time
from codecs import getincrementaldecoder
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.cli.program import spawn

CTRL_C, CTRL_D = "\x03", "\x04"
_PATIENCE = 60.0


def on_terminal(answer: str) -> str:
    """An answer as a terminal is shown it, so that it cannot give orders to it."""
    return "".join("\ufffd" if character < " " or character == "\x7f" else character for character in answer)


class Terminal:
    """`visualglm` with the given arguments in a terminal of its own; stdout goes to `stdout` where that is given."""

    def __init__(self, *arguments: object, stdout: Path | None = None) -> None:
        self._master, slave = pty.openpty()
        out = slave if stdout is None else os.open(stdout, os.O_WRONLY | os.O_CREAT)
        self.process = spawn(
            *arguments,
            stdin=slave,
            stdout=out,
            stderr=slave,
            env={"TERM": "dumb", "LC_ALL": "C.UTF-8"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        for descriptor in {slave, out}:
            os.close(descriptor)
        # What is read may end within a character.
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._shown = self.before = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._master, text.encode())

    def shows(self, text: str, timeout: float) -> bool:
        """Whether `text` is shown in that many seconds; if so, what was shown up to it is done with."""
        deadline = time.monotonic() + timeout
        while text not in self._shown:
            if not self._read(deadline):
                return False
        self.before, _, self._shown = self._shown.partition(text)
        return True

    def expect(self, text: str) -> str:
        """Wait until `text` is shown; returns what was shown before it since the last time."""
        assert self.shows(text, _PATIENCE), f"{text!r} was not shown, but {self._shown!r}"
        return self.before

    def ends(self, timeout: float) -> bool:
        """Whether the program ends in that many seconds."""
        deadline = time.monotonic() + timeout
        while self._read(deadline):
            pass
        return self.process.poll() is not None

    def end(self) -> tuple[int, str]:
        """Wait for the program to end; returns its exit code and what else it showed."""
        deadline = time.monotonic() + _PATIENCE
        while self._read(deadline):
            pass
        return self.process.wait(timeout=_PATIENCE), self._shown

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
        try:
            data = os.read(self._master, 1 << 16) if ready else b""
        except OSError:
            # The other end is closed.
            return False
        self._shown = (self._shown + self._decoder.decode(data)).replace("\r\n", "\n")
        return bool(data)
