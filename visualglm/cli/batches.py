"""Works through batches of rows while it shows how far it has come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from visualglm.cli.messages import Messages
from visualglm.cli.row_log import RowLog

Batch = list[dict[str, Any]]


def keep_batches(
    batches: AbstractContextManager[Iterator[Batch]],
    keep: Callable[[Batch], object],
    done: int,
    total: int,
    messages: Messages,
) -> list[bool]:
    """Give each batch to `keep` as it comes; returns for each of its rows whether it is an error.

    `done` rows of `total` were there before.
    """
    failed: list[bool] = []
    start = time.perf_counter()
    with messages.row_progress("answering") as report, batches as coming:
        report(done, total)
        for batch in coming:
            keep(batch)
            failed += ["error" in row for row in batch]
            report(done + len(failed), total)
    seconds = time.perf_counter() - start
    messages.tell(f"answered {len(failed):,} rows in {seconds:.1f} s, {len(failed) / seconds:.1f} rows/s")
    return failed


@contextmanager
def told_if_interrupted(log: RowLog, total: int, messages: Messages) -> Iterator[None]:
    """On Ctrl-C, say that what is in `log` stays."""
    try:
        yield
    except KeyboardInterrupt:
        messages.tell(f"{log.path} has {log.row_count:,} of {total:,} rows; the same command goes on")
        raise
