"""The netlike device on rings in memory: frames counted, frames made, whatever a guest sends refused and counted."""

from __future__ import annotations

import pytest

from emu.wire.netlike_protocol import (
    GET_COUNTERS,
    START_FRAMES,
    Counters,
    NetlikeStatus,
    pack_frame,
    pack_get_counters,
    pack_reply,
    pack_start,
    parse_counters,
    parse_frame,
)
from emu.wire.packets import COMPLETION_REQUESTED, VM_PKT_COMP, VM_PKT_DATA_INBAND
from hostproc.devices.netlike import Netlike
from tests.hostproc.devices.ring_bench import OpenChannel


def counters(bench: OpenChannel) -> Counters:
    """What the device says it has counted."""
    bench.send(pack_get_counters(), trans_id=9, flags=COMPLETION_REQUESTED)
    bench.run()
    ((kind, _flags, trans_id, payload),) = bench.received()
    assert (kind, trans_id) == (VM_PKT_COMP, 9)
    return parse_counters(payload)


def test_frames_are_counted_and_checked() -> None:
    """Frames, bytes, gaps in the sequence, wrong checksums; one that came out of turn is a gap there and back."""
    bench = OpenChannel(Netlike(), to_host_pages=4)
    broken = bytearray(pack_frame(4, bytes(100)))
    broken[-1] ^= 1
    for frame in (pack_frame(0, bytes(60)), pack_frame(1, bytes(1514)), pack_frame(3, bytes(70)), bytes(broken)):
        bench.send(frame)
    bench.run()

    assert counters(bench) == Counters(frames=4, gaps=1, checksum_errors=1, nbytes=60 + 1514 + 70 + 100)
    assert bench.violations == []


def test_asked_for_frames_come_in_order() -> None:
    """After the completion, as many as were asked for, of seeded sizes, through a ring that takes only a few."""
    bench = OpenChannel(Netlike())
    bench.send(pack_start(100, 7), trans_id=3, flags=COMPLETION_REQUESTED)

    packets = []
    while bench.step():
        packets += bench.received()
    packets += bench.received()

    assert packets[0][:3] == (VM_PKT_COMP, 0, 3)
    assert packets[0][3] == pack_reply(START_FRAMES, NetlikeStatus.SUCCESS)
    assert {packet[0] for packet in packets[1:]} == {VM_PKT_DATA_INBAND}
    frames = [parse_frame(packet[3]) for packet in packets[1:]]
    assert [sequence for sequence, _, _ in frames] == list(range(100))
    assert all(intact for _, _, intact in frames)
    assert all(60 <= length <= 1514 for _, length, _ in frames) and len({length for _, length, _ in frames}) > 50


def test_the_sequence_goes_on_from_one_request_to_the_next() -> None:
    """It counts for as long as the channel is open."""
    bench = OpenChannel(Netlike(), to_guest_pages=16)
    for _ in range(2):
        bench.send(pack_start(3, 1), trans_id=3, flags=COMPLETION_REQUESTED)
        bench.run()

    frames = [parse_frame(packet[3])[0] for packet in bench.received() if packet[0] == VM_PKT_DATA_INBAND]
    assert frames == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("payload", "kind"),
    [
        (pack_start(0, 1), START_FRAMES),
        (pack_start((1 << 16) + 1, 1), START_FRAMES),
        ((77).to_bytes(8, "little"), 77),
    ],
)
def test_a_wrong_request_is_refused(payload: bytes, kind: int) -> None:
    """It is completed with a status, counted, and the channel goes on."""
    bench = OpenChannel(Netlike())
    bench.send(payload, trans_id=3, flags=COMPLETION_REQUESTED)
    bench.run()

    assert [packet[3] for packet in bench.received()] == [pack_reply(kind, NetlikeStatus.INVALID)]
    assert [one.rule for one in bench.violations] == ["netlike-packet"]
    assert counters(bench) == Counters()


@pytest.mark.parametrize(
    ("payload", "trans_id", "flags"),
    [
        (b"", 1, 1),
        (pack_frame(0, bytes(59)), 0, 0),
        (pack_frame(0, bytes(60))[:40], 0, 0),
        (GET_COUNTERS.to_bytes(4, "little"), 1, 0),
        (GET_COUNTERS.to_bytes(4, "little"), 0, 1),
    ],
    ids=["empty", "short frame", "cut frame", "no completion wanted", "no id"],
)
def test_what_cannot_be_answered_is_counted(payload: bytes, trans_id: int, flags: int) -> None:
    """Nothing comes back for it, and the device still serves."""
    bench = OpenChannel(Netlike())
    bench.send(payload, trans_id=trans_id, flags=flags)
    bench.run()

    assert bench.received() == []
    assert [one.rule for one in bench.violations] == ["netlike-packet"]
    assert counters(bench) == Counters()
