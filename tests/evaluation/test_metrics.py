"""Metrics against figures computed by hand; CIDEr-D and ROUGE-L were compared with the usual code to 1e-15."""

from math import exp, sqrt

import pytest
from sacrebleu import corpus_bleu

from visualglm.evaluation.metrics import CiderD, bleu_4, exact_match, normalized_for_vqa, rouge_l, vqa_accuracy, words


def test_words():
    assert words("It's 3 Dogs—and 一只猫，OK!") == ["it's", "3", "dogs", "and", "一", "只", "猫", "ok"]
    assert words("…!") == []


def test_exact_match_cleans_both_sides():
    assert exact_match("红色,圆形", [" 红色，圆形\n"]) == 1
    assert exact_match("blue", ["red", "blue "]) == 1
    assert exact_match("Blue", ["blue"]) == exact_match("", ["blue"]) == 0


# --- VQA accuracy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The two Dogs.", "2 dogs"),
        ("a  red,green kite", "red green kite"),
        ("red, green", "red green"),
        ("1,000", "1000"),
        ("3.5 m.", "3.5 m"),
        ("dont", "don't"),
        ("it's well", "it's well"),
        ("yes!", "yes"),
        ("left/right", "left right"),
        ("none", "0"),
        ("一个圆，红色。", "一个圆 红色"),
        ("", ""),
    ],
)
def test_normalisation_of_vqa(text: str, normalized: str):
    assert normalized_for_vqa(text) == normalized


@pytest.mark.parametrize(("matching", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_over_ten_people(matching: int, accuracy: float):
    """Of three that match, seven of ten sets of nine others hold all three, and three hold two: 0.7 + 0.3 * 2 / 3."""
    references = ["Red."] * matching + ["blue"] * (10 - matching)
    assert vqa_accuracy("the red", references) == pytest.approx(accuracy)


def test_vqa_accuracy_with_alternatives():
    assert vqa_accuracy("two", ["2"]) == vqa_accuracy("A cat", ["dog", "cat"]) == 1
    assert vqa_accuracy("three", ["2", "two"]) == 0


# --- ROUGE-L ----------------------------------------------------------------------------------------------------------


def test_rouge_l():
    """The example of Lin (2004): three of four words in order, then two."""
    assert rouge_l("police kill the gunman", ["police killed the gunman"]) == 0.75
    assert rouge_l("the gunman kill police", ["police killed the gunman"]) == 0.5
    assert rouge_l("the cat sat", ["A dog", "The cat sat down here"]) == pytest.approx(2 * 3 / 8)
    assert rouge_l("图里有一只猫。", ["图里有两只猫"]) == pytest.approx(2 * 5 / 12)
    assert rouge_l("", ["red"]) == 0 and rouge_l("!", ["?"]) == 1


def test_rouge_l_of_what_repeats():
    assert rouge_l("a b a b a", ["b a b a b"]) == pytest.approx(0.8)
    long = "x y " * 500
    assert rouge_l(long, [long + "z"]) == pytest.approx(2 * 1000 / 2001)


# --- CIDEr-D ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("red fox", 10 / 2),  # n = 1 and 2 are perfect, of n = 3 and 4 there is nothing
        ("red bear", 10 / 8),  # one word of two: a cosine of 1/2 for n = 1
        ("red", 10 / 4 / sqrt(2) * exp(-1 / 72)),  # a word less
        ("red red red fox", 10 / 4 * (2 / sqrt(20) + 1 / sqrt(5)) * exp(-4 / 72)),  # clipped to one "red"
        ("green", 0),
        ("", 0),
    ],
)
def test_cider_d(answer: str, expected: float):
    """Two rows of two rare words each: every n-gram has the idf log 2, which cancels."""
    assert CiderD([["red fox"], ["blue bear"]]).score(answer, ["red fox"]) == pytest.approx(expected)


def test_cider_d_weighs_what_is_rare():
    """In three rows "the" is worth nothing, "red" (in two) log 3/2 and "fox" log 3."""
    cider = CiderD([["the red fox"], ["the red bear"], ["the sea"]])
    assert cider.score("the", ["the red fox"]) == 0
    assert cider.score("fox", ["the red fox"]) > cider.score("red", ["the red fox"]) > 0


def test_cider_d_is_the_mean_over_references():
    cider = CiderD([["red fox", "grey wolf"], ["blue bear"]])
    assert cider.score("red fox", ["red fox", "grey wolf"]) == pytest.approx(10 / 2 / 2)


def test_cider_d_by_chinese_characters():
    assert CiderD([["红狐"], ["蓝熊"]]).score("红狐。", ["红狐"]) == pytest.approx(5)


# --- BLEU -------------------------------------------------------------------------------------------------------------


def test_bleu():
    assert bleu_4([("the cat is on the mat", ["the cat is on a mat"])]) == pytest.approx(
        100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    )


def test_bleu_by_chinese_characters():
    """No four characters agree: the usual smoothing makes it half a match of three."""
    assert bleu_4([("图里有一只猫", ["图里有两只猫"])]) == pytest.approx(100 * (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25)


def test_bleu_is_that_of_sacrebleu():
    english = [
        ("There are 1,000 dogs, aren't there?", ["There are 1,000 dogs; aren't there?", "So many dogs are there!"]),
        ("a big red circle lies on the left", ["a red circle on the left"]),
    ]
    columns = [[english[0][1][0], english[1][1][0]], [english[0][1][1], None]]
    assert bleu_4(english) == corpus_bleu([answer for answer, _ in english], columns).score
    chinese = [("图里有一只红色的大猫，OK。", ["图里有两只红色的大猫，OK。"]), ("一个圆", ["一个大圆形"])]
    columns = [[references[0] for _, references in chinese]]
    assert bleu_4(chinese) == corpus_bleu([answer for answer, _ in chinese], columns, tokenize="zh").score
    assert bleu_4(english) < bleu_4(english + chinese) < bleu_4(chinese)


def test_bleu_cleans_both_sides():
    assert bleu_4([("图里有红色的大猫，黑狗", ["图里有红色的大猫,黑狗"])]) == pytest.approx(100)
