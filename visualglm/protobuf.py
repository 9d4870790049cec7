"""Protocol buffers as bytes: what is in a file is looked at before a library trusts it."""

from __future__ import annotations

from collections.abc import Iterator
from mmap import mmap

Message = bytes | mmap

VARINT, FIXED_64, LENGTH_DELIMITED, FIXED_32 = 0, 1, 2, 5

_FIXED_BYTES = {FIXED_64: 8, FIXED_32: 4}
# Some readers cut longer tags off, and would then see another field.
_LARGEST_TAG = 2**32 - 1

Field = tuple[int, int, int, int]
"""Number, wire type, and where the content starts and ends."""


def fields(message: Message, start: int, end: int) -> Iterator[Field]:
    """Every field of the message that `message[start:end]` holds; `ValueError` where it is malformed.

    Groups, an outdated kind of field, count as malformed.
    """
    position = start
    while position < end:
        tag, position = read_varint(message, position, end)
        wire_type = tag & 7
        if wire_type == VARINT:
            _, after = read_varint(message, position, end)
        elif wire_type == LENGTH_DELIMITED:
            length, position = read_varint(message, position, end)
            after = position + length
        elif wire_type in _FIXED_BYTES:
            after = position + _FIXED_BYTES[wire_type]
        else:
            raise ValueError(f"a field of unknown type before byte {position}")
        if not 8 <= tag <= _LARGEST_TAG or after > end:
            raise ValueError(f"no complete field before byte {position}")
        yield tag >> 3, wire_type, position, after
        position = after


def read_varint(message: Message, position: int, end: int) -> tuple[int, int]:
    """The whole number at `position`, and where it ends; `ValueError` if that is not before `end`."""
    value = shift = 0
    while position < end and shift < 64:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError(f"no complete number at byte {position}")


def varint(value: int) -> bytes:
    """The bytes of a whole number that is not negative."""
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def head(number: int, size: int) -> bytes:
    """What comes before the `size` bytes of a length-delimited field."""
    return varint(number << 3 | LENGTH_DELIMITED) + varint(size)
