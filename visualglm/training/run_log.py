"""What a run tells while it goes on: a JSON line a logged step, TensorBoard's events, and the curve as a picture."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from visualglm.training.curve import draw_curve
from visualglm.training.engine import ScalarWriter
from visualglm.training.loop import StepReport

# A picture takes a second, which is many steps of a small model.
_SECONDS_BETWEEN_PICTURES = 60.0


class RunLog:
    """The log of one run. What a run that was cut off wrote after the checkpoint it goes on from is dropped.

    scalars: where its numbers go too, such as TensorBoard's events.
    """

    def __init__(
        self, path: Path, picture: Path, *, title: str, scalars: ScalarWriter | None = None, first_step: int = 0
    ) -> None:
        self.path = path
        self.picture = picture
        self.title = title
        self._drop_after(first_step)
        self._drawn = time.monotonic()
        self._writer = scalars

    def append(self, report: StepReport, validation: Mapping[str, float] | None = None) -> None:
        """One line for a step; `validation` are the losses of rows that are not trained on."""
        row = vars(report) | ({"validation": dict(validation)} if validation else {})
        with self.path.open("a", encoding="utf-8") as log:
            log.write(json.dumps(_finite(row)) + "\n")
        if self._writer is None:
            return
        scalars = {f"train/{name}": loss for name, loss in report.losses.items()}
        scalars |= {f"validation/{name}": loss for name, loss in (validation or {}).items()}
        scalars |= {"learning_rate": report.learning_rate, "gradient_norm": report.grad_norm}
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, report.step)

    def show(self) -> None:
        """Bring what was logged so far to the disk, and now and then draw it."""
        if self._writer is not None:
            self._writer.flush()
        if time.monotonic() - self._drawn > _SECONDS_BETWEEN_PICTURES:
            self._draw()

    def close(self) -> None:
        self._draw()
        if self._writer is not None:
            self._writer.close()

    def _draw(self) -> None:
        if self.path.is_file():
            draw_curve(self.path, self.picture, title=self.title)
        self._drawn = time.monotonic()

    def _drop_after(self, step: int) -> None:
        """The line that a process was writing when it was killed may be cut short."""
        if not self.path.is_file():
            return
        kept = [line for line in self.path.read_text("utf-8").splitlines(keepends=True) if _is_until(line, step)]
        self.path.write_text("".join(kept), "utf-8")


def _finite(value: Any) -> Any:
    """JSON has no name for what is not finite."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return None if isinstance(value, float) and not isfinite(value) else value


def _is_until(line: str, step: int) -> bool:
    try:
        return int(json.loads(line)["step"]) <= step
    except (ValueError, KeyError, TypeError):
        return False
