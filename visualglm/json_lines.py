"""Lines of JSON objects about pictures, read one by one; what is wrong with one is told with its number."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from visualglm.errors import DataError

_NO_PATH = re.compile(r"data:|[A-Za-z][A-Za-z0-9+.-]*://", re.IGNORECASE)
_ESCAPED_HALF = re.compile(rb"\\u[dD][89a-fA-F]")
_HALF = re.compile("[\ud800-\udfff]")


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where a line stands, in words, and its object; blank lines are left out.

    Raises `DataError` if the file cannot be read, or naming the first line that is no JSON object.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield where, json_object(where, line)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error


def json_object(where: str, line: bytes) -> dict[str, Any]:
    """The object in one line of UTF-8; raises `DataError` if there is none, or one with half a character in it."""
    try:
        values = json.loads(line.decode("utf-8-sig").rstrip(" \t\r\n"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: this is no JSON ({_reason(error)}); write one JSON object on each line.") from error
    if not isinstance(values, dict):
        raise DataError(f"{where}: this is {shown(values)}, not a JSON object; write one object on each line.")
    # Only an escape can hold half a character: the bytes themselves were found to be UTF-8.
    half = _HALF.search(json.dumps(values, ensure_ascii=False)) if _ESCAPED_HALF.search(line) else None
    if half:
        raise DataError(f"{where}: {json.dumps(half[0])} is half a character; write the whole one, or leave it out.")
    return values


def either(where: str, values: dict[str, Any], name: str, other: str) -> Any:
    """What stands under one of two names for the same thing, or None; raises `DataError` if both do and differ."""
    if name in values and other in values and values[name] != values[other]:
        raise DataError(f"{where}: {name} and {other} are two names for one thing, and differ; keep one of them.")
    return values.get(name, values.get(other))


def image_of(where: str, values: dict[str, Any]) -> str | None:
    """The image that a line names, under "image" or "img"; raises `DataError` if that is no name, or there are two."""
    image = either(where, values, "image", "img")
    if image is not None and (not isinstance(image, str) or not image):
        raise DataError(f"{where}: the image is {shown(image)}; write the path of a file.")
    return image


def is_address(image: str) -> bool:
    """Whether an image is named by a URL or given as a `data:` URL, and not by a path."""
    return bool(_NO_PATH.match(image))


def image_source(folder: Path, image: str) -> str:
    """Where an image lies that is named in a file in `folder`."""
    return image if is_address(image) else str(folder / image)


def shown(value: object) -> str:
    """A value of JSON, in a message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _reason(error: ValueError | RecursionError) -> str:
    """Why the text of one object is no JSON; the line in the file is told elsewhere."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, at character {error.pos + 1}"
    if isinstance(error, UnicodeDecodeError):
        return f"not in UTF-8, at byte {error.start + 1}"
    return "nested too deep" if isinstance(error, RecursionError) else "a number of too many digits"
