"""Lines from stdin: typed at a prompt with line editing, or read from a pipe or file."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator

from visualglm.cli.output import print_note
from visualglm.errors import DataError

PROMPT = "> "


def read_questions() -> Iterator[str]:
    """Lines without surrounding blanks, empty ones left out, up to the end of input or Ctrl-C twice at the prompt."""
    if sys.stdin is None:
        raise DataError("There is no stdin to read questions from; run the command without closing it.")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    lines = _typed_lines(_reader()) if sys.stdin.isatty() else sys.stdin
    return filter(None, map(str.strip, lines))


def _typed_lines(read_line: Callable[[], str]) -> Iterator[str]:
    interrupted = False
    while True:
        try:
            line = read_line()
        except EOFError:
            print_note()
            return
        except KeyboardInterrupt:
            print_note("\n(once more to leave)" if not interrupted else "")
            if interrupted:
                return
            interrupted = True
            continue
        interrupted = False
        yield line


def _reader() -> Callable[[], str]:
    if sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            # Gives `input` line editing and a history.
            import readline  # noqa: F401
        return lambda: input(PROMPT)
    # stdout is for answers alone.
    return _read_line_after_prompt


def _read_line_after_prompt() -> str:
    print_note(PROMPT, end="")
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
