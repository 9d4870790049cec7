"""`manifest.json`: what a model directory holds, with hashes, and where it came from."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from visualglm.checkpoint.files import is_plain_name, read_json_object, readable
from visualglm.errors import CheckpointError
from visualglm.faults import first_fault

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_FINGERPRINTED = re.compile(r"config\.json|model(-\d+-of-\d+)?\.safetensors")

Layout = Literal["thirds", "per_head"]
"""How a foreign checkpoint packs ChatGLM's q, k and v: one after the other, or head by head."""


class Source(BaseModel):
    """Where a model came from, and what it takes to write it back as it was. Other facts may be added."""

    model_config = ConfigDict(frozen=True, extra="allow")

    format: str
    """`sat` and `hf` for converted checkpoints; what makes models itself gives another name."""
    layout: Layout = "thirds"
    config: dict[str, Any] | None = None
    """The foreign configuration file as it was."""


class FileRecord(BaseModel):
    """Hash and size in bytes of one file."""

    model_config = ConfigDict(frozen=True)

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size: NonNegativeInt


class Manifest(BaseModel):
    """The contents of `manifest.json`."""

    model_config = ConfigDict(frozen=True)

    format_version: int = FORMAT_VERSION
    parameter_count: NonNegativeInt
    source: Source
    files: dict[str, FileRecord]

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hex over the hashes of configuration and weights: the same for the same model, whatever its
        tokenizer, licence text or origin."""
        lines = [f"{name} {self.files[name].sha256}\n" for name in sorted(self.files) if _FINGERPRINTED.fullmatch(name)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Raises `CheckpointError` if the file is missing, malformed, of a newer version, or names outside paths."""
        values = read_json_object(path)
        version = values.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise CheckpointError(
                f"{path.parent} has format version {version}, and this program reads up to {FORMAT_VERSION}; "
                "install a newer visualglm."
            )
        try:
            manifest = cls.model_validate(values)
        except ValidationError as error:
            message = f"{path} is not valid: {first_fault(error)}; convert the checkpoint again."
            raise CheckpointError(message) from error
        outside = [name for name in manifest.files if not is_plain_name(name)]
        if outside:
            raise CheckpointError(f"{path} names a file outside its folder, {readable(outside[0])}; do not use it.")
        return manifest
