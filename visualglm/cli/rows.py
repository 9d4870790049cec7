"""The rows that `caption` answers: images of a folder, or lines of a JSONL file. Never all in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visualglm.errors import DataError
from visualglm.json_lines import image_of, image_source, json_lines, shown

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


@dataclass(frozen=True)
class Row:
    """One question. `image` is as the input names it, `source` is where that lies; both None without an image."""

    image: str | None
    source: str | None
    prompt: str
    id: str | int | None = None

    def named(self) -> dict[str, Any]:
        """The part of the output row that comes from the input."""
        given = {} if self.id is None else {"id": self.id}
        return {**given, "image": self.image, "prompt": self.prompt}


@dataclass(frozen=True)
class FolderRows:
    """The images of a folder, sorted by name."""

    folder: Path
    names: tuple[str, ...]
    prompt: str

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Row]:
        return (Row(name, str(self.folder / name), self.prompt) for name in self.names)


@dataclass(frozen=True)
class JsonLines:
    """The lines of a JSONL file, blank ones left out."""

    path: Path
    count: int
    prompt: str

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Row]:
        return _parsed(self.path, self.prompt)


Rows = FolderRows | JsonLines


def read_rows(path: Path, prompt: str, *, recursive: bool = False) -> Rows:
    """The rows of a folder or a JSONL file, every line checked; rows without a prompt of their own get `prompt`.

    Raises `DataError` if there are none, or naming the first line that is malformed.
    """
    if path.is_dir():
        return _folder_rows(path, prompt, recursive)
    if not path.is_file():
        raise DataError(f"{path} is neither a folder nor a file; give a folder of images or a JSONL file.")
    count = sum(1 for _ in _parsed(path, prompt))
    if not count:
        raise DataError(f"{path} has no rows; write one JSON object with an image on each line.")
    return JsonLines(path, count, prompt)


def _folder_rows(folder: Path, prompt: str, recursive: bool) -> FolderRows:
    found = (path.relative_to(folder) for path in folder.glob("**/*" if recursive else "*") if path.is_file())
    names = sorted(
        path.as_posix()
        for path in found
        if path.suffix.lower() in IMAGE_SUFFIXES and not any(part.startswith(".") for part in path.parts)
    )
    if not names:
        deeper = "" if recursive else "; --recursive looks into its folders too"
        raise DataError(f"{folder} holds no image ({', '.join(IMAGE_SUFFIXES)}){deeper}.")
    return FolderRows(folder, tuple(names), prompt)


def _parsed(path: Path, prompt: str) -> Iterator[Row]:
    return (_row(where, values, path.parent, prompt) for where, values in json_lines(path))


def _row(where: str, values: dict[str, Any], folder: Path, prompt: str) -> Row:
    image = image_of(where, values)
    question = values.get("prompt", prompt)
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{where}: the prompt is {shown(question)}; write a question, or leave it out.")
    if image is None and "prompt" not in values:
        raise DataError(f"{where}: there is neither an image nor a prompt; write at least one of them.")
    identity = values.get("id")
    if identity is not None and (not isinstance(identity, str | int) or isinstance(identity, bool)):
        raise DataError(f"{where}: the id is {shown(identity)}; write a text or a whole number.")
    return Row(image, None if image is None else image_source(folder, image), question, identity)
