"""As much of protobuf's wire format as writing takes: varints, fixed 64-bit words, length-delimited fields.

A field is its number and wire type as a varint, then the value; a message is its fields one after the other, and
becomes a field of another message by its length before it (protobuf.dev, "Encoding").
"""

from __future__ import annotations

from struct import Struct
from typing import Final

_VARINT: Final = 0
_FIXED64: Final = 1
_BYTES: Final = 2
_U64: Final = Struct("<Q")


def _encoded(value: int) -> bytes:
    """A number that is not below zero, seven bits a byte, the lowest first."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


# Nearly all that is written are tags, lengths and small numbers: they are looked up.
_SHORT: Final = tuple(map(_encoded, range(1 << 14)))


def varint(value: int) -> bytes:
    """A number of at most 64 bits; one below zero is stored modulo 2^64."""
    return _SHORT[value] if 0 <= value < len(_SHORT) else _encoded(value & (1 << 64) - 1)


def number(field: int, value: int) -> bytes:
    """A field of type uint32, uint64, int32, int64, bool or enum."""
    if 0 <= value < len(_SHORT):
        return _SHORT[field << 3 | _VARINT] + _SHORT[value]
    return _SHORT[field << 3 | _VARINT] + _encoded(value & (1 << 64) - 1)


def fixed64(field: int, value: int) -> bytes:
    """A field of type fixed64."""
    return _SHORT[field << 3 | _FIXED64] + _U64.pack(value)


def data(field: int, content: bytes) -> bytes:
    """A field of type bytes, or a message inside a message."""
    return _SHORT[field << 3 | _BYTES] + varint(len(content)) + content


def text(field: int, content: str) -> bytes:
    """A field of type string."""
    return data(field, content.encode())
