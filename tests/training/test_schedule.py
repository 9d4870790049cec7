from __future__ import annotations

import pytest

from visualglm.training.schedule import warmup_cosine


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (60, 0.505), (110, 0.01), (500, 0.01)],
)
def test_rises_linearly_then_falls_by_half_a_cosine(step: int, expected: float) -> None:
    assert warmup_cosine(step, warmup_steps=10, total_steps=110) == pytest.approx(expected)
