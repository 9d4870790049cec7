"""The engine's side of the talk with `engines.py`: JSON lines on stdin and stdout, answered one by one.

A worker is started as `worker_….py MODEL THREADS`. Once it has loaded the model it says

    {"seconds": 1.5, "abilities": ["batches"]}

and then answers each request with seconds, until stdin ends:

    {"command": "encode"}                                                the time to encode one image
    {"command": "prefill", "tokens": 64}                                 the time to the logits behind a prompt
    {"command": "decode", "context": 512, "batch": 4, "steps": 8}        the time of one step of the whole batch

Only the standard library is needed, so that it runs in an environment of the engine's own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO


class Engine(Protocol):
    """A loaded model."""

    @property
    def abilities(self) -> Sequence[str]:
        """What it can do beside the text of one row: "images", "batches"."""
        ...

    def prefill(self, tokens: int) -> float: ...

    def decode(self, context: int, batch: int, steps: int) -> float: ...


def serve(load: Callable[[Path, int], Engine]) -> None:
    """Load the model named on the command line and answer requests until stdin ends."""
    answers = _private_stdout()
    model, threads = Path(sys.argv[1]), int(sys.argv[2])
    start = time.perf_counter()
    engine = load(model, threads)
    _answer(answers, seconds=time.perf_counter() - start, abilities=engine.abilities)
    for line in sys.stdin:
        request = json.loads(line)
        command = request.pop("command")
        _answer(answers, seconds=getattr(engine, command)(**request))


def seconds_of(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _private_stdout() -> TextIO:
    """Where answers go; whatever else the engine prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _answer(answers: TextIO, **answer: Any) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
