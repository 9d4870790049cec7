"""Learning-rate schedules, as factors of the peak rate."""

from __future__ import annotations

from math import cos, pi


def warmup_cosine(step: int, *, warmup_steps: int, total_steps: int, final_ratio: float = 0.01) -> float:
    """Linear from 0 to 1 over `warmup_steps`, then a half cosine down to `final_ratio` at `total_steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return final_ratio + (1 - final_ratio) * 0.5 * (1 + cos(pi * progress))
