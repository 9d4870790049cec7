"""Answers on stdout while they are made."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from visualglm.cli.output import harmless


def shown(pieces: Iterable[str]) -> Iterator[str]:
    """`pieces`, each written to stdout as it passes."""
    for piece in pieces:
        sys.stdout.write(harmless(piece, sys.stdout))
        sys.stdout.flush()
        yield piece
