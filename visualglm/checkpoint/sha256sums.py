"""`SHA256SUMS`: hashes of the files that it lies beside, for formats that have none; `sha256sum -c` reads it too."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from visualglm.checkpoint.checks import listed
from visualglm.checkpoint.files import require_file
from visualglm.checkpoint.listed_files import hash_files
from visualglm.errors import CheckpointError

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_LARGEST = 2**20


def sums(hashes: Mapping[str, str]) -> bytes:
    """The content of the file; hashes: in hex, by names of files."""
    return "".join(f"{value}  {name}\n" for name, value in hashes.items()).encode()


def require_unchanged(folder: Path, names: Collection[str]) -> None:
    """Raises `CheckpointError` if there is a `SHA256SUMS` in `folder` and these files are not as it says.

    Other files that it lists are not looked at.
    """
    file = folder / SUMS
    if not file.exists():
        return
    told = _read(file)
    unlisted = [name for name in names if name not in told]
    if unlisted:
        raise CheckpointError(f"{file} does not list {listed(unlisted)}; get it again, or remove it.")
    found = hash_files(folder, names, None)
    changed = [name for name in names if found[name] != told[name]]
    if changed:
        raise CheckpointError(
            f"{folder} is damaged: {listed(changed)} changed since {SUMS} was written; get it again, or remove that "
            "list if the change is meant."
        )


def _read(file: Path) -> dict[str, str]:
    """Hashes by names."""
    require_file(file)
    try:
        with open(file, "rb") as opened:
            lines = opened.read(_LARGEST).decode("utf-8", "replace").splitlines()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}).") from error
    found = [_LINE.fullmatch(line) for line in lines]
    if not all(found):
        raise CheckpointError(f"{file} is no list of SHA-256 as `sha256sum` writes it; get it again, or remove it.")
    return {match[2]: match[1] for match in found if match}
