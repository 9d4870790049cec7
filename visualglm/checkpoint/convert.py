"""From any format of checkpoint to any other, one tensor at a time and bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Literal

from visualglm.checkpoint.contents import Checkpoint
from visualglm.checkpoint.files import checked_path
from visualglm.checkpoint.foreign_config import HF_CONFIG, SAT_CONFIG
from visualglm.checkpoint.hf import HF, read_hf, write_hf
from visualglm.checkpoint.instead import kind_instead, require_model_folder
from visualglm.checkpoint.manifest import MANIFEST, Layout
from visualglm.checkpoint.mindformers import read_mindformers, repeated_bytes, write_mindformers
from visualglm.checkpoint.mindformers_keys import GLM
from visualglm.checkpoint.model_dir import fill_model_directory, open_model_directory, staged_checkpoint
from visualglm.checkpoint.progress import ByteProgress, Report
from visualglm.checkpoint.sat import SAT, read_sat, write_sat
from visualglm.errors import CheckpointError
from visualglm.processing.tokenizer import Tokenizer

Format = Literal["model", "sat", "hf", "mindformers"]


@dataclass(frozen=True)
class _Reader:
    format: Format
    title: str
    marker: str
    read: Callable[[Path], Checkpoint]


# A model directory has a config.json too, so that it comes before Hugging Face.
_READERS = (
    _Reader("model", "a model directory", MANIFEST, lambda path: open_model_directory(path).checkpoint),
    _Reader("sat", "a SAT archive", SAT_CONFIG.file_name, read_sat),
    _Reader("hf", "a Hugging Face checkpoint", HF_CONFIG.file_name, read_hf),
    _Reader("mindformers", "the files of MindFormers", GLM, read_mindformers),
)
_WRITERS: dict[Format, Callable[[Path, Checkpoint, ByteProgress], None]] = {
    "model": fill_model_directory,
    "sat": write_sat,
    "hf": write_hf,
    "mindformers": write_mindformers,
}
_FOREIGN = {"sat": SAT, "hf": HF}


@dataclass(frozen=True)
class Conversion:
    """What was read and written: `layout` is how the source packed ChatGLM's q, k and v, `dtype` is kept."""

    source: Path
    source_format: Format
    layout: Layout
    dtype: str
    parameter_count: int
    output: Path
    output_format: Format
    size_bytes: int
    has_tokenizer: bool
    dropped: tuple[str, ...]
    """Tensors of the source that the model does not compute with, and that the output has no place for."""
    license_text: str | None
    """To be shown to the user."""


def convert(
    source: Path | str,
    output: Path | str,
    *,
    to: Format = "model",
    tokenizer: Path | str | None = None,
    force: bool = False,
    report: Report | None = None,
) -> Conversion:
    """Convert the checkpoint in folder `source` into the new folder `output`, which appears whole or not at all.

    The format of `source` is recognised. `tokenizer` goes into the output, by default the one beside the weights.
    Raises `CheckpointError`, `ConfigError` or `TokenizerError` before anything is written if the source is not whole,
    and `CheckpointError` if the output cannot be written.
    """
    source, output = checked_path(source), checked_path(output)
    if to not in _WRITERS:
        raise CheckpointError(f"The format {to!r} is unknown; give one of {', '.join(_WRITERS)}.")
    _check_apart(source, output)
    reader = _recognise(source)
    checkpoint = _with_tokenizer(reader.read(source), tokenizer)
    repeated = repeated_bytes(checkpoint) if to == "mindformers" else 0
    progress = ByteProgress(checkpoint.size_bytes + repeated, report)
    with staged_checkpoint(output, checkpoint, force=force, repeated_bytes=repeated) as folder:
        _WRITERS[to](folder, checkpoint, progress)
    return Conversion(
        source=source,
        source_format=reader.format,
        layout="thirds" if reader.format == "model" else checkpoint.source.layout,
        dtype=checkpoint.config.dtype,
        parameter_count=sum(prod(tensor.shape) for tensor in checkpoint.tensors.values()),
        output=output,
        output_format=to,
        size_bytes=checkpoint.size_bytes,
        has_tokenizer=checkpoint.tokenizer_path is not None,
        dropped=tuple(_FOREIGN[to].dropped(checkpoint)) if to in _FOREIGN else (),
        license_text=checkpoint.license_text,
    )


def _recognise(source: Path) -> _Reader:
    require_model_folder(source)
    for reader in _READERS:
        if (source / reader.marker).is_file():
            return reader
    found = kind_instead(source)
    if found:
        raise CheckpointError(f"{source} {found[0]}, and a checkpoint is needed; {found[1]}.")
    wanted = ", ".join(f"{reader.marker} ({reader.title})" for reader in _READERS)
    raise CheckpointError(f"{source} is no checkpoint: none of {wanted} is there; give the folder that has one.")


def _check_apart(source: Path, output: Path) -> None:
    """The output would be deleted first, and the source with it."""
    if source.resolve().is_relative_to(output.resolve()):
        raise CheckpointError(f"{output} holds the checkpoint that is to be converted; give another folder.")


def _with_tokenizer(checkpoint: Checkpoint, tokenizer: Path | str | None) -> Checkpoint:
    path = checkpoint.tokenizer_path if tokenizer is None else checked_path(tokenizer)
    if path is None:
        return checkpoint
    Tokenizer.for_model(path, checkpoint.config.text)
    return replace(checkpoint, tokenizer_path=path)
