"""Rows to train on, in a JSONL file or a JSON list: found by their place in the file, each read when asked for."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from visualglm.errors import DataError, ImageError
from visualglm.json_lines import either, image_of, is_address, json_object, shown
from visualglm.processing.image import check_image
from visualglm.processing.prompt import Turn

Report = Callable[[int, int], None]
"""Called with the rows done and the rows in all."""

_LIST = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[")
_LIST_PART = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[\]{},]', re.DOTALL)
_LIST_END = re.compile(rb"\s*\]\s*\Z")
_BLANKS = re.compile(rb"\s*")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
# Where other programs keep what is called "img" here: such a row is not meant to go without its picture.
_LIKE_AN_IMAGE = re.compile("ima?g|pic|photo", re.IGNORECASE)
_PLACEHOLDER = re.compile(r"^<image>\n?|\n?<image>$")
_ONE_TURN = ("prompt", "question", "label", "answer")
_KINDS = ("question", "answer")
_SPEAKERS = (("human", "user"), ("gpt", "assistant"))
_ROWS_AT_ONCE = 64
_THREADS = 4
_SHOWN_FAULTS = 10


@dataclass(frozen=True)
class TrainingRow:
    """Questions and answers about one image, or about none.

    `image` is as the file names it, `source` is where that lies: relative to the folder of the file. The label of a row
    may list several answers of equal right: the first is learnt, the others are `alternatives` for an evaluation.
    """

    image: str | None
    source: Path | None
    turns: tuple[Turn, ...]
    alternatives: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class RowIndex:
    """Where each row of a file lies. Small (24 bytes a row), and the same in every process that it is sent to.

    sha256: of the whole file, so that a resumed run can tell whether it is still the same.
    places: int64 [rows, 3], of each row its first byte, the byte after its last, and its line counted from 1
    is_list: whether the file is a JSON list
    """

    path: Path
    sha256: str
    places: NDArray[np.int64]
    is_list: bool

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> TrainingRow:
        """Read a row; raises `DataError` naming its line if it is malformed."""
        start, stop, _ = self.places[number]
        try:
            with open(self.path, "rb") as file:
                file.seek(start)
                text = file.read(stop - start)
        except OSError as error:
            raise _unreadable(self.path, error) from error
        where = self.where(number)
        return _row(where, json_object(where, text), self.path.parent)

    def where(self, number: int) -> str:
        """ "FILE, line N" of a row, for messages; in a list, of which one line may hold many, "FILE, row N"."""
        line = self.places[number, 2]
        if not self.is_list:
            return f"{self.path}, line {line}"
        return f"{self.path}, row {number + 1}" + (f" (line {line})" if self.places[-1, 2] > 1 else "")


def open_rows(path: Path) -> RowIndex:
    """Find the rows of a file; raises `DataError` if it cannot be read, has none, or is a JSON list without an end."""
    if not path.is_file():
        fault = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"{path} {fault}; give a file of rows, as JSONL or a JSON list.")
    try:
        with open(path, "rb") as file:
            is_list, found = _places(path, file)
            places = np.fromiter(chain.from_iterable(found), np.int64).reshape(-1, 3)
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error
    if not len(places):
        raise DataError(f'{path} has no rows; write {{"img": …, "prompt": …, "label": …}} on each line.')
    return RowIndex(path, sha256, places, is_list)


def check_rows(
    index: RowIndex, inspect: Callable[[int, TrainingRow], None] | None = None, *, report: Report | None = None
) -> None:
    """Read every row and every image; raises one `DataError` with the first ten bad rows by line, and their number.

    inspect: called in order with the number of each row and the row, also to raise `DataError` for it.
    """
    faults: dict[int, str] = {}
    images: dict[Path, str] = {}  # what is wrong with it, or nothing

    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(index), _ROWS_AT_ONCE):
            numbers = range(start, min(start + _ROWS_AT_ONCE, len(index)))
            rows = dict(_readable_rows(index, numbers, faults))
            new = {row.source for row in rows.values() if row.source is not None} - images.keys()
            images |= zip(new, pool.map(_image_fault, new), strict=True)
            for number, row in rows.items():
                fault = (images[row.source] if row.source else "") or _inspection_fault(inspect, number, row)
                if fault:
                    faults[number] = f"{index.where(number)}: {fault}"
            if report:
                report(numbers.stop, len(index))
    if faults:
        raise DataError(_told(index, [faults[number] for number in sorted(faults)]))


def split_rows(count: int, held_out: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of the rows to train on and of those held out for validation, each in rising order.

    A share above 0 holds out at least one row, and leaves at least one to train on.
    """
    wanted = max(1, round(count * held_out)) if held_out else 0
    order = np.random.default_rng(seed).permutation(count)
    cut = min(wanted, count - 1)
    return np.sort(order[cut:]), np.sort(order[:cut])


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be read ({error.strerror}); check its permissions.")


# --- where rows are ---------------------------------------------------------------------------------------------------


def _places(path: Path, file: BinaryIO) -> tuple[bool, Iterator[tuple[int, int, int]]]:
    """Whether the file is a list; and first byte, byte after the last, and line of each row."""
    if os.fstat(file.fileno()).st_size == 0:
        return False, iter(())
    data = mmap(file.fileno(), 0, access=ACCESS_READ)
    if data[:2] in _UTF16:
        raise DataError(f"{path} is in UTF-16; save it as UTF-8.")
    opening = _LIST.match(data)
    if opening is None:
        return False, _line_places(file)
    if _LIST_END.match(data, opening.end()):
        return True, iter(())
    return True, _list_places(path, data, opening.end())


def _line_places(file: BinaryIO) -> Iterator[tuple[int, int, int]]:
    start = 0
    for number, line in enumerate(file, 1):
        if line.strip():
            yield start, start + len(line), number
        start += len(line)


def _list_places(path: Path, data: mmap, start: int) -> Iterator[tuple[int, int, int]]:
    """The elements of a JSON list, by the cuts between them; each is found to be JSON or not when it is asked for."""
    line = 1 + data[:start].count(b"\n")
    for stop in _list_cuts(data, start):
        first = _after_blanks(data, start)
        line += data[start:first].count(b"\n")
        yield first, stop, line
        line += data[first:stop].count(b"\n")
        start = stop + 1
    rest = _after_blanks(data, start)
    line += data[start:rest].count(b"\n")
    if data[start - 1 : start] != b"]":
        raise DataError(f"{path}, line {line}: the row that begins here, or the list of rows, is not closed; mend it.")
    if rest < len(data):
        raise DataError(f"{path}, line {line}: something follows the list of rows; write one list, or JSONL.")


def _list_cuts(data: mmap, start: int) -> Iterator[int]:
    """Where the commas between the elements of a JSON list are, and the bracket that closes it."""
    depth = 0
    for part in _LIST_PART.finditer(data, start):
        mark = part[0]
        if mark in (b"{", b"["):
            depth += 1
        elif mark in (b"}", b"]"):
            depth -= 1
        if depth < 0 or (mark == b"," and not depth):
            yield part.start()
        if depth < 0:
            return


def _after_blanks(data: mmap, start: int) -> int:
    blanks = _BLANKS.match(data, start)
    return blanks.end() if blanks else start


# --- what a row says --------------------------------------------------------------------------------------------------


def _row(where: str, values: dict[str, Any], folder: Path) -> TrainingRow:
    image = image_of(where, values)
    if image is None:
        _require_no_image(where, values)
    elif is_address(image):
        raise DataError(
            f"{where}: the image is {shown(image)}, an address; download it and write the path of the file."
        )
    source = None if image is None else folder / image
    if "conversations" in values:
        _require_only_conversations(where, values)
        return TrainingRow(image, source, _conversation(where, values["conversations"], has_image=image is not None))
    question = _checked_text(where, "the prompt", _value(where, "prompt", values, "question"))
    answer, *alternatives = _answers(where, _value(where, "label", values, "answer"))
    return TrainingRow(image, source, ((question, answer),), tuple(alternatives))


def _require_only_conversations(where: str, values: dict[str, Any]) -> None:
    other = next((key for key in _ONE_TURN if values.get(key) is not None), None)
    if other is not None:
        raise DataError(f"{where}: there is conversations and also {other}; keep what is to be learnt, not both.")


def _answers(where: str, label: object) -> list[str]:
    answers = label if isinstance(label, list) and label else [label]
    return [_checked_text(where, "the label", answer) for answer in answers]


def _require_no_image(where: str, values: dict[str, Any]) -> None:
    meant = next((key for key in values if _LIKE_AN_IMAGE.match(key) and values[key]), None)
    if meant is not None:
        raise DataError(
            f"{where}: there is no img, but a key {shown(meant)}; name the picture's path img, or leave that key out "
            "in a row of text alone."
        )


def _value(where: str, name: str, values: dict[str, Any], other_name: str) -> object:
    if name not in values and other_name not in values:
        raise DataError(f"{where}: there is no {name}; write one, or conversations.")
    return either(where, values, name, other_name)


def _checked_text(where: str, what: str, text: object) -> str:
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: {what} is {shown(text)}; write a text that is not empty.")
    return text


def _conversation(where: str, messages: object, *, has_image: bool) -> tuple[Turn, ...]:
    """Turns from pairs of texts, or from messages whose speakers take turns, beginning with a question."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: conversations is {shown(messages)}; write a list of questions and answers.")
    if all(isinstance(message, list) for message in messages):
        texts = _texts_of_pairs(where, messages)
    else:
        texts = [_message(where, place, message) for place, message in enumerate(messages)]
    if len(texts) % 2:
        raise DataError(f"{where}: conversations ends with a question; write its answer too.")
    if has_image and isinstance(texts[0], str):
        # Other programs mark in the text where the picture goes; here it always comes first.
        texts[0] = _PLACEHOLDER.sub("", texts[0], count=1)
    for place, text in enumerate(texts):
        _checked_text(where, f"{_KINDS[place % 2]} {place // 2 + 1} of conversations", text)
    return tuple(zip(texts[::2], texts[1::2], strict=True))


def _texts_of_pairs(where: str, pairs: Sequence[list[Any]]) -> list[Any]:
    for number, pair in enumerate(pairs, 1):
        if len(pair) != 2:
            raise DataError(
                f"{where}: entry {number} of conversations is {shown(pair)}; write a question and an answer."
            )
    return [text for pair in pairs for text in pair]


def _message(where: str, place: int, message: object) -> Any:
    values = message if isinstance(message, dict) else {}
    speaker, text = (either(where, values, *names) for names in (("from", "role"), ("value", "content")))
    if speaker not in _SPEAKERS[place % 2]:
        raise DataError(
            f"{where}: message {place + 1} of conversations is {shown(message)}, but must be by "
            f"{' or '.join(_SPEAKERS[place % 2])}; let questions and answers take turns."
        )
    return text


# --- what is wrong with rows ------------------------------------------------------------------------------------------


def _readable_rows(
    index: RowIndex, numbers: Sequence[int], faults: dict[int, str]
) -> Iterator[tuple[int, TrainingRow]]:
    """The rows of `numbers` that are well formed; `faults` gets what is wrong with the others."""
    for number in numbers:
        try:
            yield number, index[number]
        except DataError as error:
            faults[number] = str(error)


def _image_fault(image: Path) -> str:
    try:
        check_image(image)
    except ImageError as error:
        return str(error)
    return ""


def _inspection_fault(inspect: Callable[[int, TrainingRow], None] | None, number: int, row: TrainingRow) -> str:
    try:
        if inspect:
            inspect(number, row)
    except DataError as error:
        return str(error)
    return ""


def _told(index: RowIndex, faults: Sequence[str]) -> str:
    if len(faults) == 1:
        return faults[0]
    shown_faults = [fault.removeprefix(f"{index.path}, ") for fault in faults[:_SHOWN_FAULTS]]
    first = f"; the first {_SHOWN_FAULTS}" if len(faults) > _SHOWN_FAULTS else ""
    return f"{index.path} has {len(faults)} bad rows of {len(index)}{first}:\n" + "\n".join(shown_faults)
