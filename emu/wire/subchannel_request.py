"""How a driver asks its device for sub-channels: a request on the primary's ring, and its completion.

The two packets are netvsc's (NVSP message 133): the request is in-band and wants a completion; that says how many
are granted. The offers of the granted ones come before or after it, in any order.

    request      type u32 = 133   op u32 = 1     count u32
    completion   type u32 = 133   status u32     count u32 (granted; 0 unless status is SUCCESS)

The echo device gives back whatever it is sent, so there a request must not be confused with a payload. It is one only
as the very first packet of a primary channel, and only if the user data of its OPENCHANNEL begin with `ECHO_USERDATA`;
all packets behind it, and every packet of any other channel, are echoed.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import Final

from emu.errors import ProtocolViolation

SUBCHANNEL: Final = 133
ALLOCATE: Final = 1
MAX_SUBCHANNELS: Final = 64
"""The most that may be asked for (VRSS_CHANNEL_MAX of netvsc)."""

ECHO_USERDATA: Final = b"SUBCHANS"
"""User data of an echo primary whose first packet is a request."""

_REQUEST: Final = Struct("<III")
_COMPLETION: Final = Struct("<III")


class SubchannelStatus(IntEnum):
    """What a device says to a request."""

    SUCCESS = 0
    INVALID = 1
    """No request at all, or for none, or for more than MAX_SUBCHANNELS."""
    ALREADY = 2
    """This opening of the primary has had its sub-channels."""
    UNSUPPORTED = 3
    """This device has none, or this channel is not a primary."""


def pack_request(count: int) -> bytes:
    """Ask for `count` sub-channels."""
    return _REQUEST.pack(SUBCHANNEL, ALLOCATE, count)


def parse_request(payload: bytes) -> int:
    """How many are asked for; ProtocolViolation (`subchannel-request`) for what is no request."""
    if len(payload) < _REQUEST.size:
        raise _violation(f"a request of {len(payload)} bytes", len(payload))
    kind, op, count = _REQUEST.unpack_from(payload)
    if (kind, op) != (SUBCHANNEL, ALLOCATE):
        raise _violation(f"a request of type {kind}, op {op}", kind)
    asked: int = count
    return asked


def pack_completion(status: SubchannelStatus, count: int = 0) -> bytes:
    """Answer a request."""
    return _COMPLETION.pack(SUBCHANNEL, status, count)


def parse_completion(payload: bytes) -> tuple[int, int]:
    """Status and how many are granted, as the device says; ProtocolViolation for what is no completion."""
    if len(payload) < _COMPLETION.size:
        raise _violation(f"a completion of {len(payload)} bytes", len(payload))
    kind, status, count = _COMPLETION.unpack_from(payload)
    if kind != SUBCHANNEL or count > MAX_SUBCHANNELS:
        raise _violation(f"a completion of type {kind} for {count} sub-channels", count)
    return status, count


def _violation(what: str, value: int) -> ProtocolViolation:
    return ProtocolViolation(f"sub-channels: {what}", rule="subchannel-request", field="payload", value=value)
