"""Lines of progress where stderr is no terminal, by a clock that is set."""

from collections.abc import Callable

import pytest

from visualglm.cli.log_lines import LogLines


def lines_of(seconds: float, total: int, first: int = 0) -> list[str]:
    """Of work that takes `seconds` for each of `total`, with a note."""
    told: list[str] = []
    now = 0.0
    lines = LogLines("training", told.append, clock=lambda: now)
    for done in range(first + 1, total + 1):
        now += seconds
        lines.report(done, total, f"loss {1 / done:.4f}")
    return told


def test_a_line_for_every_tenth() -> None:
    told = lines_of(3.0, 50)
    assert len(told) == 10
    assert told[0] == "training: 5 of 50, loss 0.2000, 0:02:15 left"
    assert told[-1] == "training: 50 of 50, loss 0.0200"


def test_a_run_that_goes_on_begins_where_it_was() -> None:
    assert [line.partition(",")[0] for line in lines_of(3.0, 50, first=39)] == [
        f"training: {done} of 50" for done in (40, 45, 50)
    ]


@pytest.mark.parametrize(("seconds", "total", "count"), [(0.01, 100, 0), (0.1, 50, 3), (40.0, 5, 5)])
def test_short_work_has_few_lines(seconds: float, total: int, count: int) -> None:
    assert len(lines_of(seconds, total)) == count


def test_what_has_begun_to_be_told_is_told_to_its_end() -> None:
    assert lines_of(0.1, 50)[-1] == "training: 50 of 50, loss 0.0200"


def test_a_day_has_a_line_soon_and_not_many() -> None:
    told = lines_of(1.0, 86_400)
    assert told[0].startswith("training: 31 of 86,400, ")
    assert 10 < len(told) < 25


def test_work_of_nothing_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    report: Callable[[int, int, str], None] = LogLines("hashing", print).report
    report(0, 0, "")
    assert capsys.readouterr().out == ""
