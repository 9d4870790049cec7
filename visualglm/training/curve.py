"""The loss curve of a run, as a picture."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure

from visualglm.checkpoint.files import replace_file


def draw_curve(log: Path, picture: Path, *, title: str) -> None:
    """Draw the losses and the learning rate of a JSONL log (one `StepReport` a line) into a PNG.

    Lines may have losses of `validation` beside those of training; they are drawn with dots.
    """
    rows = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    if not rows:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    steps = [row["step"] for row in rows]
    for name in rows[-1]["losses"]:
        losses.plot(steps, [row["losses"].get(name) for row in rows], label=name, linewidth=1)
    validated = [row for row in rows if "validation" in row]
    for name in validated[-1]["validation"] if validated else ():
        points = [row["validation"].get(name) for row in validated]
        losses.plot([row["step"] for row in validated], points, "o-", label=f"{name}, held-out rows", markersize=3)
    losses.set(title=title, ylabel="loss", yscale="log")
    losses.legend()
    rates.plot(steps, [row["learning_rate"] for row in rows], color="grey", linewidth=1)
    rates.set(xlabel="step", ylabel="learning rate")
    drawn = BytesIO()
    figure.savefig(drawn, dpi=100, format="png")
    replace_file(picture, [drawn.getvalue()])
