"""What goes through the rings of a `netlike` device: frames both ways, and three requests of the guest's.

Every payload begins with its type. A request wants a completion, which begins with the same type and a status; frames
want none. Each channel counts its frames from 0 in either direction, and each frame has the CRC-32 of its data, so
both ends see what was lost, doubled, swapped or changed.

    FRAME           type  sequence u32  length u32  checksum u32  data[length]     both ways
    START_FRAMES    type  count u32  seed u32                   → type status      the host sends `count` frames
    GET_COUNTERS    type                                        → type status frames u64 gaps u64
                                                                  checksum_errors u64 bytes u64
    SUBCHANNEL      see `emu.wire.subchannel_request`; on the primary
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import Final
from zlib import crc32

from emu.errors import ProtocolViolation
from emu.values import valueclass

START_FRAMES: Final = 1
GET_COUNTERS: Final = 2
FRAME: Final = 107

MIN_FRAME: Final = 60
MAX_FRAME: Final = 1514
MAX_FRAMES: Final = 1 << 16
"""The most that one START_FRAMES may ask for."""

_TYPE: Final = Struct("<I")
_FRAME: Final = Struct("<IIII")
_START: Final = Struct("<III")
_REPLY: Final = Struct("<II")
_COUNTERS: Final = Struct("<IIQQQQ")
_U32: Final = (1 << 32) - 1


class NetlikeStatus(IntEnum):
    """What a device says to START_FRAMES and GET_COUNTERS."""

    SUCCESS = 0
    INVALID = 1


@valueclass()
class Counters:
    """What one end counted of the frames that came to it on one channel."""

    frames: int = 0
    gaps: int = 0
    checksum_errors: int = 0
    nbytes: int = 0


def type_of(payload: bytes) -> int:
    """The type that a payload begins with; ProtocolViolation (`netlike-packet`) when it has none."""
    if len(payload) < _TYPE.size:
        raise _violation(f"a payload of {len(payload)} bytes", len(payload))
    kind: int = _TYPE.unpack_from(payload)[0]
    return kind


def pack_frame(sequence: int, data: bytes) -> bytes:
    """Wrap the data of a frame."""
    return _FRAME.pack(FRAME, sequence & _U32, len(data), crc32(data)) + data


def parse_frame(payload: bytes) -> tuple[int, int, bool]:
    """A frame's sequence, its length, and whether the data are what was sent; ProtocolViolation when it is none."""
    if len(payload) < _FRAME.size:
        raise _violation(f"a frame of {len(payload)} bytes", len(payload))
    _kind, sequence, length, checksum = _FRAME.unpack_from(payload)
    data = payload[_FRAME.size : _FRAME.size + length]
    if not MIN_FRAME <= length <= MAX_FRAME or len(data) < length:
        raise _violation(f"a frame of length {length} in {len(payload)} bytes", length)
    return sequence, length, crc32(data) == checksum


def pack_start(count: int, seed: int) -> bytes:
    """Ask for frames."""
    return _START.pack(START_FRAMES, count, seed & _U32)


def parse_start(payload: bytes) -> tuple[int, int]:
    """How many frames are asked for, and the seed of their sizes and data; ProtocolViolation (`netlike-packet`)."""
    if len(payload) < _START.size:
        raise _violation(f"START_FRAMES of {len(payload)} bytes", len(payload))
    _kind, count, seed = _START.unpack_from(payload)
    if not 1 <= count <= MAX_FRAMES:
        raise _violation(f"{count} frames are asked for, 1 to {MAX_FRAMES} may be", count)
    return count, seed


def pack_reply(kind: int, status: NetlikeStatus) -> bytes:
    """Complete a request that has no more to say."""
    return _REPLY.pack(kind, status)


def parse_reply(payload: bytes) -> tuple[int, int]:
    """Type and status of a completion; ProtocolViolation (`netlike-packet`) when it is none."""
    if len(payload) < _REPLY.size:
        raise _violation(f"a completion of {len(payload)} bytes", len(payload))
    kind, status = _REPLY.unpack_from(payload)
    return kind, status


def pack_get_counters() -> bytes:
    """Ask what the host has counted on this channel."""
    return _TYPE.pack(GET_COUNTERS)


def pack_counters(counters: Counters) -> bytes:
    """Complete GET_COUNTERS."""
    c = counters
    return _COUNTERS.pack(GET_COUNTERS, NetlikeStatus.SUCCESS, c.frames, c.gaps, c.checksum_errors, c.nbytes)


def parse_counters(payload: bytes) -> Counters:
    """The counters in a completion of GET_COUNTERS; ProtocolViolation (`netlike-packet`) when it has none."""
    if len(payload) < _COUNTERS.size or parse_reply(payload) != (GET_COUNTERS, NetlikeStatus.SUCCESS):
        raise _violation(f"no counters in {len(payload)} bytes", len(payload))
    _kind, _status, *values = _COUNTERS.unpack_from(payload)
    return Counters(*values)


def _violation(what: str, value: int) -> ProtocolViolation:
    return ProtocolViolation(f"netlike: {what}", rule="netlike-packet", field="payload", value=value)
