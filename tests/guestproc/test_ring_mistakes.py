"""Claims about rings with sync points: where a reader stops, and what each old mistake of its loses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from emu.ring import RingProducer
from emu.switches import Fix
from emu.syncpoint import NOT_ARMED, Point
from emu.wire.packets import ring_bytes
from emu.wire.ring_layout import FEAT_PENDING_SEND_SZ
from guestproc.ring_points import PointedConsumer, has_points
from tests.emu.ring_pages import RingPages, ring_pages

RELID = 7
CHANNEL: Any = SimpleNamespace(relid=RELID, ring_gpa=0x10000, ring_pfns_gpa=0, ring_generation=1)


class Reader:
    """A guest's thread with a ring, at whose armed points `meanwhile` happens."""

    def __init__(self, ring: RingPages, **switches: Any) -> None:
        self.fix = Fix(**switches)
        self.armed: bytes | bytearray = bytearray(len(NOT_ARMED))
        self.reached: list[tuple[int, int]] = []
        self.meanwhile: Callable[[], object] = lambda: None
        self.producer = RingProducer(ring.memory)
        self.tables = SimpleNamespace(pages=SimpleNamespace(is_live=lambda _pfn, _generation: True))
        ring.memory.words.store_features(FEAT_PENDING_SEND_SZ)
        self.consumer = PointedConsumer(self, CHANNEL, ring.memory, ring.memory.words)  # type: ignore[arg-type]

    def arm(self, point: Point, meanwhile: Callable[[], object]) -> None:
        """The next reader that comes there lets this happen."""
        self.armed = bytearray(len(NOT_ARMED))
        self.armed[point] = 1
        self.meanwhile = meanwhile

    def reach(self, point: int, relid: int) -> None:
        """Somebody came."""
        self.reached.append((point, relid))
        self.armed = NOT_ARMED
        self.meanwhile()


@pytest.fixture
def ring() -> Iterator[RingPages]:
    """A small ring."""
    with ring_pages("bytearray") as pages:
        yield pages


@pytest.mark.parametrize("right", [True, False])
def test_a_packet_between_drain_and_unmask(ring: RingPages, right: bool) -> None:
    """The second look finds it; a reader that goes home leaves it there, unmasked and unannounced (D1)."""
    reader = Reader(ring, recheck_after_unmask=right)
    reader.consumer.begin_read()
    signals: list[bool] = []
    reader.arm(Point.CHAN_AFTER_CALLBACK, lambda: signals.append(reader.producer.write(b"x" * 8)))
    left = reader.consumer.end_read()

    assert reader.reached == [(Point.CHAN_AFTER_CALLBACK, RELID)]
    assert signals == [False], "masked: nobody is told"
    assert left == (ring_bytes(8) if right else 0)
    assert not reader.producer.write(b"y" * 8), "not empty any more: nobody is told of the next one either"


@pytest.mark.parametrize("right", [True, False])
def test_a_wish_while_the_reader_releases(ring: RingPages, right: bool) -> None:
    """The writer finds room, or the reader its wish; in the wrong order each acts on old news (D2)."""
    reader = Reader(ring, read_side_order=right)
    size = ring.data_size // 2 - 32
    reader.producer.write(bytes(size))
    reader.producer.write(bytes(size))
    finds_room: list[bool] = []
    reader.arm(Point.RING_AFTER_PENDING_READ, lambda: finds_room.append(reader.producer.want_room(ring_bytes(size))))
    reader.consumer.read()

    assert reader.reached == [(Point.RING_AFTER_PENDING_READ, RELID)]
    woken = finds_room[0] or reader.consumer.take_signal()
    assert woken is right


@pytest.mark.parametrize(("races", "switches", "pointed"), [
    (False, {}, False),
    (True, {}, True),
    (False, {"read_side_order": False}, True),
    (False, {"offer_gate": False}, False),
])  # fmt: skip
def test_who_has_such_rings(races: bool, switches: dict[str, Any], pointed: bool) -> None:
    """A machine that runs schedules, or whose rings are wrong on purpose; no other."""
    current = SimpleNamespace(machine=SimpleNamespace(races=races), fix=Fix(**switches))
    assert has_points(current) is pointed  # type: ignore[arg-type]
