import pytest

from visualglm.protobuf import FIXED_32, FIXED_64, LENGTH_DELIMITED, VARINT, Field, fields, head, read_varint, varint


def all_fields(message: bytes) -> list[Field]:
    return list(fields(message, 0, len(message)))


def test_fields_of_every_type() -> None:
    message = b"\x08\x96\x01" + b"\x11" + bytes(8) + b"\x1a\x02hi" + b"\x25" + bytes(4) + b"\xc2\x3e\x00"
    assert all_fields(message) == [
        (1, VARINT, 1, 3),
        (2, FIXED_64, 4, 12),
        (3, LENGTH_DELIMITED, 14, 16),
        (4, FIXED_32, 17, 21),
        (1000, LENGTH_DELIMITED, 24, 24),
    ]
    assert list(fields(message, 12, 16)) == [(3, LENGTH_DELIMITED, 14, 16)]
    assert all_fields(b"") == []


def test_what_is_written_is_read() -> None:
    for value in (0, 127, 128, 300, 2**35, 2**64 - 1):
        assert read_varint(varint(value), 0, 10) == (value, len(varint(value)))
    message = head(1000, 300) + bytes(300)
    assert all_fields(message) == [(1000, LENGTH_DELIMITED, 4, 304)]


def test_numbers() -> None:
    assert read_varint(b"\x00\xac\x02", 1, 3) == (300, 3)
    assert read_varint(b"\xff" * 9 + b"\x01", 0, 10) == (2**64 - 1, 10)
    for message in (b"", b"\x80", b"\xff" * 10 + b"\x01"):
        with pytest.raises(ValueError, match="no complete number"):
            read_varint(message, 0, len(message))


@pytest.mark.parametrize(
    "message",
    [
        b"\x0a\x02h",  # cut short
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01h",  # longer than any file
        b"\x08\x80",
        b"\x11" + bytes(7),
        b"\x25" + bytes(3),
        b"\x0a",
        b"\x00\x00",  # the number 0
        b"\x02\x00",
        b"\x0b\x0c",  # a group
        b"\x0e\x00",
        b"\x8a\x80\x80\x80\x10\x00",  # some readers cut this off to 0x0a
    ],
)
def test_malformed(message: bytes) -> None:
    with pytest.raises(ValueError, match="byte"):
        all_fields(message)


def test_a_field_may_not_reach_beyond_its_message() -> None:
    with pytest.raises(ValueError, match="no complete field"):
        list(fields(b"\x0a\x02hi", 0, 3))
