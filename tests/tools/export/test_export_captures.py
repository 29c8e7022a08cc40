"""Bytes that were recorded behind a record."""

from __future__ import annotations

from collections.abc import Iterator

from emu.event_fields import EventSpec, parse_argument
from emu.recording import RecordedActor, TraceRecord
from emu.tracing import EVENTS
from tools.export.captures import captures

HOST = RecordedActor(2, "hypervisor", "HYPERVISOR", 70, 0)
VCPU = RecordedActor(3, "vcpu0", "VCPU", 71, 0)
BYTES = EventSpec(999, "bytes", (parse_argument("left:u64"), parse_argument("data:hex40")))
WANTED = {"mask"}


def begun(seq: int, actor: RecordedActor = HOST) -> TraceRecord:
    """A record that bytes may follow."""
    return TraceRecord(seq, seq, actor, None, "HOST", EVENTS["mask"], (7, 1))


def parts(seq: int, data: bytes, actor: RecordedActor = HOST) -> Iterator[TraceRecord]:
    """The records of some bytes."""
    for at in range(0, len(data), 40):
        part = int.from_bytes(data[at : at + 40].ljust(40, b"\xee"), "little")
        yield TraceRecord(seq + at // 40, seq + at // 40, actor, None, "HOST", BYTES, (len(data) - at, part))


def test_bytes_join_the_record_before_them() -> None:
    """Of any length; what is behind the last byte is not theirs."""
    for length in (1, 39, 40, 41, 240):
        data = bytes(range(length))
        (one,) = captures([begun(5), *parts(6, data)], WANTED)

        assert one.data == data


def test_two_actors_do_not_meet() -> None:
    """Records of others may lie between; the order of time is kept."""
    first, second = list(parts(6, b"a" * 50)), list(parts(6, b"b" * 50, VCPU))
    got = captures([begun(5), begun(5, VCPU), second[0], first[0], first[1], begun(9), second[1]], WANTED)

    assert [(one.record.actor.name, one.data) for one in got] == [
        ("hypervisor", b"a" * 50),
        ("vcpu0", b"b" * 50),
        ("hypervisor", None),
    ]


def test_bytes_with_a_gap_are_none() -> None:
    """A middle that was overwritten, a beginning, an end."""
    whole = list(parts(6, b"c" * 100))
    for there in ([whole[0], whole[2]], whole[1:], whole[:2], [whole[0]]):
        assert [one.data for one in captures([begun(5), *there, begun(20)], WANTED)] == [None, None]


def test_bytes_of_a_record_that_is_not_wanted_are_passed_over() -> None:
    """They do not go to the one before it."""
    other = TraceRecord(6, 6, HOST, None, "HOST", EVENTS["unmask"], (7, 1, 0))

    assert [one.data for one in captures([begun(5), other, *parts(7, b"d")], WANTED)] == [None]
