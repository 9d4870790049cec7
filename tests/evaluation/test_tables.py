from visualglm.evaluation.results import Result
from visualglm.evaluation.scores import Scored
from visualglm.evaluation.tables import comparison_table, score_table


def scored(*answers: str | None, loss: float | None = 0.5) -> Scored:
    """Answers to: red, red, 红."""
    return Scored(
        [
            Result(
                (reference,), answer, None if answer else "why", loss if answer else None, 2 if answer and loss else 0
            )
            for answer, reference in zip(answers, ("red", "red", "红"), strict=True)
        ]
    )


def test_scores_by_language():
    table = score_table(scored("red", None, "红"))
    assert table.header == ("metric", "all", "Chinese", "other")
    assert table.rows[:4] == (
        ("rows", "3", "1", "2"),
        ("rows with an error", "1", "0", "1"),
        ("tokens of the loss", "4", "2", "2"),
        ("exact match (%)", "100.000", "100.000", "100.000"),
    )
    assert table.rows[-1] == ("perplexity", "1.649", "1.649", "1.649")
    assert [row[0] for row in score_table(scored("red", "x", "红", loss=None)).rows][:2] == ["rows", "exact match (%)"]
    nothing = score_table(scored(None, None, None))
    assert [row[0] for row in nothing.rows] == ["rows", "rows with an error"]


def test_comparison_is_over_the_rows_that_both_have():
    table = comparison_table(scored("red", None, "蓝"), scored("blue", "red", "红", loss=0.25))
    assert table.header == ("metric", "before", "after", "change", "worse", "improved", "same")
    rows = {row[0]: row[1:] for row in table.rows[:8]}
    assert rows["rows"] == ("2", "2", "", "", "", "")
    assert rows["exact match (%)"] == ("50.000", "50.000", "+0.000", "1", "1", "0")
    assert rows["loss (nats a token)"] == ("0.500", "0.250", "-0.250", "0", "2", "0")
    assert rows["perplexity"][-3:] == rows["BLEU-4 (0-100)"][-3:] == ("–", "–", "–")
    assert [row[:2] for row in table.rows if row[0].startswith("rows")] == [
        ("rows", "2"),
        ("rows, Chinese", "1"),
        ("rows, other", "1"),
    ]
