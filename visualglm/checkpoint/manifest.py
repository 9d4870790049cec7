"""`manifest.json`: what a folder that this program made holds, with hashes, and where it came from."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from visualglm.checkpoint.files import is_inside, is_plain_name, read_json_object, readable
from visualglm.errors import CheckpointError
from visualglm.faults import first_fault

MANIFEST = "manifest.json"
_FINGERPRINTED = re.compile(r"config\.json|model(-\d+-of-\d+)?\.safetensors")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

Layout = Literal["thirds", "per_head"]
"""How a foreign checkpoint packs ChatGLM's q, k and v: one after the other, or head by head."""


class MergedAdapter(BaseModel):
    """An adapter that was merged into a model, and that model, by their fingerprints."""

    model_config = ConfigDict(frozen=True)

    base: Sha256
    adapter: Sha256
    adapter_name: str


class Source(BaseModel):
    """Where a model came from, and what it takes to write it back as it was. Other facts may be added."""

    model_config = ConfigDict(frozen=True, extra="allow")

    format: str
    """`sat` and `hf` for converted checkpoints; what makes models itself gives another name."""
    layout: Layout = "thirds"
    config: dict[str, Any] | None = None
    """The foreign configuration file as it was."""
    merged: tuple[MergedAdapter, ...] | None = None
    """What was added to the model since, the latest last."""


class FileRecord(BaseModel):
    """Hash and size in bytes of one file."""

    model_config = ConfigDict(frozen=True)

    sha256: Sha256
    size: NonNegativeInt


@dataclass(frozen=True)
class FolderKind:
    """What a folder with a manifest is, and how users come by one."""

    format: str | None
    """`format` in the manifest; model directories have none."""
    version: int
    """The newest that this program reads."""
    title: str
    command: str
    remedy: str
    use: str | None = None
    """What to do with one that is given where another kind is needed; None: give one of that kind."""
    has_folders: bool = False
    """Whether some of its files lie in folders inside."""

    @property
    def name(self) -> str:
        """The title without its article."""
        return self.title.partition(" ")[2]


MODEL = FolderKind(None, 1, "a model directory", "visualglm convert", "convert the checkpoint again")
ONNX_EXPORT = FolderKind("visualglm-onnx", 1, "an ONNX export", "visualglm export", "export the model again")
MINDIR_EXPORT = FolderKind(
    "visualglm-mindir",
    1,
    "a MindIR export",
    "visualglm export --format mindir",
    "export the model again",
    has_folders=True,
)
ADAPTER = FolderKind(
    "visualglm-adapter",
    1,
    "an adapter",
    "visualglm finetune",
    "train or convert it again",
    "give it as --adapter, beside the model that it belongs to",
)
_KINDS = {kind.format: kind for kind in (MODEL, ONNX_EXPORT, MINDIR_EXPORT, ADAPTER)}


def kind_of(folder: Path) -> FolderKind | None:
    """What the manifest in `folder` says that it is; None without one that this program knows."""
    try:
        return _kind_in(read_json_object(folder / MANIFEST))
    except CheckpointError:
        return None


class FolderManifest(BaseModel):
    """What the manifests of all kinds of folders hold."""

    model_config = ConfigDict(frozen=True)
    kind: ClassVar[FolderKind]

    format_version: Annotated[int, Field(strict=True, ge=1)] = 1
    parameter_count: NonNegativeInt
    source: Source
    files: dict[str, FileRecord]

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Raises `CheckpointError` if the file is missing, malformed, of a newer version or another kind of folder, or
        names outside paths."""
        values = read_json_object(path)
        _check_kind(path.parent, values, cls.kind)
        try:
            manifest = cls.model_validate(values)
        except ValidationError as error:
            raise CheckpointError(f"{path} is not valid: {first_fault(error)}; {cls.kind.remedy}.") from error
        lies_inside = is_inside if cls.kind.has_folders else is_plain_name
        outside = [name for name in manifest.files if not lies_inside(name)]
        if outside:
            raise CheckpointError(f"{path} names a file outside its folder, {readable(outside[0])}; do not use it.")
        return manifest

    def to_json(self) -> bytes:
        """As `from_file` reads it."""
        return json.dumps(self.model_dump(), indent=2).encode()


class Manifest(FolderManifest):
    """The manifest of a model directory."""

    kind = MODEL

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hex over the hashes of configuration and weights: the same for the same model, whatever its
        tokenizer, licence text or origin."""
        lines = [f"{name} {self.files[name].sha256}\n" for name in sorted(self.files) if _FINGERPRINTED.fullmatch(name)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def _kind_in(values: dict[str, Any]) -> FolderKind | None:
    found = values.get("format")
    return _KINDS.get(found) if isinstance(found, str | None) else None


def _check_kind(folder: Path, values: dict[str, Any], wanted: FolderKind) -> None:
    known = _kind_in(values)
    if known is None:
        raise CheckpointError(
            f"{folder} has the format {readable(str(values['format']))}, which this program does not know; "
            f"install a newer visualglm, or give {wanted.title} made by `{wanted.command}`."
        )
    if known is not wanted:
        remedy = known.use or f"give one made by `{wanted.command}`"
        raise CheckpointError(f"{folder} is {known.title}, and {wanted.title} is needed; {remedy}.")
    version = values.get("format_version")
    if isinstance(version, int) and version > wanted.version:
        raise CheckpointError(
            f"{folder} has format version {version}, and this program reads up to {wanted.version}; "
            "install a newer visualglm."
        )
