"""Lines for people: on stderr, which may be closed or full, and never with what a terminal would obey."""

from __future__ import annotations

import os
import re
import sys
from typing import TextIO

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def harmless(text: str, stream: TextIO) -> str:
    """`text` for `stream`: a terminal would obey control characters that come from files, a file keeps them."""
    return _CONTROL.sub("\ufffd", text) if stream.isatty() else text


def print_note(text: str = "", end: str = "\n") -> None:
    """A line on stderr; where that cannot be written, there is none, and nothing else is lost for it."""
    try:
        print(harmless(text, sys.stderr), end=end, file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)


def print_error(sentence: object) -> None:
    """An error as every command tells it: one line on stderr."""
    line = "".join(character if character.isprintable() else " " for character in str(sentence))
    print_note(f"visualglm: error: {line}")


def discard(stream: TextIO) -> None:
    """Send what is still buffered for `stream` nowhere, so that the interpreter does not fail on it again."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except (OSError, ValueError):
        # No file of the system, as in tests.
        return
