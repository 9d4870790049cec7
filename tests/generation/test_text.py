"""From ids to text: stop strings wherever they are split, and characters that are never cut."""

import random
from pathlib import Path

import pytest

from visualglm.generation.text import AnswerStream, StopFinder
from visualglm.processing.answer import clean_answer
from visualglm.processing.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_path: Path) -> Tokenizer:
    return Tokenizer(tiny_tokenizer_path)


def find(pieces: list[str], stop: tuple[str, ...]) -> tuple[str, bool]:
    finder = StopFinder(stop)
    text = "".join(map(finder.push, pieces))
    return text + finder.flush(), finder.found


def first_complete(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """By definition: read a character at a time until a stop string ends there, the longest if several do."""
    for end in range(1, len(text) + 1):
        matches = [word for word in stop if text[:end].endswith(word)]
        if matches:
            return text[: end - max(map(len, matches))], True
    return text, False


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("a red cat", ("red",), "a "),
        ("a red cat", ("dog",), "a red cat"),
        ("a red cat", (), "a red cat"),
        ("red", ("red",), ""),
        ("one\ntwo\nthree", ("\n",), "one"),
        ("你好。再见。", ("。",), "你好"),
        ("aaab", ("aab",), "a"),
        ("abcd", ("cd", "bc"), "a"),
        ("abcd", ("abcd", "bc"), "a"),
        ("xabc", ("bc", "abc"), "x"),
        ("ab", ("abc",), "ab"),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 99])
def test_text_ends_before_the_stop_string_however_it_comes(text, stop, expected, size):
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    assert find(pieces, stop) == (expected, expected != text)


def test_random_texts_in_random_pieces_end_where_the_definition_says():
    chance = random.Random(5)
    for _ in range(3000):
        text = "".join(chance.choices("ab", k=chance.randrange(1, 12)))
        stop = tuple("".join(chance.choices("ab", k=chance.randrange(1, 5))) for _ in range(chance.randrange(3)))
        cuts = sorted(chance.choices(range(len(text) + 1), k=chance.randrange(5)))
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert find(pieces, stop) == first_complete(text, stop), (text, stop, pieces)


def test_only_what_may_be_a_stop_string_is_held_back():
    finder = StopFinder(("END", "!"))
    assert [finder.push(piece) for piece in ("on", "e E", "N", "T", "wo E", "ND more", "more")] == [
        "on", "e ", "", "ENT", "wo ", "", "",
    ]  # fmt: skip
    assert finder.found and finder.flush() == ""


@pytest.mark.parametrize("stop", ["sits", "a red", "红色的沙", "on the", " sofa", "t s"])
def test_stop_strings_that_tokens_split(tokenizer: Tokenizer, stop: str):
    text = "a red cat sits on the sofa. 猫坐在红色的沙发上"
    ids = tokenizer.encode(text)
    assert all(tokenizer.decode([token]) != stop for token in ids) or stop == "sits"
    stream, pieces = AnswerStream(tokenizer, (stop,)), []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    assert "".join(pieces) + stream.flush() == clean_answer(text[: text.index(stop)])
    assert stream.stopped and stream.push(ids[0]) == ""


@pytest.mark.parametrize(
    "text", ["a red cat, 三只猫, ok?", " 你好 ", "🐈‍⬛ é 𠀀", "line\n\n  two\tthree", "一,二", "[[训练时间]]"]
)
def test_pieces_make_up_the_cleaned_answer_and_cut_no_character(tokenizer: Tokenizer, text: str):
    stream = AnswerStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode(text)] + [stream.flush()]
    assert "".join(pieces) == clean_answer(text)
    assert "\ufffd" not in "".join(pieces)


def test_bytes_of_a_character_that_never_ends_are_marked(tokenizer: Tokenizer):
    ids = tokenizer.encode("🐈")
    assert len(ids) >= 4, "spelled in bytes"
    stream = AnswerStream(tokenizer)
    assert "".join(map(stream.push, ids[:-1])).strip() == ""
    assert "\ufffd" in stream.flush()
