"""Files and folders that appear under their name whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from visualglm.checkpoint.tensors import PIECE_BYTES, Piece
from visualglm.errors import DISK_FULL, CheckpointError
from visualglm.memory import gib_apart

if sys.platform != "win32":
    import fcntl

_LONGEST_NAME = 100
# Twenty times the index of a model of MAX_LAYERS; more would only fill the memory.
_LARGEST_JSON = 64 * 2**20
_LOCK_POLL_SECONDS = 0.1
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises `CheckpointError` if it is missing, a git-lfs pointer, endless, or none."""
    require_file(path)
    try:
        with open(path, "rb") as file:
            content = file.read(_LARGEST_JSON + 1)
        if len(content) > _LARGEST_JSON:
            raise CheckpointError(
                f"{path} has {path.stat().st_size:,} bytes, and may have {_LARGEST_JSON:,}: it is no file of a "
                "checkpoint; get it again."
            )
        values = json.loads(content)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} holds no valid JSON ({error}); get it again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold one JSON object; get it again.")
    return values


def checked_path(path: object) -> Path:
    """`path`, given by a user as text, bytes or `os.PathLike`; raises `CheckpointError` if no file can have it."""
    if not isinstance(path, str | bytes | os.PathLike):
        raise CheckpointError(f"A path must be text, not {type(path).__name__}; give the path of a folder.")
    name = os.fsdecode(path)
    if not name:
        raise CheckpointError("The path is empty; give the path of a folder.")
    try:
        os.lstat(name)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"The path {readable(name)} cannot be used ({reason}); give another.") from error
    return Path(name)


def readable(name: str) -> str:
    """A name from a file or a user, fit for a message: not endless, and no control characters for the terminal."""
    return ascii(name[:_LONGEST_NAME]) if len(name) > _LONGEST_NAME or not name.isprintable() else name


def require_folder(path: Path) -> None:
    """Raises `CheckpointError` unless `path` is a folder."""
    if path.is_file():
        raise CheckpointError(f"{path} is a file; give the folder that holds the checkpoint.")
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; give the folder that holds the checkpoint.")


def require_file(path: Path) -> None:
    """Raises `CheckpointError` unless `path` is a file of its own, not a git-lfs pointer to one."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder and should be a file; get the checkpoint again.")
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; get the checkpoint again, or convert it again.")
    try:
        with open(path, "rb") as file:
            start = file.read(len(_LFS_POINTER))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from error
    if start == _LFS_POINTER:
        raise CheckpointError(
            f"{path} is only a git-lfs pointer, not the file itself; run `git lfs pull` where it came from, "
            "or download the file by hand."
        )


def is_plain_name(name: str) -> bool:
    """Whether `name` names something directly inside a folder, on any system."""
    return name not in ("", ".", "..") and not any(char in name for char in "/\\:\0")


def is_inside(name: str) -> bool:
    """Whether `name` names something inside a folder or the folders there, "/" between them, on any system."""
    return all(map(is_plain_name, name.split("/")))


def file_pieces(path: Path) -> Iterator[bytes]:
    """The bytes of a file; raises `CheckpointError` if it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            while piece := file.read(PIECE_BYTES):
                yield piece
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from error


def hash_pieces(pieces: Iterable[Piece]) -> str:
    """SHA-256 of `pieces` in hex."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def write_file(path: Path, pieces: Iterable[Piece]) -> str:
    """Write `pieces` to a new file, down to the disk; returns their SHA-256 in hex."""
    digest = hashlib.sha256()
    with open(path, "xb", buffering=0) as file:
        for piece in pieces:
            _write_all(file.fileno(), piece)
            digest.update(piece)
        os.fsync(file.fileno())
    return digest.hexdigest()


def replace_file(path: Path, pieces: Iterable[Piece]) -> None:
    """Write `pieces` to `path`, which is replaced when they are all on the disk; raises `OSError`."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write_file(beside, pieces)
        os.replace(beside, path)
    except OSError as error:
        # Users know nothing of the other name.
        if error.filename == str(beside):
            error.filename = str(path)
        raise
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def staged_folder(
    output: Path, *, needed_bytes: int, force: bool, require_replaceable: Callable[[Path], None]
) -> Iterator[Path]:
    """A folder to fill, which becomes `output` when the block ends well and is deleted when it does not.

    It lies beside `output`. A folder that is not empty is replaced only if `force` is set and `require_replaceable`
    raises no `CheckpointError` for it. What a killed process has left is cleared by the next one. Raises
    `CheckpointError` if `output` cannot be written, the disk has less than `needed_bytes` to spare or fills up.
    """
    output = output.resolve()
    _check_output(output, force, require_replaceable)
    _check_space(output.parent, needed_bytes)
    partial = output.with_name(f".{output.name}.partial")
    try:
        with locked_folder(partial):
            try:
                _clear(partial)
                yield partial
                _sync_folders(partial, *(path for path in partial.rglob("*") if path.is_dir()))
                _put_in_place(partial, output)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        raise CheckpointError(_writing_failed(output, error)) from error


def _write_all(descriptor: int, piece: Piece) -> None:
    view = memoryview(piece)
    while view:
        view = view[os.write(descriptor, view) :]


def _check_output(output: Path, force: bool, require_replaceable: Callable[[Path], None]) -> None:
    if not output.parent.is_dir():
        raise CheckpointError(f"{output.parent} does not exist; create the folder {output.name} shall lie in.")
    if not output.exists():
        return
    if not output.is_dir():
        raise CheckpointError(f"{output} is a file; give the name of a new folder.")
    if os.path.ismount(output):
        raise CheckpointError(f"{output} is a mount point, which cannot be replaced; give a new folder inside it.")
    if not any(output.iterdir()):
        return
    if not force:
        raise CheckpointError(f"{output} is not empty; give another folder, or --force to replace it.")
    require_replaceable(output)


def _check_space(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        needed, left = gib_apart(needed_bytes, free)
        raise CheckpointError(
            f"Writing needs {needed}, but {folder} has {left} free; make room or give a folder on another disk."
        )


@contextmanager
def locked_folder(folder: Path, *, patience: float = 0.0) -> Iterator[None]:
    """Create `folder` if need be, and hold it against other processes as long as this one lives.

    Raises `CheckpointError` if another one holds it, also after `patience` seconds. Where the file system has no locks,
    two processes at once go unnoticed.
    """
    folder.mkdir(exist_ok=True)
    if sys.platform == "win32":
        yield
        return
    # Whatever a link points to is not ours to clear.
    descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        _lock(descriptor, folder, time.monotonic() + patience)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Hold the file `path`, which is made for it, against other processes; waits for one that holds it.

    Where the file system has no locks, two processes at once go unnoticed.
    """
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path, deadline: float) -> None:
    try:
        while not _is_taken(descriptor) and time.monotonic() < deadline:
            time.sleep(_LOCK_POLL_SECONDS)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        message = f"Another process is writing {folder}; wait for it, or give another folder."
        raise CheckpointError(message) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _is_taken(descriptor: int) -> bool:
    """Whether the lock is this process's now."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _sync_folders(*folders: Path) -> None:
    """Bring the names in `folders` down to the disk, where a system can do that."""
    if sys.platform == "win32":
        return
    for folder in folders:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _put_in_place(partial: Path, output: Path) -> None:
    replaced = output.with_name(f".{output.name}.replaced")
    if output.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        output.rename(replaced)
    try:
        partial.rename(output)
    except OSError:
        if replaced.exists():
            replaced.rename(output)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    _sync_folders(output.parent)


def _writing_failed(output: Path, error: OSError) -> str:
    if error.errno in DISK_FULL:
        return f"The disk is full: {output} could not be written and nothing of it is left; make room and try again."
    return f"{output} could not be written ({error.strerror}) and nothing of it is left."
