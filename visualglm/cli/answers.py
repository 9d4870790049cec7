"""Answers on stdout while they are made."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator

# A terminal would obey them.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def shown(pieces: Iterable[str]) -> Iterator[str]:
    """`pieces`, each written to stdout as it passes."""
    is_terminal = sys.stdout.isatty()
    for piece in pieces:
        sys.stdout.write(_CONTROL.sub("\ufffd", piece) if is_terminal else piece)
        sys.stdout.flush()
        yield piece
