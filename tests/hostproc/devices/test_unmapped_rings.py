"""Rings that are open and not used yet: seen through guest RAM, mapped at the first packet, and not before."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from emu.errors import ProtocolViolation
from emu.gpadl import MapBudget
from emu.memory import PAGE_SIZE, GuestMemory
from emu.ring import RingConsumer, RingMemory, RingProducer
from emu.ring_memory import RingWords
from emu.wire.ring_layout import (
    FEATURE_BITS,
    INTERRUPT_MASK,
    PENDING_SEND_SZ,
    READ_INDEX,
    WRITE_INDEX,
)
from hostproc.devices.channel import HostChannel
from hostproc.devices.echo import Echo
from hostproc.devices.unmapped import Instrument, UnmappedRings

TO_HOST = 4 * PAGE_SIZE
TO_GUEST = 8 * PAGE_SIZE
PFNS = (4, 5, 6, 8, 9)
SPLIT = 3
BUDGET = 10


class Bench:
    """RAM with two rings in it, the guest's ends of them, and a host's channel over `UnmappedRings`."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.budget = MapBudget(BUDGET)
        ends = [RingMemory.of_pages(memory, [pfn * PAGE_SIZE for pfn in half]) for half in (PFNS[:SPLIT], PFNS[SPLIT:])]
        for end in ends:
            end.init()
        self.ends = ends
        self.guest_out, self.guest_in = RingProducer(ends[0]), RingConsumer(ends[1])
        self.interrupts = 0

    def channel(self, instrument: Instrument | None = None) -> HostChannel:
        """Open the channel."""
        rings = UnmappedRings(self.memory, PFNS, SPLIT, self.budget, instrument)
        channel = HostChannel(
            key=1,
            relid=1,
            sub_channel_index=0,
            userdata=bytes(120),
            rings=rings,
            signal=self._interrupt,
            violation=lambda violation: None,
            closed=lambda: None,
        )
        channel.attach()
        return channel

    def _interrupt(self) -> None:
        self.interrupts += 1

    def word(self, ring: int, offset: int) -> int:
        """Return a shared word of a ring."""
        return int.from_bytes(self.memory.read(ring + offset, 4), "little")

    def store(self, ring: int, offset: int, value: int) -> None:
        """Let the guest store a shared word."""
        self.memory.write(ring + offset, value.to_bytes(4, "little"))


@pytest.fixture
def bench() -> Iterator[Bench]:
    """RAM as a machine has it: shared memory."""
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 16 * PAGE_SIZE)
    memory = GuestMemory.map(fd, 16 * PAGE_SIZE)
    made = Bench(memory)
    yield made
    for end in made.ends:
        end.close()
    memory.close()
    os.close(fd)


def test_attaching_masks_the_one_and_promises_in_the_other(bench: Bench) -> None:
    """interrupt_mask in the guest's ring; feature bit, and no wish for room, in ours."""
    bench.store(TO_GUEST, FEATURE_BITS, 0)
    bench.store(TO_GUEST, PENDING_SEND_SZ, 64)

    bench.channel()

    assert bench.word(TO_HOST, INTERRUPT_MASK) == 1
    assert bench.word(TO_GUEST, FEATURE_BITS) == 1
    assert bench.word(TO_GUEST, PENDING_SEND_SZ) == 0


def test_a_channel_that_waits_maps_nothing(bench: Bench) -> None:
    """It looks, unmasks, and sleeps, as often as it is rung for nothing."""
    channel = bench.channel()
    body = Echo().open(channel)

    for _ in range(3):
        next(body)

    assert bench.budget.left == BUDGET
    assert bench.word(TO_HOST, INTERRUPT_MASK) == 0
    body.close()
    channel.close()


def test_the_first_packet_maps_both_rings(bench: Bench) -> None:
    """From then on it is a channel like any other, and its mappings end with it."""
    channel = bench.channel()
    body = Echo().open(channel)
    next(body)

    assert bench.guest_out.write(b"12345678")
    for _ in range(2):
        next(body)
    assert bench.budget.left == BUDGET - 4  # a run each, its data twice
    assert [packet[3] for packet in bench.guest_in.drain()] == [b"12345678"]
    body.close()
    channel.close()

    assert bench.budget.left == BUDGET
    assert bench.interrupts == 1


def test_a_packet_that_was_there_before_is_found(bench: Bench) -> None:
    """Nobody rings for what was written while the ring was masked."""
    channel = bench.channel()
    assert bench.guest_out.write(b"12345678") is False
    body = Echo().open(channel)

    next(body)

    assert [packet[3] for packet in bench.guest_in.drain()] == [b"12345678"]
    body.close()
    channel.close()


def test_a_packet_behind_the_last_look_is_not_lost(bench: Bench) -> None:
    """Between unmask and sleep the ring is looked at once more, and masked again for the work."""
    channel = bench.channel()
    assert channel.take() == []
    bench.guest_out.write(b"12345678")

    assert list(channel.wait_for_packets()) == []

    assert bench.word(TO_HOST, INTERRUPT_MASK) == 1
    assert [packet[3] for packet in channel.take()] == [b"12345678"]
    channel.close()


def test_a_wish_for_room_is_not_needed_to_map(bench: Bench) -> None:
    """A device that speaks first uses its ring at once."""
    channel = bench.channel()

    assert list(channel.send_all([b"hello..."])) == []

    assert [packet[3] for packet in bench.guest_in.drain()] == [b"hello..."]
    channel.close()


@pytest.mark.parametrize("ring", [TO_HOST, TO_GUEST])
@pytest.mark.parametrize("offset", [WRITE_INDEX, READ_INDEX])
@pytest.mark.parametrize("index", [4, 2 * PAGE_SIZE, 0xFFFFFFF8])
def test_impossible_indices_are_found_before_the_device_is_asked(
    bench: Bench, ring: int, offset: int, index: int
) -> None:
    """Not a multiple of 8, or behind the end of the data."""
    bench.store(ring, offset, index)

    with pytest.raises(ProtocolViolation) as caught:
        bench.channel()

    assert (caught.value.rule, caught.value.value) == ("ring-index", index)


def test_indices_that_became_impossible_are_found_at_the_first_packet(bench: Bench) -> None:
    """What is mapped then is given back."""
    channel = bench.channel()
    bench.store(TO_GUEST, READ_INDEX, 12)
    bench.store(TO_HOST, WRITE_INDEX, 32)

    with pytest.raises(ProtocolViolation):
        channel.take()

    assert bench.budget.left == BUDGET
    channel.close()


def test_instrumented_words_are_used_from_the_first_packet_on(bench: Bench) -> None:
    """A recorder gets to see both rings, each under its name."""
    sides: list[str] = []

    def instrument(side: str, memory: RingMemory) -> RingWords:
        sides.append(side)
        return memory.words

    channel = bench.channel(instrument)
    assert sides == []
    bench.guest_out.write(b"12345678")
    channel.take()

    assert sides == ["incoming", "outgoing"]
    channel.close()
