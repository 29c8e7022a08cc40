"""The packets by which a guest asks for sub-channels, and those of the netlike device, byte for byte."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from emu.errors import ProtocolViolation
from emu.wire import netlike_protocol as net
from emu.wire.subchannel_request import (
    SubchannelStatus,
    pack_completion,
    pack_request,
    parse_completion,
    parse_request,
)


def test_a_request_is_netvscs() -> None:
    """Type 133, op 1, the count; padding behind it is nobody's business."""
    payload = pack_request(4)

    assert payload == bytes.fromhex("85000000 01000000 04000000")
    assert parse_request(payload + bytes(4)) == 4


def test_a_completion_has_status_and_count() -> None:
    """What was granted stands in the completion."""
    payload = pack_completion(SubchannelStatus.SUCCESS, 3)

    assert payload == bytes.fromhex("85000000 00000000 03000000")
    assert parse_completion(payload) == (0, 3)
    assert parse_completion(pack_completion(SubchannelStatus.UNSUPPORTED)) == (3, 0)


@pytest.mark.parametrize(
    ("parse", "payload"),
    [
        (parse_request, bytes.fromhex("84000000 01000000 04000000")),
        (parse_request, bytes.fromhex("85000000 02000000 04000000")),
        (parse_completion, bytes.fromhex("84000000 00000000 04000000")),
        (parse_completion, bytes.fromhex("85000000 00000000 41000000")),
        *[(parse_request, pack_request(1)[:length]) for length in range(12)],
        *[(parse_completion, pack_completion(SubchannelStatus.SUCCESS)[:length]) for length in range(12)],
    ],
)
def test_what_is_neither_is_refused(parse: Callable[[bytes], object], payload: bytes) -> None:
    """Another type, another op, more than 64 granted, or too short."""
    with pytest.raises(ProtocolViolation, match="sub-channels"):
        parse(payload)


def test_a_frame_carries_sequence_length_and_checksum() -> None:
    """What comes back is the sequence, the length, and whether the data are intact; padding is not part of them."""
    payload = net.pack_frame(0x1_0000_0007, bytes(61))

    assert payload[:12] == bytes.fromhex("6b000000 07000000 3d000000")
    assert len(payload) == 16 + 61
    assert net.parse_frame(payload + bytes(3)) == (7, 61, True)
    assert net.parse_frame(payload[:-1] + b"\1") == (7, 61, False)


def test_requests_and_replies_of_a_netlike_channel() -> None:
    """Each begins with its type, and is read back as it was written."""
    counters = net.Counters(1, 2, 3, 4)

    assert net.pack_start(200, 0xFF) == bytes.fromhex("01000000 c8000000 ff000000")
    assert net.parse_start(net.pack_start(200, 0xFF)) == (200, 0xFF)
    assert net.pack_get_counters() == bytes.fromhex("02000000")
    assert net.parse_counters(net.pack_counters(counters)) == counters
    assert net.parse_reply(net.pack_reply(1, net.NetlikeStatus.INVALID)) == (1, 1)
    assert net.type_of(net.pack_frame(0, bytes(60))) == net.FRAME


@pytest.mark.parametrize(
    ("parse", "payload"),
    [
        (net.type_of, b"\1\0\0"),
        (net.parse_start, net.pack_start(0, 1)),
        (net.parse_start, net.pack_start(net.MAX_FRAMES + 1, 1)),
        (net.parse_frame, net.pack_frame(0, bytes(59))),
        (net.parse_frame, net.pack_frame(0, bytes(1515))),
        (net.parse_frame, net.pack_frame(0, bytes(60))[:-1]),
        (net.parse_counters, net.pack_reply(2, net.NetlikeStatus.INVALID).ljust(40, b"\0")),
        *[(net.parse_start, net.pack_start(1, 1)[:length]) for length in range(12)],
        *[(net.parse_reply, bytes(length)) for length in range(8)],
        *[(net.parse_counters, net.pack_counters(net.Counters())[:length]) for length in range(40)],
        *[(net.parse_frame, net.pack_frame(0, bytes(60))[:length]) for length in range(16)],
    ],
)
def test_what_cannot_be_is_a_violation(parse: Callable[[bytes], object], payload: bytes) -> None:
    """Too short, too long, or asking for what may not be asked for."""
    with pytest.raises(ProtocolViolation, match="netlike"):
        parse(payload)
