"""SentencePiece model files as bytes: reading one with plain words for what is wrong, a copy without some pieces."""

from __future__ import annotations

import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from visualglm.errors import TokenizerError
from visualglm.protobuf import LENGTH_DELIMITED, fields, head

RELEASED_SHA256 = "5e974d9a69c242ce014c88c2b26089270f6198f3c0b700a887666cd3e816f17e"
RELEASED_SIZE = 2706249
REMEDY = (
    f"put the released ice_text.model ({RELEASED_SIZE} bytes, sha256 {RELEASED_SHA256}), "
    "or the tokenizer.model your model was trained with, in its place"
)

_SIZE_LIMIT = 64 * 2**20
_PIECE, _TRAINER_SPEC, _NORMALIZER_SPEC = 1, 2, 3
_NAME = 1
_TYPE_CONTROL = b"\x18\x03"
# normalizer_spec {add_dummy_prefix: false, remove_extra_whitespaces: false}: a later message is merged into an earlier.
_NO_PREFIX_KEEP_BLANKS = b"\x1a\x04\x18\x00\x20\x00"

_FOREIGN_FORMATS = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file it points to (`git lfs pull` was not run)"),
    (b"PK\x03\x04", "a zip archive or a PyTorch checkpoint, not a SentencePiece model"),
    (b"\x80", "a pickled Python object, not a SentencePiece model"),
    (b"{", "a JSON file, not a SentencePiece model"),
    (b"[", "a JSON file, not a SentencePiece model"),
    (b"<", "a web page, as left by a failed download, not a SentencePiece model"),
)


def read_model(path: Path) -> bytes:
    """The bytes of a complete SentencePiece model; raises `TokenizerError` that says what `path` is instead."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise _wrong(path, "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file")
        if status.st_size > _SIZE_LIMIT:
            raise _wrong(path, f"{status.st_size} bytes long, too large for a SentencePiece model")
        model = path.read_bytes()
    except FileNotFoundError as error:
        raise TokenizerError(f"The tokenizer {path} does not exist; {REMEDY}.") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise TokenizerError(f"The tokenizer {path} cannot be read ({reason}); {REMEDY}.") from error
    fault = _fault(model)
    if fault:
        raise _wrong(path, fault)
    return model


def without_pieces(model: bytes, piece_ids: Collection[int]) -> bytes:
    """The same vocabulary for parts of a text: no dummy prefix, every blank kept, and `piece_ids` never matched."""
    parts: list[bytes] = []
    index = 0
    for field, start, end in _fields(model):
        message = model[start:end]
        if field == _PIECE:
            # In protobuf the last value of a field wins. No UTF-8 text can spell the new name.
            if index in piece_ids:
                name = b"\xff" + str(index).encode()
                message += head(_NAME, len(name)) + name + _TYPE_CONTROL
            index += 1
        parts.append(head(field, len(message)) + message)
    return b"".join(parts) + _NO_PREFIX_KEEP_BLANKS


def _wrong(path: Path, what: str) -> TokenizerError:
    return TokenizerError(f"The tokenizer {path} is {what}; {REMEDY}.")


def _fault(model: bytes) -> str | None:
    if not model:
        return "empty"
    head = model[:512].lstrip()
    for magic, what in _FOREIGN_FORMATS:
        if head.startswith(magic):
            return what
    if model[8:9] == b"{":
        return "a safetensors file, not a SentencePiece model"
    try:
        found = {field for field, _, _ in _fields(model)}
    except ValueError:
        # A model begins with its first piece; anything else was never one.
        return "damaged or cut short" if model[0] == _PIECE << 3 | LENGTH_DELIMITED else "not a SentencePiece model"
    missing = {_PIECE, _TRAINER_SPEC, _NORMALIZER_SPEC} - found
    return "cut short or not a SentencePiece model" if missing else None


def _fields(message: bytes) -> Iterator[tuple[int, int, int]]:
    """(number, start, end) of every length-delimited field; `ValueError` where the bytes are anything else."""
    for number, wire_type, start, end in fields(message, 0, len(message)):
        if wire_type != LENGTH_DELIMITED:
            raise ValueError(f"no length-delimited field at byte {start}")
        yield number, start, end
