import random
import re

import pytest

from visualglm.processing.answer import AnswerCleaner, clean_answer


def original(text: str) -> str:
    """The clean-up as the original model's code states it: mark after mark over the whole text."""
    text = text.strip().replace("[[训练时间]]", "2023年")
    for mark, wide in (",，", "!！", ":：", ";；", "?？"):
        text = re.sub(rf"([\u4e00-\u9fff]){re.escape(mark)}", rf"\1{wide}", text)
        text = re.sub(rf"{re.escape(mark)}([\u4e00-\u9fff])", rf"{wide}\1", text)
    return text


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        (" \n这是猫,真的? \t", "这是猫，真的？"),
        ("a cat, a dog: yes!", "a cat, a dog: yes!"),
        ("ok,好", "ok，好"),
        ("好,,,好", "好，,，好"),
        ("截至[[训练时间]],好", "截至2023年，好"),
        ("[[[训练时间]]?", "[2023年？"),
        ("!", "!"),
        ("  ", ""),
    ],
)
def test_clean_answer(text, cleaned):
    assert clean_answer(text) == cleaned == original(text)


def test_random_answers_are_cleaned_as_the_original_does_whole_or_in_pieces():
    rng = random.Random(6)
    parts = [*",!:;?[] 中国a\n\u3000", "[[训练时间]]", "[[训练", "时间]]", "  ", "，"]
    for _ in range(5000):
        pieces = rng.choices(parts, k=rng.randint(0, 12))
        text = "".join(pieces)
        assert clean_answer(text) == original(text), repr(text)
        cleaner = AnswerCleaner()
        assert "".join(map(cleaner.push, pieces)) + cleaner.flush() == original(text), pieces


def test_only_what_is_undecided_is_held_back():
    cleaner = AnswerCleaner()
    shown = [cleaner.push(piece) for piece in ("  ", "猫", ",", "a", ",", " ", "b", "[[训", "练", "x", " ")]
    assert shown == ["", "猫", "，", "a", "", ",", " b", "", "", "[[训练x", ""]
    assert cleaner.flush() == ""
