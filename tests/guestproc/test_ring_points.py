"""Ring ends of a guest that runs schedules: bytes that are loaded early, and a writer that signals at each write."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest

from emu.errors import RingFull
from emu.ring import RingMemory, RingProducer
from emu.switches import Fix
from emu.syncpoint import NOT_ARMED, Point
from emu.tracing import E_STALE_READ, Side
from guestproc import ring_points
from guestproc.current import Current
from guestproc.kernel.layout import Channel
from guestproc.ring_points import EagerProducer, PointedConsumer

RELID = 7
PAYLOAD = 1_000
"""Four such packets take 4,096 bytes: the fifth lies where the first lay."""


class Guest:
    """A thread that a director may hold where it has loaded bytes; `then` is what happens meanwhile."""

    def __init__(self, fix: Fix) -> None:
        self.fix = fix
        self.armed = bytearray(NOT_ARMED)
        self.then: Callable[[], object] = int
        self.records: list[tuple[int, ...]] = []
        self.tables = SimpleNamespace(pages=SimpleNamespace())

    def reach(self, _point: int, _relid: int) -> None:
        self.then()

    def record(self, *words: int) -> None:
        self.records.append(words)


def channel_of(pages: Any) -> Any:
    """A channel whose pages are there."""
    pages.is_live = lambda _pfn, _generation: True
    return SimpleNamespace(relid=RELID, ring_gpa=0x10000, ring_pfns_gpa=0, ring_generation=1)


def ring(**switches: Any) -> tuple[Guest, RingProducer, PointedConsumer]:
    """A guest, and both ends of a ring of 4,096 bytes that four packets have gone through."""
    memory, guest = RingMemory.on(bytearray(2 * 4096)), Guest(Fix(**switches))
    producer = RingProducer(memory)
    producer.init()
    consumer = PointedConsumer(cast(Current, guest), channel_of(guest.tables.pages), memory, memory.words)
    for n in range(4):
        producer.write(bytes([n]) * PAYLOAD)
        assert consumer.read_many()[0][3][0] == n
    guest.armed[Point.RING_BODY_PREFETCHED] = 1
    return guest, producer, consumer


@pytest.mark.parametrize("right", [True, False])
def test_bytes_that_were_loaded_before_the_index(right: bool) -> None:
    """D5: the packet is written in between. An acquire refuses the early bytes; without it the old packet comes."""
    guest, producer, consumer = ring(acquire_write_index=right)
    guest.then = lambda: producer.write(b"\4" * PAYLOAD)

    packets = consumer.read_many()

    assert [packet[3][0] for packet in packets] == [4 if right else 0]
    assert guest.records == [(E_STALE_READ, RELID, Side.TO_GUEST, 0, 1024, right)]
    assert consumer.memory.words.load_read() == 1024


def test_bytes_that_nobody_changed_are_as_good_early() -> None:
    """A load that is early for nothing: what is there is read, whatever orders it."""
    guest, producer, consumer = ring(acquire_write_index=False)
    producer.write(b"\4" * PAYLOAD)

    assert [packet[3][0] for packet in consumer.read_many()] == [4]
    assert guest.records == []


def test_writer_that_signals_at_each_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """D3: into a ring that is masked and not empty, and even when it is full."""
    signals: list[Channel] = []
    monkeypatch.setattr(ring_points, "vmbus_setevent", lambda _current, channel: signals.append(channel))
    memory, channel = RingMemory.on(bytearray(2 * 4096)), cast(Channel, SimpleNamespace())
    producer = EagerProducer(cast(Current, Guest(Fix())), channel, memory, memory.words)
    memory.init()
    memory.words.store_mask(1)

    assert [producer.write(bytes(PAYLOAD)) for _ in range(3)] == [True] * 3
    assert producer.write_many([bytes(8)]) == (1, True)
    assert signals == []
    with pytest.raises(RingFull):
        producer.write(bytes(PAYLOAD))
    assert signals == [channel]


@pytest.mark.parametrize("variant", ["", "mask_abuse", "stale_write_index"])
def test_room_that_a_writer_is_not_told_of(variant: str) -> None:
    """D2: a masked reader, or one that asks the index it began with; a right one signals for the same releases."""
    signalled = []
    for right in (True, False):
        memory = RingMemory.on(bytearray(3 * 4096))
        guest = Guest(Fix(read_side_order=right, variant="" if right else variant))
        producer = RingProducer(memory)
        producer.init()
        producer.write(bytes(PAYLOAD))
        consumer = PointedConsumer(cast(Current, guest), channel_of(guest.tables.pages), memory, memory.words)
        consumer.begin_read()

        producer.write_many([bytes(PAYLOAD)] * 5)
        guest.then = partial(fill_and_wish, guest, producer)
        guest.armed[Point.RING_AFTER_PENDING_READ] = 1
        consumer.read_many(6)
        signalled.append(consumer.take_signal())

    assert signalled == [True, False]


def fill_and_wish(guest: Guest, producer: RingProducer) -> None:
    """Once: write until the ring is full, and wish for more room than there is."""
    guest.armed[Point.RING_AFTER_PENDING_READ] = 0
    with pytest.raises(RingFull):
        while True:
            producer.write(bytes(PAYLOAD))
    assert not producer.want_room(2 * PAYLOAD)
