"""Two real processes at the two ends of a small ring, each asleep whenever the rules let it: nothing is lost."""

from __future__ import annotations

import os
import random
import select
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from emu.errors import RingFull
from emu.gpadl import MapBudget, map_ring
from emu.memory import PAGE_SIZE, GuestMemory
from emu.ring import RingConsumer, RingMemory, RingProducer
from tests.processes import Crowd

DEADLINE_MS = 30_000


class Doorbell:
    """An eventfd: rings count, a wait takes them all; a wait that is never answered fails the test."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0)

    def ring(self) -> None:
        """Signal the other end."""
        os.eventfd_write(self._fd, 1)

    def wait(self) -> None:
        """Sleep until somebody rings."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        assert poll.poll(DEADLINE_MS), "a signal was lost: asleep at the deadline"
        os.eventfd_read(self._fd)

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._fd)


@contextmanager
def shared_ring(paged: bool) -> Iterator[tuple[int, list[int], MapBudget]]:
    """The fd, PFNs and budget by which each process maps the ring itself."""
    fd = os.memfd_create("ring")
    os.ftruncate(fd, 16 * PAGE_SIZE)
    yield fd, [3, 9, 4], MapBudget(0 if paged else 100)
    os.close(fd)


def attach(fd: int, pfns: list[int], budget: MapBudget) -> RingMemory:
    """The ring in this process."""
    return map_ring(GuestMemory.map(fd, 16 * PAGE_SIZE), pfns, 0, len(pfns), budget)


def payload_of(number: int, chance: random.Random) -> bytes:
    """A payload that says its number and carries its checksum."""
    body = number.to_bytes(4, "little") + chance.randbytes(8 * chance.randrange(300) + 4)
    return zlib.crc32(body).to_bytes(8, "little") + body


def send(ring: RingMemory, data: Doorbell, room: Doorbell, packets: int, seed: int) -> None:
    """Write every packet, in random bursts; sleep when the ring is full."""
    chance = random.Random(seed)
    producer = RingProducer(ring)
    payloads = [payload_of(number, chance) for number in range(packets)]
    at = 0
    while at < packets:
        burst = payloads[at : at + chance.randrange(1, 20)]
        try:
            if len(burst) == 1:
                written, must_signal = 1, producer.write(burst[0])
            else:
                written, must_signal = producer.write_many(burst)
        except RingFull:
            written, must_signal = 0, False
        if must_signal:
            data.ring()
        at += written
        if written < len(burst):
            needed = len(payloads[at]) + 24
            while not producer.want_room(needed):
                room.wait()
            producer.cancel_room()


def receive(ring: RingMemory, data: Doorbell, room: Doorbell, packets: int, seed: int) -> None:
    """Read every packet and check it; sleep when there is none."""
    chance = random.Random(seed)
    consumer = RingConsumer(ring)
    expected = 0
    while expected < packets:
        consumer.begin_read()
        for _, _, _, payload in consumer.drain(chance.choice((None, 1, 5))):
            checksum, body = int.from_bytes(payload[:8], "little"), payload[8:]
            assert zlib.crc32(body) == checksum, f"packet {expected} is damaged"
            assert int.from_bytes(body[:4], "little") == expected
            expected += 1
        if consumer.take_signal():
            room.ring()
        if not consumer.end_read() and expected < packets:
            data.wait()


def exchange(packets: int, seed: int, *, paged: bool) -> None:
    """Both ends in processes of their own, at rest when they are done."""
    data, room = Doorbell(), Doorbell()
    with shared_ring(paged) as shared:
        ring = attach(*shared)
        ring.init()
        with Crowd() as crowd:
            crowd.start(lambda: receive(attach(*shared), data, room, packets, seed))
            crowd.start(lambda: send(attach(*shared), data, room, packets, seed))
        assert RingConsumer(ring).bytes_to_read == 0
        ring.close()
    data.close()
    room.close()


@pytest.mark.parametrize("paged", [False, True], ids=["mapped", "paged"])
def test_every_packet_arrives_and_nobody_sleeps_for_ever(paged: bool) -> None:
    """Real atomics, two processes, a ring that is full and empty all the time."""
    exchange(3_000, seed=1, paged=paged)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(20))
def test_every_packet_arrives_however_often(seed: int) -> None:
    """The same for longer, in other bursts."""
    exchange(100_000, seed, paged=False)
