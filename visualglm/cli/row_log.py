"""A JSONL file that rows are appended to, and that a later run goes on with, whatever ended the one before."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from visualglm.checkpoint.files import write_file
from visualglm.errors import DISK_FULL, DataError

if sys.platform != "win32":
    import fcntl

Values = Mapping[str, Any]

_VERSION = 2
_ELSE = "give another --output, or --overwrite to begin anew"


class RowLog:
    """The file `path`, and beside it `path`.meta.json with `origin`: what all of its rows are made with.

    With `overwrite` it begins anew, but not before there are rows to append. Raises `DataError` if the file is in use,
    cannot be written, its rows were made with something else, or a file of another kind has the name of the second.
    """

    def __init__(self, path: Path, origin: Values, *, overwrite: bool = False) -> None:
        self.path = path
        self.row_count = 0
        """Rows that are there, as far as they were read or written here."""
        if not path.name or (path.exists() and not path.is_file()):
            raise DataError(f"{path} is no regular file; give the name of a file as --output.")
        self._sidecar = sidecar_of(path)
        self._origin: dict[str, Any] = json.loads(json.dumps({"version": _VERSION, **origin}))
        with self._writing():
            self._check_sidecar()
            self._is_new = not path.exists()
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115
            try:
                self._lock()
                self._begun = not overwrite and self._size() > 0
                if self._begun:
                    self._check_origin()
            except BaseException:
                self._file.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._is_new and not self._size():
                if sys.platform == "win32":
                    self._file.close()
                # Before another process can lock it; and a link stays, as it was not made here.
                self.path.resolve().unlink(missing_ok=True)
        finally:
            self._file.close()

    def resume(self, expected: Iterable[Values]) -> list[bool]:
        """Compare the rows there are with those `expected`, which they hold and add to; cut off a torn last line.

        Returns for each row that is there whether it is an error. Raises `DataError` at the first that is not as
        expected.
        """
        failed: list[bool] = []
        if not self._begun:
            return failed
        with self._writing():
            for number, (line, row) in enumerate(zip_longest(self._whole_lines(), expected), 1):
                if line is None:
                    break
                found = _parse(line)
                if row is None or found is None or any(found.get(name) != value for name, value in row.items()):
                    raise DataError(f"{self.path}, line {number} is not of row {number} of this input; {_ELSE}.")
                failed.append("error" in found)
        self.row_count = len(failed)
        return failed

    def append(self, rows: Sequence[Values]) -> None:
        """Add rows, down to the disk, all of them or none; raises `DataError` if they cannot be written."""
        with self._writing():
            if not self._begun:
                self._begin()
            size = self._size()
            try:
                rest = memoryview(b"".join(map(_line, rows)))
                while rest:
                    rest = rest[self._file.write(rest) :]
                os.fsync(self._file.fileno())
            except OSError:
                self._file.truncate(size)
                raise
        self.row_count += len(rows)

    def _begin(self) -> None:
        temporary = self._sidecar.with_name(f".{self._sidecar.name}.tmp")
        temporary.unlink(missing_ok=True)
        try:
            write_file(temporary, [json.dumps(self._origin, ensure_ascii=False, indent=2).encode()])
            # The old sidecar goes before the rows: old ones must not be taken for new ones.
            self._sidecar.unlink(missing_ok=True)
            self._file.truncate(0)
            os.replace(temporary, self._sidecar)
        finally:
            temporary.unlink(missing_ok=True)
        self._begun = True

    def _lock(self) -> None:
        """Hold the file against other processes as long as it is open, where a system can do that."""
        if sys.platform == "win32":
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"Another process is writing {self.path}; wait for it, or give another --output.") from None
        except OSError:
            # A file system without locks, as networks have them.
            return
        if not os.fstat(self._file.fileno()).st_nlink:
            raise DataError(f"Another process has just removed {self.path}; try again.")

    def _check_sidecar(self) -> None:
        """A file that is no sidecar must not be replaced by one."""
        if not self._sidecar.exists():
            return
        found = _parse(self._sidecar.read_bytes()) if self._sidecar.is_file() else None
        if found is None or "version" not in found:
            raise DataError(
                f"{self._sidecar} would be replaced, but it does not belong to {self.path}; "
                "move it away, or give another --output."
            )

    def _check_origin(self) -> None:
        found = _parse(self._sidecar.read_bytes()) if self._sidecar.is_file() else None
        if found is None:
            raise DataError(f"{self.path} is there already, but no {self._sidecar.name} to go on from; {_ELSE}.")
        for name, value in self._origin.items():
            if found.get(name) != value:
                raise DataError(
                    f"{self.path} was begun with the {name} {found.get(name)!r}, and now it is {value!r}; "
                    f"go on as it was begun, {_ELSE}."
                )

    def _whole_lines(self) -> Iterator[bytes]:
        whole = 0
        with open(self.path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    self._file.truncate(whole)
                    return
                whole += len(line)
                yield line

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            remedy = "check the folder, or give another --output"
            if error.errno in DISK_FULL:
                remedy = "what is in it is whole; make room, and the same command goes on"
            raise DataError(f"{self.path} cannot be written ({error.strerror}); {remedy}.") from error


def require_apart(output: Path, *inputs: Path) -> None:
    """Raises `DataError` if `output` is no file that answers can be kept in, or would be written over an input."""
    if output.name in ("", "-"):
        raise DataError("The answers go to a file, so that they can be gone on with; give its name as --output.")
    for written in (output, sidecar_of(output)):
        if any(written.exists() and source.exists() and written.samefile(source) for source in inputs):
            raise DataError(f"{written} is the input; give another --output.")


def sidecar_of(path: Path) -> Path:
    """The file beside `path` that tells what its rows are made with."""
    return path.with_name(f"{path.name}.meta.json")


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _line(row: Values) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        # A file name that is no UTF-8.
        return json.dumps(row).encode() + b"\n"
