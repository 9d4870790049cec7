"""Learning-rate schedules, as functions of the step alone: a run that is resumed needs to keep nothing of them."""

from __future__ import annotations

from math import cos, inf, pi

from visualglm.training.recipe import OptimizerRecipe

# AnnealingLR holds the rate down for so many steps, whatever the warmup is, at no more than this share of it.
_SLOW_STEPS, _SLOW_FACTOR = 100, 0.05


def learning_rate(optimizer: OptimizerRecipe, step: int, total_steps: int) -> float:
    """The rate of `step`, which counts from 0, in a run of `total_steps`."""
    return optimizer.learning_rate * _factor(optimizer, step, optimizer.decay_steps or total_steps)


def pace_note(optimizer: OptimizerRecipe, total_steps: int) -> str | None:
    """A warning if a run ends before its learning rate has got anywhere; None if it does not."""
    annealed = optimizer.schedule.startswith("annealing")
    slow_steps = max(optimizer.warmup_steps, _SLOW_STEPS if annealed else 0)
    if total_steps > slow_steps:
        return None
    return (
        f"Warning: the learning rate needs {slow_steps:,} steps to rise, and the run has {total_steps:,}; train "
        "longer, or set optimizer.schedule to cosine and optimizer.warmup_steps to fewer."
    )


def annealing(step: int, *, decay: str, warmup_steps: int, decay_steps: int, decay_ratio: float = 10.0) -> float:
    """The AnnealingLR of the original recipe, as a factor of the peak rate.

    decay: "cosine", down to 1 / `decay_ratio` and there it stays; "linear", down to 0; or "constant".
    The first hundred steps get at most a twentieth of the peak. The decay begins at `warmup_steps`.
    """
    ramp = step / warmup_steps if warmup_steps else inf
    if step < _SLOW_STEPS:
        return min(_SLOW_FACTOR, ramp)
    if step <= warmup_steps:
        return ramp
    done = (step - warmup_steps) / decay_steps
    if decay == "cosine":
        return ((cos(pi * min(1.0, done)) + 1) * (decay_ratio - 1) / 2 + 1) / decay_ratio
    # Beyond its end the original's line goes on below zero, and would undo what was learnt.
    return max(0.0, 1 - done) if decay == "linear" else 1.0


def warmup_cosine(step: int, *, warmup_steps: int, total_steps: int, final_ratio: float = 0.01) -> float:
    """Linear from 0 to 1 over `warmup_steps`, then a half cosine down to `final_ratio` at `total_steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return final_ratio + (1 - final_ratio) * 0.5 * (1 + cos(pi * progress))


def _factor(optimizer: OptimizerRecipe, step: int, decay_steps: int) -> float:
    kind, _, decay = optimizer.schedule.partition("-")
    if kind == "annealing":
        return annealing(
            step,
            decay=decay,
            warmup_steps=optimizer.warmup_steps,
            decay_steps=decay_steps,
            decay_ratio=optimizer.decay_ratio,
        )
    return _usual(optimizer.schedule, step, optimizer.warmup_steps, decay_steps)


def _usual(decay: str, step: int, warmup_steps: int, decay_steps: int) -> float:
    """The schedules of transformers, to the bit; written here, because that library needs torch."""
    if step < warmup_steps:
        return step / warmup_steps
    left = max(1, decay_steps - warmup_steps)
    if decay == "cosine":
        return max(0.0, 0.5 * (1.0 + cos(pi * 0.5 * 2.0 * ((step - warmup_steps) / left))))
    return max(0.0, (decay_steps - step) / left) if decay == "linear" else 1.0
