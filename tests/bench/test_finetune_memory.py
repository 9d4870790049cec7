"""The benchmark of training steps runs, on a model of no size."""

from queue import SimpleQueue

import pytest

from finetune_memory import METHODS, Case, Measured, train


@pytest.mark.parametrize("method", METHODS)
def test_a_case_is_measured(method: str) -> None:
    results: SimpleQueue[Measured] = SimpleQueue()
    train(Case(preset="tiny", method=method, bits=4, layers=[], length=64, steps=2, recompute=False), results)
    measured = results.get()
    assert len(measured["steps"]) == 2 and min(measured["steps"]) > 0
    assert 0.1 < measured["peak"] < 16
