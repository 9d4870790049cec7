from __future__ import annotations

from math import cos, pi
from typing import get_args

import pytest
import torch
from transformers.optimization import get_scheduler

from visualglm.training.recipe import OptimizerRecipe, Schedule
from visualglm.training.schedule import annealing, learning_rate, pace_note, warmup_cosine


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (60, 0.505), (110, 0.01), (500, 0.01)],
)
def test_rises_linearly_then_falls_by_half_a_cosine(step: int, expected: float) -> None:
    assert warmup_cosine(step, warmup_steps=10, total_steps=110) == pytest.approx(expected)


# The definition of the recipe: w = warmup_steps, n = num_iters, r = 10, and the step counted from 0.
def defined(decay: str, step: int, lr: float, w: int, n: int, r: float = 10) -> float:
    if step <= 99:
        return min(0.05 * lr, lr * step / w)
    if step <= w:
        return lr * step / w
    if decay == "cosine":
        return lr / r * ((cos(pi * min(1, (step - w) / n)) + 1) * (r - 1) / 2 + 1)
    return lr * (n - (step - w)) / n if decay == "linear" else lr


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup_steps", [1, 50, 100, 250])
def test_annealing_is_that_of_the_recipe_at_every_step(decay: str, warmup_steps: int) -> None:
    recipe = OptimizerRecipe(
        learning_rate=1e-5, schedule=f"annealing-{decay}", warmup_steps=warmup_steps, decay_steps=1500
    )
    for step in range(1500):
        expected = defined(decay, step, 1e-5, warmup_steps, 1500)
        assert learning_rate(recipe, step, total_steps=300) == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.0), (4, 0.04), (99, 0.05), (100, 1.0), (850, 0.55), (1600, 0.1), (9999, 0.1)]
)
def test_annealing_in_figures(step: int, expected: float) -> None:
    assert annealing(step, decay="cosine", warmup_steps=100, decay_steps=1500) == pytest.approx(expected)


def test_annealing_without_warmup_starts_slowly_all_the_same() -> None:
    assert annealing(0, decay="linear", warmup_steps=0, decay_steps=200) == 0.05
    assert annealing(100, decay="linear", warmup_steps=0, decay_steps=200) == 0.5


def test_a_rate_is_never_below_zero() -> None:
    assert annealing(5000, decay="linear", warmup_steps=100, decay_steps=1500) == 0.0


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("cosine", 5, 0.5),
        ("cosine", 10, 1.0),
        ("cosine", 60, 0.5),
        ("cosine", 110, 0.0),
        ("linear", 35, 0.75),
        ("linear", 110, 0.0),
        ("constant", 5, 0.5),
        ("constant", 100, 1.0),
    ],
)
def test_usual_schedules_in_figures(schedule: Schedule, step: int, expected: float) -> None:
    recipe = OptimizerRecipe(learning_rate=1.0, schedule=schedule, warmup_steps=10)
    assert learning_rate(recipe, step, total_steps=110) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("schedule", "name"), [("cosine", "cosine"), ("linear", "linear"), ("constant", "constant_with_warmup")]
)
@pytest.mark.parametrize("warmup_steps", [0, 1, 13])
def test_usual_schedules_have_the_bits_of_the_library(schedule: Schedule, name: str, warmup_steps: int) -> None:
    nothing = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    (factor,) = get_scheduler(name, nothing, warmup_steps, 97).lr_lambdas
    recipe = OptimizerRecipe(learning_rate=1.0, schedule=schedule, warmup_steps=warmup_steps)
    assert [learning_rate(recipe, step, 97) for step in range(120)] == [factor(step) for step in range(120)]


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_without_decay_steps_a_schedule_spans_the_run(schedule: Schedule) -> None:
    recipe = OptimizerRecipe(schedule=schedule, warmup_steps=100)
    spanned = recipe.model_copy(update={"decay_steps": 700})
    assert [learning_rate(recipe, step, 700) for step in range(700)] == [
        learning_rate(spanned, step, 300) for step in range(700)
    ]


@pytest.mark.parametrize(
    ("schedule", "warmup_steps", "total_steps", "slow"),
    [
        ("annealing-cosine", 10, 100, True),
        ("annealing-cosine", 10, 101, False),
        ("annealing-cosine", 300, 300, True),
        ("cosine", 10, 100, False),
        ("cosine", 10, 10, True),
    ],
)
def test_a_run_that_ends_before_it_learns_is_warned_of(
    schedule: Schedule, warmup_steps: int, total_steps: int, slow: bool
) -> None:
    note = pace_note(OptimizerRecipe(schedule=schedule, warmup_steps=warmup_steps), total_steps)
    assert (note is not None) is slow
