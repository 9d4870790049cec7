"""An engine in a process of its own, so that its memory and its libraries are its own: see `engine_worker.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

_LAST_WORDS = 2000


@dataclass(frozen=True)
class Command:
    """How a worker is started: `environment` is added to that of this process."""

    arguments: Sequence[str | Path]
    environment: dict[str, str]


class EngineProcess:
    """A worker that has loaded its model. Leaves the program, with its last words, when it stops answering."""

    def __init__(self, name: str, process: subprocess.Popen[str], errors: IO[bytes]) -> None:
        self.name = name
        self._process = process
        self._errors = errors
        hello = self._answer()
        self.load_seconds = float(hello["seconds"])
        self.abilities = frozenset(hello["abilities"])

    def seconds(self, request: dict[str, Any]) -> float:
        """What it answers to one request."""
        if self._process.stdin:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return float(self._answer()["seconds"])

    def peak_memory(self) -> int:
        """The most bytes it has had in main memory so far, memory-mapped weights included."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            self._errors.seek(0)
            last_words = self._errors.read().decode(errors="replace")[-_LAST_WORDS:]
            sys.exit(f"The engine {self.name} stopped with {self._process.wait()}:\n{last_words}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def running(name: str, command: Command) -> Iterator[EngineProcess]:
    """Start an engine; it ends with the block."""
    with (
        TemporaryFile() as errors,
        subprocess.Popen(
            [str(argument) for argument in command.arguments],
            env={**os.environ, **command.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        try:
            yield EngineProcess(name, process, errors)
        finally:
            process.kill()
