"""Text to ids and back with a SentencePiece model; user text never becomes a control token."""

from __future__ import annotations

import codecs
import hashlib
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Self

from sentencepiece import SentencePieceProcessor

from visualglm.config import TextConfig
from visualglm.errors import TokenizerError
from visualglm.processing.sentencepiece_model import RELEASED_SHA256, REMEDY, read_model, without_pieces

PAD, MASK, GMASK, BOS, EOS, NEWLINE, TAB = "<pad>", "[MASK]", "[gMASK]", "<sop>", "<eop>", "<n>", "<|tab|>"
REQUIRED_PIECES = (PAD, MASK, GMASK, BOS, EOS, NEWLINE)
MAX_BLANKS = 80
_CONTROL_PIECES = ("<unk>", "<s>", "</s>", PAD, MASK, GMASK, "[sMASK]", "<unused_0>", BOS, EOS, "<ENC>", "<dBLOCK>")
_BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))
# SentencePiece's own mark of a blank. As user text it is spelled in bytes, where the vocabulary has them.
_META = "▁"
_STRAY_BYTE = re.compile("[\udc80-\udcff]")


class Tokenizer:
    """A SentencePiece model with GLM's pieces for newline, tab and runs of blanks.

    `num_image_tokens` is the number of ids that older ChatGLM models put before those of text; the released
    VisualGLM has 0. Raises `TokenizerError` if `path` is not a complete SentencePiece model with the needed pieces.
    """

    def __init__(self, path: str | Path, *, num_image_tokens: int = 0) -> None:
        self.path = Path(path)
        self.num_image_tokens = num_image_tokens
        self._model = read_model(self.path)
        self.sha256 = hashlib.sha256(self._model).hexdigest()
        self._processor = self._load(self._model)
        self._require_pieces()
        self._whitespace = self._whitespace_pieces()
        self._controls = self._lookup(_CONTROL_PIECES)
        self._reserved = {**self._controls, **self._lookup(self._whitespace.values()), **self._lookup(_BYTE_PIECES)}
        self._never_text = {index for index in self._reserved.values() if not self._is_fallback(index)}
        self._spelling = re.compile("|".join(map(re.escape, self._reserved)))
        self._atoms = self._atom_ids()
        longest_first = sorted(self._atoms, key=len, reverse=True)
        self._atom = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._prefix = " " if "".join(self._processor.encode_as_pieces("a")).startswith(_META) else ""

    @classmethod
    def for_model(cls, path: str | Path, config: TextConfig) -> Self:
        """The tokenizer of a model: finds `num_image_tokens`, and raises `TokenizerError` where the ids disagree."""
        tokenizer = cls(path)
        tokenizer.num_image_tokens = config.bos_token_id - tokenizer.bos_id
        for name in ("pad", "mask", "gmask", "bos", "eos"):
            found, expected = getattr(tokenizer, f"{name}_id"), getattr(config, f"{name}_token_id")
            if found != expected or tokenizer.num_image_tokens < 0:
                raise TokenizerError(
                    f"The tokenizer {path} does not fit this model: its {name} token is {found}, "
                    f"text.{name}_token_id is {expected}; {REMEDY}."
                )
        if tokenizer.vocab_size > config.vocab_size:
            raise TokenizerError(
                f"The tokenizer {path} does not fit this model: it has {tokenizer.vocab_size} ids, "
                f"text.vocab_size is {config.vocab_size}; {REMEDY}."
            )
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of ids, image ids of older models included; a model may have more rows than this."""
        return self.num_image_tokens + self._processor.get_piece_size()

    @property
    def is_released(self) -> bool:
        """Whether the file is the released `ice_text.model`, byte for byte."""
        return self.sha256 == RELEASED_SHA256

    @property
    def pad_id(self) -> int:
        return self._special_id(PAD)

    @property
    def mask_id(self) -> int:
        return self._special_id(MASK)

    @property
    def gmask_id(self) -> int:
        return self._special_id(GMASK)

    @property
    def bos_id(self) -> int:
        """`<sop>`, the start of the answer."""
        return self._special_id(BOS)

    @property
    def eos_id(self) -> int:
        """`<eop>`, the end of the answer."""
        return self._special_id(EOS)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; what spells a control token, a blank run or a byte piece stays text at its place."""
        text = _well_formed(text)
        ids = self._encode_jointly(text)
        if ids is None:
            ids = self._encode_guarded(text)
        return [token_id + self.num_image_tokens for token_id in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; control tokens, image ids and ids beyond the vocabulary stand for no text."""
        decoder = StreamDecoder(self)
        return decoder.push(*ids) + decoder.flush()

    def token(self, token_id: int) -> Token:
        """What one id stands for."""
        piece_id = token_id - self.num_image_tokens
        if not 0 <= piece_id < self._processor.get_piece_size():
            return Token(b"")
        piece = self._processor.id_to_piece(piece_id)
        if piece in self._whitespace_text:
            return Token(self._whitespace_text[piece].encode())
        if self._processor.is_unknown(piece_id):
            return Token(self._unknown_surface)
        if self._processor.is_control(piece_id) or piece in self._controls:
            return Token(b"")
        if self._processor.is_byte(piece_id):
            return Token(bytes([int(piece[3:5], 16)]))
        return Token(piece.replace(_META, " ").encode(), bool(self._prefix) and piece.startswith(_META))

    def _encode_jointly(self, text: str) -> list[int] | None:
        """As the original does, or None where that would read the user's text as a token or a token as text."""
        if _META in self._atoms and _META in text:
            return None
        if self._spelling.search(self._processor.normalize(text)):
            return None
        ids: list[int] = self._processor.encode(self._atom.sub(lambda match: self._whitespace[match[0]], text))
        expected = [self._atoms[atom][0] for atom in self._atom.findall(text)]
        return ids if [token_id for token_id in ids if token_id in self._never_text] == expected else None

    def _encode_guarded(self, text: str) -> list[int]:
        """Atoms by their ids, and the text between them by a vocabulary without control pieces."""
        first, *rest = self._atom.split(text)
        ids: list[int] = self._text_only.encode(self._prefix + first)
        for atom, between in zip(rest[::2], rest[1::2], strict=True):
            ids += self._atoms[atom]
            ids += self._text_only.encode(between)
        return ids

    @cached_property
    def _text_only(self) -> SentencePieceProcessor:
        return self._load(without_pieces(self._model, self._never_text))

    @cached_property
    def _whitespace_text(self) -> dict[str, str]:
        return {piece: text for text, piece in self._whitespace.items()}

    @cached_property
    def _unknown_surface(self) -> bytes:
        surface: str = self._processor.decode([self._processor.unk_id()])
        return surface.encode()

    def _load(self, model: bytes) -> SentencePieceProcessor:
        try:
            return SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError) as error:
            raise TokenizerError(f"The tokenizer {self.path} is damaged or cut short ({error}); {REMEDY}.") from error

    def _require_pieces(self) -> None:
        found = self._lookup(REQUIRED_PIECES)
        missing = [piece for piece in REQUIRED_PIECES if piece not in found]
        if missing:
            raise TokenizerError(
                f"The tokenizer {self.path} has no piece {' '.join(missing)}, so it is not one of this model; {REMEDY}."
            )

    def _whitespace_pieces(self) -> dict[str, str]:
        """Whitespace to the piece that stands for it, as far as the vocabulary has it."""
        blanks = {" " * count: f"<|blank_{count}|>" for count in range(2, MAX_BLANKS + 1)}
        pieces = {"\n": NEWLINE, "\t": TAB, **blanks}
        found = self._lookup(pieces.values())
        return {text: piece for text, piece in pieces.items() if piece in found}

    def _atom_ids(self) -> dict[str, list[int]]:
        """Text that is encoded apart from its surroundings, and the piece ids for it."""
        atoms = {text: [self._reserved[piece]] for text, piece in self._whitespace.items()}
        meta = [self._reserved.get(_BYTE_PIECES[byte], -1) for byte in _META.encode()]
        if all(piece_id >= 0 and self._processor.is_byte(piece_id) for piece_id in meta):
            atoms[_META] = meta
        return atoms

    def _lookup(self, pieces: Iterable[str]) -> dict[str, int]:
        ids = {piece: self._processor.piece_to_id(piece) for piece in pieces}
        return {piece: index for piece, index in ids.items() if self._processor.id_to_piece(index) == piece}

    def _is_fallback(self, piece_id: int) -> bool:
        """Byte pieces and the unknown piece stand for characters without a piece; their spelling never matches."""
        return self._processor.is_byte(piece_id) or self._processor.is_unknown(piece_id)

    def _special_id(self, piece: str) -> int:
        return self.num_image_tokens + self._reserved[piece]


class Token(NamedTuple):
    """UTF-8 bytes of one token (maybe part of a character), and whether its blank goes at the start of a text."""

    text: bytes
    has_prefix_blank: bool = False


class StreamDecoder:
    """Decodes ids as they come; what it gives out, joined, is `Tokenizer.decode` of all of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Marks every stray byte by itself, as SentencePiece does; "replace" would join some.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._at_start = True

    def push(self, *ids: int) -> str:
        """The text that `ids` complete: whole characters only."""
        return self._text(b"".join(map(self._bytes, ids)))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for each byte of a character that is not complete."""
        return self._text(b"", final=True)

    def _text(self, data: bytes, final: bool = False) -> str:
        return _STRAY_BYTE.sub("\ufffd", self._utf8.decode(data, final))

    def _bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.token(int(token_id))
        drop_blank = self._at_start and token.has_prefix_blank
        self._at_start = self._at_start and not token.text
        return token.text[1:] if drop_blank else token.text


def _well_formed(text: str) -> str:
    """Surrogate pairs joined, lone surrogates as U+FFFD: SentencePiece takes UTF-8 only."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
