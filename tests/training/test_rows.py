import json
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visualglm.errors import DataError
from visualglm.training.rows import RowIndex, TrainingRow, check_rows, open_rows, split_rows

Values = dict[str, Any]
ROWS: list[Values] = [
    {"img": "a.png", "prompt": "这张图片的背景里有什么内容？", "label": "蓝天，白云。"},
    {"image": "more/b.jpg", "question": 'What [is] {this}, "really"?\n', "answer": "a \\ and ], }"},
    {"prompt": "no picture", "label": "none"},
    {"img": None, "conversations": [["one?", "1"], ["two?", "2"]]},
]
EXPECTED = [
    (("a.png"), ((ROWS[0]["prompt"], "蓝天，白云。"),)),
    (("more/b.jpg"), ((ROWS[1]["question"], "a \\ and ], }"),)),
    (None, (("no picture", "none"),)),
    (None, (("one?", "1"), ("two?", "2"))),
]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., RowIndex]:
    """Opens a file of the given bytes, beside two pictures."""
    (tmp_path / "more").mkdir()
    for name in ("a.png", "more/b.jpg"):
        Image.new("RGB", (40, 30), "red").save(tmp_path / name)

    def write_file(content: bytes | str, name: str = "rows.jsonl") -> RowIndex:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(data)
        return open_rows(tmp_path / name)

    return write_file


def lines(rows: list[Values], end: str = "\n", start: str = "") -> str:
    return start + "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)


def fault(index: RowIndex, number: int = 0) -> str:
    with pytest.raises(DataError) as raised:
        index[number]
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    "content, line_numbers",
    [
        (lines(ROWS), [1, 2, 3, 4]),
        (lines(ROWS).rstrip(), [1, 2, 3, 4]),
        (lines(ROWS, "\r\n"), [1, 2, 3, 4]),
        (lines(ROWS, "\n\n  \t\n", "\n"), [2, 5, 8, 11]),
        (lines(ROWS, start="\ufeff"), [1, 2, 3, 4]),
        (json.dumps(ROWS), [1, 1, 1, 1]),
        (json.dumps(ROWS, indent=2, ensure_ascii=False), [2, 7, 12, 16]),
        ("\ufeff\n [\r\n" + ",\r\n".join(map(json.dumps, ROWS)) + "\r\n]\r\n", [3, 4, 5, 6]),
    ],
    ids=["jsonl", "no last newline", "crlf", "blank lines", "bom", "list", "indented list", "list with bom and crlf"],
)
def test_rows_of_every_kind_of_file(
    write: Callable[..., RowIndex], tmp_path: Path, content: str, line_numbers: list[int]
) -> None:
    index = write(content)
    assert [(row.image, row.turns) for row in map(index.__getitem__, range(len(index)))] == EXPECTED
    assert index[1].source == tmp_path / "more" / "b.jpg"
    assert index[2].source is None
    assert [index.places[number, 2] for number in range(4)] == line_numbers
    assert index.is_list == content.lstrip("\ufeff \n").startswith("[")
    check_rows(index)
    again: RowIndex = pickle.loads(pickle.dumps(index))
    assert again[3] == index[3] and again.sha256 == index.sha256


@pytest.mark.parametrize("count, is_list", [(100_000, False), (20_000, True)])
def test_many_rows_are_indexed_in_little_memory(tmp_path: Path, count: int, is_list: bool) -> None:
    path = tmp_path / "many.json"
    row = json.dumps({"prompt": "问" * 30, "label": "答" * 100}, ensure_ascii=False)
    rows = [row.replace("问", f"{number}", 1) for number in range(count)]
    path.write_text("[" + ",\n".join(rows) + "]" if is_list else "\n".join(rows), "utf-8")
    assert path.stat().st_size > 400 * count
    tracemalloc.start()
    index = open_rows(path)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(index) == count
    assert index[count - 1].turns[0][0].startswith(f"{count - 1}问")
    last = f"row {count} (line {count})" if is_list else f"line {count}"
    assert index.where(count - 1) == f"{path}, {last}"
    assert kept < 30 * count and peak < 4_000_000


def test_the_hash_is_that_of_the_file(write: Callable[..., RowIndex]) -> None:
    assert write(lines(ROWS)).sha256 != write(lines(ROWS[:3])).sha256


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "has no rows"),
        ("\n \n", "has no rows"),
        ("[]", "has no rows"),
        ("[\n]\n", "has no rows"),
        ("[\n" + lines(ROWS[:1]) + ",", "line 3: the row that begins here, or the list of rows, is not closed"),
        (f"[\n{json.dumps(ROWS[0])},\n{{'prompt': 1,\n{json.dumps(ROWS[2])}]", "line 3: the row that begins here"),
        ('[{"prompt": "a', "line 1: the row that begins here"),
        ('[{"prompt": "a", "label": "b"}]\n{"prompt": 1}', "line 2: something follows the list of rows"),
        (lines(ROWS).encode("utf-16"), "is in UTF-16; save it as UTF-8."),
    ],
)
def test_files_without_rows(write: Callable[..., RowIndex], content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        write(content)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl does not exist; give a file"):
        open_rows(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="is a folder; give a file"):
        open_rows(tmp_path)


@pytest.mark.parametrize(
    "row, message",
    [
        ('{"img": "a.png", "prompt": "a"', "this is no JSON"),
        ('{"img": "a.png" "prompt": "a"}', "this is no JSON"),
        ("nothing", "this is no JSON"),
        ('"text"', 'this is "text", not a JSON object'),
        ('{"prompt": "a\\ud800", "label": "b"}', r'"\\ud800" is half a character; write the whole one'),
        ('{"prompt": "a", "label": ["b", "\\uDE00\\uD83D"]}', r'"\\ude00" is half a character'),
        ('{"prompt": "a", "label": "b", "n": ' + "9" * 5000 + "}", "a number of too many digits"),
        (
            '{"img": "a.png", "image": "b.png", "prompt": "a", "label": "b"}',
            "image and img are two names for one thing",
        ),
        ('{"prompt": "a", "question": "b", "label": "b"}', "prompt and question are two .* differ; keep one of them"),
        ('{"prompt": "a", "label": "b", "answer": null}', "label and answer are two names"),
        ('{"conversations": [{"from": "human", "role": "gpt", "value": "a"}]}', "from and role are two names"),
        ('{"img": "", "prompt": "a", "label": "b"}', 'the image is ""; write the path'),
        ('{"img": ["a.png"], "prompt": "a", "label": "b"}', r'the image is \["a.png"\]'),
        ('{"img": "https://x.org/a.png", "prompt": "a", "label": "b"}', "an address; download it and write the path"),
        ('{"img": "data:image/png;base64,AAAA", "prompt": "a", "label": "b"}', "an address"),
        ('{"image_path": "a.png", "prompt": "a", "label": "b"}', 'there is no img, but a key "image_path"'),
        ('{"img": "a.png", "label": "b"}', "there is no prompt; write one"),
        ('{"img": "a.png", "prompt": "a"}', "there is no label; write one"),
        ('{"img": "a.png", "prompt": " ", "label": "b"}', 'the prompt is " "; write a text that is not empty'),
        ('{"img": "a.png", "prompt": "a", "label": ""}', 'the label is ""; write a text that is not empty'),
        ('{"img": "a.png", "prompt": "a", "label": 3}', "the label is 3; write a text"),
        (
            '{"conversations": [["a", "b"]], "prompt": "c", "label": "d"}',
            "there is conversations and also prompt; keep",
        ),
        ('{"conversations": [["a", "b"]], "prompt": null, "answer": "d"}', "conversations and also answer; keep what"),
        ('{"conversations": []}', r"conversations is \[\]; write a list"),
        ('{"conversations": "a"}', 'conversations is "a"; write a list'),
        ('{"conversations": [["a", "b"], ["c"]]}', r'entry 2 of conversations is \["c"\]'),
        ('{"conversations": [["a", "b"], ["c", ""]]}', 'answer 2 of conversations is ""'),
        ('{"conversations": [{"role": "user", "content": "a"}]}', "ends with a question; write its answer too"),
        ('{"conversations": [{"role": "gpt", "content": "a"}]}', "message 1 of conversations .* by human or user"),
        (
            '{"conversations": [{"from": "human", "value": "a"}, 3]}',
            "message 2 of conversations is 3, but must be by gpt",
        ),
        ('{"conversations": [{"from": "human", "value": 1}, {"from": "gpt", "value": "a"}]}', "question 1 .* is 1"),
    ],
)
def test_what_is_wrong_with_a_row_is_told_by_its_line(write: Callable[..., RowIndex], row: str, message: str) -> None:
    index = write(lines(ROWS[:1]) + "\n" + row + "\n" + lines(ROWS[2:]))
    assert len(index) == 4
    told = fault(index, 1)
    assert told.startswith(f"{index.path}, line 3: ")
    with pytest.raises(DataError, match=message):
        check_rows(index)


def test_what_is_wrong_in_a_list_is_told_by_its_line(write: Callable[..., RowIndex]) -> None:
    index = write('[\n{"prompt": "a", "label": "b"},\n{"prompt":\n "a"},\n3,\n{"a": 1} {"b": 2},\n]')
    told = [
        "row 2 (line 3): there is no label",
        "row 3 (line 5): this is 3",
        "row 4 (line 6): this is no JSON (Extra data, at character 10)",
        "row 5 (line 7): this is no JSON",
    ]
    assert len(index) == 5
    for number, message in enumerate(told, 1):
        assert message in fault(index, number)


def test_rows_of_a_list_on_one_line_are_told_by_their_number(write: Callable[..., RowIndex]) -> None:
    index = write('[{"prompt": "a", "label": "b"}, {"prompt": "a"}, {"prompt": "a", "label": ""}]')
    assert fault(index, 1) == f"{index.path}, row 2: there is no label; write one, or conversations."
    with pytest.raises(DataError, match=r"2 bad rows of 3:\nrow 2: there is .*\nrow 3: the label is"):
        check_rows(index)


def test_one_thing_may_be_said_twice_alike(write: Callable[..., RowIndex]) -> None:
    row = {"img": "a.png", "image": "a.png", "prompt": "a", "question": "a", "label": ["b", "c"], "answer": ["b", "c"]}
    assert write(lines([row]))[0].turns == (("a", "b"),)


def test_whole_characters_may_be_escaped(write: Callable[..., RowIndex]) -> None:
    assert write('{"prompt": "\\ud83d\\ude00 \\\\ud800", "label": "b"}')[0].turns == (("😀 \\ud800", "b"),)


def test_bytes_that_are_no_text(write: Callable[..., RowIndex]) -> None:
    index = write(lines(ROWS[:1]).encode() + b'{"prompt": "\xff\xfe"}')
    assert "line 2: this is no JSON (not in UTF-8, at byte 13);" in fault(index, 1)


def test_places_in_a_line_do_not_contradict_that_of_the_line(write: Callable[..., RowIndex]) -> None:
    index = write(lines(ROWS[:1]) + '{"prompt": "a", "label": "b"\n' + lines(ROWS[:1]))
    assert "line 2: this is no JSON (Expecting ',' delimiter, at character 29); write" in fault(index, 1)


def test_messages_of_several_programs(write: Callable[..., RowIndex]) -> None:
    llava = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}]
    openai = [{"role": "user", "content": "what? <image>"}, {"role": "assistant", "content": "a cat"}]
    rows = [
        {"image": "a.png", "conversations": llava + openai},
        {"conversations": [{"from": "user", "value": "<image>\nwhat?"}, {"role": "assistant", "content": "none"}]},
    ]
    index = write(lines(rows))
    assert index[0].turns == (("what?", "a cat"), ("what? <image>", "a cat"))
    assert index[1].turns == (("<image>\nwhat?", "none"),)


# --- checking ---------------------------------------------------------------------------------------------------------


def test_bad_pictures_are_told_by_line(write: Callable[..., RowIndex], tmp_path: Path) -> None:
    whole = (tmp_path / "more" / "b.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[:-20])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    names = ["a.png", "cut.jpg", "text.png", "more/b.jpg", "gone.png", "more", "empty.png", "cut.jpg"]
    index = write(lines([{"img": name, "prompt": "a", "label": "b"} for name in names]))
    with pytest.raises(DataError) as raised:
        check_rows(index)
    first, *others = str(raised.value).splitlines()
    assert first == f"{index.path} has 6 bad rows of 8:"
    told = [("2", "damaged or cut short"), ("3", "not an image"), ("5", "does not exist"), ("6", "is a folder")]
    for other, (line, what) in zip(others, [*told, ("7", "is empty"), ("8", "damaged or cut short")], strict=True):
        assert other.startswith(f"line {line}: The image {tmp_path}") and what in other


def test_one_bad_row_is_one_sentence(write: Callable[..., RowIndex]) -> None:
    index = write(lines([*ROWS, {"img": "gone.png", "prompt": "a", "label": "b"}]))
    with pytest.raises(DataError) as raised:
        check_rows(index)
    gone = index.path.parent / "gone.png"
    assert str(raised.value) == f"{index.path}, line 5: The image {gone} does not exist; check the path."


def test_of_many_bad_rows_the_first_ten_are_told(write: Callable[..., RowIndex]) -> None:
    index = write("".join("{}\n" if number % 2 else lines(ROWS[2:3]) for number in range(300)))
    with pytest.raises(DataError) as raised:
        check_rows(index)
    first, *others = str(raised.value).splitlines()
    assert first == f"{index.path} has 150 bad rows of 300; the first 10:"
    assert [other.split(":")[0] for other in others] == [f"line {number}" for number in range(2, 22, 2)]


def test_rows_are_inspected_in_order_and_progress_is_reported(write: Callable[..., RowIndex]) -> None:
    index = write(lines(ROWS * 50))
    seen: list[int] = []
    reports: list[tuple[int, int]] = []

    def inspect(number: int, row: TrainingRow) -> None:
        seen.append(number)
        if number == 7:
            raise DataError("the question is too long.")

    with pytest.raises(DataError, match=r"rows\.jsonl, line 8: the question is too long\.$"):
        check_rows(index, inspect, report=lambda done, total: reports.append((done, total)))
    assert seen == list(range(200))
    assert reports[-1] == (200, 200) and len(reports) == 4


def test_a_file_that_changed_or_went_is_told(write: Callable[..., RowIndex]) -> None:
    index = write(lines(ROWS))
    index.path.write_text(lines(ROWS)[10:])
    assert "line 2: this is no JSON" in fault(index, 1)
    index.path.unlink()
    assert "cannot be read (No such file or directory)" in fault(index, 1)


# --- splitting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count, share, held", [(100, 0.1, 10), (20, 0.01, 1), (2, 0.9, 1), (1, 0.5, 0), (50, 0.0, 0)])
def test_rows_are_split_without_loss(count: int, share: float, held: int) -> None:
    train, validation = split_rows(count, share, seed=3)
    assert len(validation) == held
    assert sorted([*train, *validation]) == list(range(count))
    assert (np.diff(train) > 0).all() and (np.diff(validation) > 0).all()


def test_the_split_is_that_of_the_seed() -> None:
    splits = [split_rows(1000, 0.1, seed)[1].tolist() for seed in (1, 1, 2)]
    assert splits[0] == splits[1] != splits[2]
