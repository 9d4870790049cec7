"""The loss curve of a run, as a picture."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure


def draw_curve(log: Path, picture: Path, *, title: str) -> None:
    """Draw the losses and the learning rate of a JSONL log (one `StepReport` a line) into a PNG."""
    rows = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for name in rows[-1]["losses"]:
        losses.plot(steps, [row["losses"].get(name) for row in rows], label=name, linewidth=1)
    losses.set(title=title, ylabel="loss", yscale="log")
    losses.legend()
    rates.plot(steps, [row["learning_rate"] for row in rows], color="grey", linewidth=1)
    rates.set(xlabel="step", ylabel="learning rate")
    figure.savefig(picture, dpi=100)
