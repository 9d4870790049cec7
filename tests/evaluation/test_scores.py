from math import exp, inf

import pytest

from visualglm.evaluation.results import Result
from visualglm.evaluation.scores import (
    BLEU_4,
    CIDER_D,
    EXACT_MATCH,
    LOSS,
    PERPLEXITY,
    ROUGE_L,
    VQA_ACCURACY,
    Scored,
    by_language,
    row_verdict,
    verdict,
)


def result(answer: str | None, *references: str, loss: float | None = None, tokens: int = 0) -> Result:
    return Result(references, answer, None if answer is not None else "why", loss, tokens)


def test_loss_is_weighted_by_tokens():
    scored = Scored([result("a", "a", loss=1.0, tokens=3), result("b", "a", loss=5.0, tokens=1), result(None, "a")])
    overall = scored.overall(range(3))
    assert overall[LOSS] == 2.0 and overall[PERPLEXITY] == exp(2) and scored.tokens(range(3)) == 4
    assert overall[EXACT_MATCH] == overall[VQA_ACCURACY] == overall[ROUGE_L] == 0.5
    assert Scored([result("a", "a", loss=1e4, tokens=1)]).overall([0])[PERPLEXITY] == inf


def test_what_was_not_asked_for_has_no_score():
    assert LOSS not in Scored([result("a", "a"), result("a", "a", loss=1.0, tokens=3)]).overall(range(2))
    assert Scored([result(None, "a")]).overall([0]) == {} and Scored([]).rows == []


def test_cider_of_a_part_goes_by_the_idf_of_all():
    scored = Scored([result("red fox", "red fox"), result("blue bear", "blue bear")])
    assert scored.overall([0])[CIDER_D] == pytest.approx(5)


def test_bleu_is_left_out_without_its_package(monkeypatch: pytest.MonkeyPatch):
    scored = Scored([result("a b c d", "a b c d")])
    assert scored.overall([0])[BLEU_4] == pytest.approx(100)
    monkeypatch.setattr("visualglm.evaluation.scores.has_bleu", lambda: False)
    assert BLEU_4 not in scored.overall([0])


def test_groups_by_language():
    zh, en = result("红", "红", "red"), result("red", "red")
    assert by_language([zh, en, zh]) == {"all": [0, 1, 2], "Chinese": [0, 2], "other": [1]}
    assert by_language([zh, zh]) == {"all": [0, 1]} and by_language([]) == {"all": []}


def test_verdicts():
    assert verdict(EXACT_MATCH, {EXACT_MATCH: 0.0}, {EXACT_MATCH: 1.0}) == "improved"
    assert verdict(LOSS, {LOSS: 1.0}, {LOSS: 2.0}) == "worse" and verdict(LOSS, {LOSS: 1.0}, {LOSS: 1.00001}) == "same"
    assert verdict(LOSS, {}, {LOSS: 1.0}) is None
    rows = Scored(
        [result(answer, "the red fox") for answer in ("the red fox", "a red bear", "the Red fox!", None)]
    ).rows
    exact, far, near, none = rows
    assert row_verdict(far, near) == row_verdict(near, exact) == row_verdict(none, far) == "improved"
    assert row_verdict(exact, near) == row_verdict(near, none) == "worse"
    assert row_verdict(near, near) == row_verdict(none, none) == "same"
