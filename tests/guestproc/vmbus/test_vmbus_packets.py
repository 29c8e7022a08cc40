"""Packets on an open channel, and a host that writes nonsense into the rings."""

from __future__ import annotations

import errno
import random
from collections import deque
from collections.abc import Callable

import pytest

from emu.errors import OutOfMemory
from emu.ring_memory import Payload
from emu.wire.packets import COMPLETION_REQUESTED, VM_PKT_COMP, VM_PKT_DATA_INBAND
from emu.wire.ring_layout import INTERRUPT_MASK, PENDING_SEND_SZ, READ_INDEX, WRITE_INDEX
from guestproc.current import Current
from guestproc.drivers.echo_inbox import INBOXES
from guestproc.kernel.layout import CallbackMode, Channel, ChannelState
from guestproc.vmbus.channel import vmbus_close
from guestproc.vmbus.packets import (
    vmbus_cancel_room,
    vmbus_drain,
    vmbus_sendpacket,
    vmbus_sendpackets,
    vmbus_wait_for_room,
)
from tests.guestproc.world import World, new_world

DATA = 15 * 4096


@pytest.fixture
def channel(booted: World) -> Channel:
    """An open echo channel, relid 9, whose packets are kept for the test."""
    booted.host.device(9)
    booted.settle()
    channel = booted.channel(9)
    INBOXES[channel.handle] = deque()
    return channel


def inbound(channel: Channel) -> int:
    """GPA of the host-to-guest ring."""
    return channel.ring_gpa + 4096 * channel.ring_send_pages


def poke(world: World, gpa: int, value: int) -> None:
    """What a host may do to a shared word."""
    world.tables.ram.atomics.store_u32(gpa, value)


def mask_of(world: World, channel: Channel) -> int:
    """interrupt_mask of the inbound ring."""
    return world.tables.ram.atomics.load_u32(inbound(channel) + INTERRUPT_MASK)


def reading_stopped(world: World, channel: Channel, rule: str) -> None:
    """Counted, no callback any more, masked; closed and released as ever, and nothing is missing."""
    assert world.refused()[rule] >= 1
    assert (channel.onchannel_callback, mask_of(world, channel)) == (0, 1)
    assert channel.state.load() == ChannelState.OPENED_STATE
    world.host.device(10)
    world.settle()
    assert world.channel(10).state.load() == ChannelState.OPENED_STATE
    assert world.shut_down() == {}


# -- what goes well -------------------------------------------------------------------------------------


def test_packet_goes_and_comes_back(booted: World, channel: Channel) -> None:
    """In-band, with and without a completion; one doorbell, one interrupt."""
    sent = [(b"plain", 0, 0), (b"complete me", 77, COMPLETION_REQUESTED)]
    for payload, trans_id, flags in sent:
        result = booted.call(
            lambda current, p=payload, t=trans_id, f=flags: vmbus_sendpacket(current, channel, p, t, flags=f)  # type: ignore[misc]
        )
        assert result == 0

    taken = list(INBOXES[channel.handle])
    assert [(kind, trans_id) for kind, _, trans_id, _ in taken] == [(VM_PKT_DATA_INBAND, 0), (VM_PKT_COMP, 77)]
    assert [payload[: len(wanted)] for (*_, payload), (wanted, _, _) in zip(taken, sent, strict=True)] == [
        b"plain",
        b"complete me",
    ]
    assert (channel.sig_events.load(), channel.interrupts, channel.intr_out_empty) == (2, 2, 2)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_payload_may_be_any_bytes(booted: World, channel: Channel, kind: Callable[[bytes], Payload]) -> None:
    """One or a batch of them, as on the host's side."""
    assert booted.call(lambda current: vmbus_sendpacket(current, channel, kind(b"one here"))) == 0
    assert booted.call(lambda current: vmbus_sendpackets(current, channel, [kind(b"and more"), kind(b"and last")])) == 2
    booted.settle()

    assert [bytes(packet[3]) for packet in INBOXES[channel.handle]] == [b"one here", b"and more", b"and last"]


def test_batch_is_one_signal(booted: World, channel: Channel) -> None:
    """Many packets, one transition from empty: one doorbell."""
    assert booted.call(lambda current: vmbus_sendpackets(current, channel, [b"x" * 64] * 50)) == 50

    assert len(INBOXES[channel.handle]) == 50
    assert channel.sig_events.load() == 1


def test_callback_drains_in_bites(booted: World, channel: Channel) -> None:
    """512 packets a callback; what is left is found by the look behind the unmask, without an interrupt."""
    booted.host.write(9, *[b""] * 1_300)
    booted.settle()

    assert len(INBOXES[channel.handle]) == 1_300
    assert channel.interrupts == 1
    assert mask_of(booted, channel) == 0
    runs = [event for event in booted.events if event.name == "tasklet_run" and event.arguments[1:] == (9,)]
    assert len(runs) == 3


def test_packet_behind_the_unmask_is_found(booted: World, channel: Channel) -> None:
    """A packet that slips in between drain and unmask brings no interrupt: the look behind it finds it (D1)."""
    rings = booted.currents[channel.target_cpu.load()].rings
    booted.host.write(9, b"one", signal=False)
    end_read = rings.of(channel).inbound.end_read
    late = [b"two"]

    def slip_in() -> int:
        if late:
            booted.host.write(9, late.pop(), signal=False)
        return end_read()

    class Slipping:
        """The ring's reading end, with somebody writing just before it unmasks."""

        def __getattr__(self, name: str) -> object:
            return slip_in if name == "end_read" else getattr(real, name)

    real = rings.of(channel).inbound
    rings.of(channel).inbound = Slipping()  # type: ignore[assignment]
    booted.host.signal(9)
    booted.settle()

    assert [packet[3][:3] for packet in INBOXES[channel.handle]] == [b"one", b"two"]
    assert channel.interrupts == 1


def test_full_ring(booted: World, channel: Channel) -> None:
    """-EAGAIN, counted once as the first and each time in total; a batch says how many fitted."""
    booted.host.channels[9].echo = False
    sent = booted.call(lambda current: vmbus_sendpackets(current, channel, [b"x" * 1_000] * 100))
    assert 50 < sent < 100

    for _ in range(3):
        assert booted.call(lambda current: vmbus_sendpacket(current, channel, b"x" * 1_000)) == -errno.EAGAIN

    assert (channel.out_full_first, channel.out_full_total) == (1, 4)


def test_wish_for_room_is_answered_when_there_is_some(booted: World, channel: Channel) -> None:
    """pending_send_sz is published, the host signals when it has read, and the wish is taken back."""
    booted.host.channels[9].echo = False
    booted.call(lambda current: vmbus_sendpackets(current, channel, [b"x" * 1_000] * 100))
    wish = channel.ring_gpa + PENDING_SEND_SZ
    assert booted.call(lambda current: vmbus_wait_for_room(current, channel, 1_024)) == 0
    assert booted.tables.ram.atomics.load_u32(wish) == 1_024

    booted.host.channels[9].echo = True
    booted.host.partition.connections.events.clear()
    booted.machine.doorbells.view.fetch_or_u64(4096 + 8 * ((0x2000 | 9) >> 6), 1 << 9)
    booted.machine.doorbells.view.fetch_or_u64(8 * ((0x2000 | 9) >> 12), 1 << ((0x2000 | 9) >> 6 & 63))
    booted.settle()

    assert len(INBOXES[channel.handle]) > 50
    assert booted.call(lambda current: vmbus_wait_for_room(current, channel, 1_024)) == 1
    booted.call(lambda current: vmbus_cancel_room(current, channel))
    assert booted.tables.ram.atomics.load_u32(wish) == 0


def test_guest_that_made_room_signals_the_host(booted: World, channel: Channel) -> None:
    """The host waits for room in the inbound ring: the drain that makes enough of it rings, once (reference 4.5)."""
    producer = booted.host.channels[9].producer
    assert producer is not None
    booted.host.write(9, *[b"x" * 1_000] * 50, signal=False)
    producer.want_room(40_000)
    before = channel.sig_events.load()
    booted.host.signal(9)
    booted.settle()

    assert channel.sig_events.load() == before + 1
    assert channel.intr_in_full == 1


# -- not open any more ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["rescinded", "closed"])
def test_nothing_is_sent_on_a_channel_that_is_not_open(booted: World, channel: Channel, how: str) -> None:
    """-ENODEV for a packet, a batch and a wish; the rings, which may be somebody else's pages by now, stay alone."""
    if how == "rescinded":
        channel.rescind.store(1)
    else:
        booted.call(lambda current: vmbus_close(current, channel))

    def sends(current: Current) -> list[int]:
        vmbus_cancel_room(current, channel)
        return [
            vmbus_sendpacket(current, channel, b"x"),
            vmbus_sendpackets(current, channel, [b"x"]),
            vmbus_wait_for_room(current, channel, 64) if how == "closed" else -errno.ENODEV,
        ]

    assert booted.call(sends) == [-errno.ENODEV] * 3


def test_packet_longer_than_the_ring(booted: World, channel: Channel) -> None:
    """-EMSGSIZE, for there will never be room (the kernel says -EAGAIN for ever); likewise the wish for it."""

    def sends(current: Current) -> list[int]:
        return [
            vmbus_sendpacket(current, channel, bytes(DATA)),
            vmbus_sendpackets(current, channel, [bytes(DATA)]),
            vmbus_wait_for_room(current, channel, DATA + 1),
        ]

    assert booted.call(sends) == [-errno.EMSGSIZE] * 3


# -- nonsense from the host -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [DATA, 4, DATA - 4, 0xFFFFFFFF])
def test_write_index_that_cannot_be(booted: World, channel: Channel, value: int) -> None:
    """Beyond the ring, or no multiple of 8: nothing of it is read."""
    booted.host.write(9, b"good")
    booted.settle()
    poke(booted, inbound(channel) + WRITE_INDEX, value)
    booted.host.signal(9)
    booted.settle()

    assert len(INBOXES[channel.handle]) == 1
    reading_stopped(booted, channel, "ring-index")


def test_write_index_that_goes_bad_behind_the_drain(booted: World, channel: Channel) -> None:
    """The look behind the unmask finds nonsense: masked again, and no callback any more."""
    rings = booted.currents[channel.target_cpu.load()].rings
    real = rings.of(channel).inbound
    end_read = real.end_read

    def spoil() -> int:
        poke(booted, inbound(channel) + WRITE_INDEX, 0xFFFFFFFF)
        return end_read()

    class Spoiling:
        """The ring's reading end, whose writer goes mad before the unmask."""

        def __getattr__(self, name: str) -> object:
            return spoil if name == "end_read" else getattr(real, name)

    rings.of(channel).inbound = Spoiling()  # type: ignore[assignment]
    booted.host.write(9, b"good")
    booted.settle()

    assert len(INBOXES[channel.handle]) == 1
    reading_stopped(booted, channel, "ring-index")


def test_packets_before_a_bad_one_are_delivered(booted: World, channel: Channel) -> None:
    """A length beyond what is published: what came before it counts, what comes after is not read."""
    booted.host.write(9, b"good", b"better", signal=False)
    third = 2 * (16 + 8 + 8)
    descriptor = (6).to_bytes(2, "little") + (2).to_bytes(2, "little") + (0xFFF0).to_bytes(2, "little") + bytes(2)
    booted.host.memory.write(inbound(channel) + 4096 + third, descriptor)
    poke(booted, inbound(channel) + WRITE_INDEX, third + 64)
    booted.host.signal(9)
    booted.settle()

    assert [packet[3][:4] for packet in INBOXES[channel.handle]] == [b"good", b"bett"]
    reading_stopped(booted, channel, "packet-length")


@pytest.mark.parametrize(
    ("offset8", "len8", "flags", "kind"), [(1, 4, 0, 6), (5, 4, 0, 6), (2, 1, 0, 6), (2, 4, 2, 6), (2, 4, 0, 99)]
)
def test_descriptor_that_cannot_be(
    booted: World, channel: Channel, offset8: int, len8: int, flags: int, kind: int
) -> None:
    """Payload before or behind the packet, a packet without a descriptor, unknown flags and types."""
    words = b"".join(word.to_bytes(2, "little") for word in (kind, offset8, len8, flags))
    booted.host.memory.write(inbound(channel) + 4096, words)
    poke(booted, inbound(channel) + WRITE_INDEX, 64)
    booted.host.signal(9)
    booted.settle()

    assert sum(booted.refused().values()) == 1
    assert channel.onchannel_callback == 0
    assert booted.shut_down() == {}


def test_wish_of_the_host_that_can_never_be_met(booted: World, channel: Channel) -> None:
    """pending_send_sz beyond the ring: the packets are taken, then the channel is left alone."""
    booted.host.write(9, b"good", signal=False)
    poke(booted, inbound(channel) + PENDING_SEND_SZ, 0x7FFFFFF8)
    booted.host.signal(9)
    booted.settle()

    assert len(INBOXES[channel.handle]) == 1
    reading_stopped(booted, channel, "pending-send-size")


@pytest.mark.parametrize("value", [DATA, 4, 0xFFFFFFFF])
def test_read_index_that_cannot_be(booted: World, channel: Channel, value: int) -> None:
    """The outbound ring's free space would be nonsense: -EIO for each send, counted; the other ring goes on."""
    poke(booted, channel.ring_gpa + READ_INDEX, value)

    def sends(current: Current) -> list[int]:
        return [
            vmbus_sendpacket(current, channel, b"x"),
            vmbus_sendpackets(current, channel, [b"x"]),
            vmbus_wait_for_room(current, channel, 64),
        ]

    assert booted.call(sends) == [-errno.EIO] * 3
    assert booted.refused()["ring-index"] == 3
    poke(booted, channel.ring_gpa + READ_INDEX, 0)
    booted.host.write(9, b"hello")
    booted.settle()
    assert len(INBOXES[channel.handle]) == 1
    assert booted.shut_down() == {}


@pytest.mark.parametrize("mode", [CallbackMode.BATCHED, CallbackMode.DIRECT, CallbackMode.ISR])
def test_nonsense_in_a_ring_that_is_not_mapped_yet(mode: CallbackMode) -> None:
    """The first interrupt maps it, in whatever context: refused there, and the processor goes on."""
    with new_world() as world:
        world.boot()
        world.host.device(9)
        world.settle()
        channel = world.channel(9)
        channel.callback_mode = mode
        poke(world, inbound(channel) + WRITE_INDEX, 0xFFFFFFFF)
        world.host.signal(9)
        world.settle()

        assert world.refused() == {"ring-index": 1}
        assert channel.onchannel_callback == 0
        assert world.shut_down() == {}


def test_ring_that_cannot_be_mapped(booted: World, channel: Channel) -> None:
    """No memory for the pages of a ring that was initialised elsewhere: said once, and the ISR goes on."""
    rings = booted.currents[channel.target_cpu.load()].rings
    rings.drop(channel)

    def full(channel: Channel) -> None:
        raise OutOfMemory("no pages behind 61440 bytes of RAM")

    of = rings.of
    rings.of = full  # type: ignore[method-assign, assignment]
    booted.host.write(9, b"hello")
    booted.settle()
    rings.of = of  # type: ignore[method-assign]

    assert any("no pages behind" in line for line in booted.log)
    booted.host.signal(9)
    booted.settle()
    assert len(INBOXES[channel.handle]) == 1


def test_random_bytes_in_a_ring(booted: World) -> None:
    """Rings full of noise, indices and all: every channel is refused or empty, none kills its processor."""
    rng = random.Random(1)
    for relid in range(1, 40):
        booted.host.device(relid)
    booted.settle()
    for relid in range(1, 40):
        channel = booted.channel(relid)
        booted.host.memory.write(inbound(channel) + 4096, rng.randbytes(512))
        poke(booted, inbound(channel) + WRITE_INDEX, rng.choice((8, 64, 512, rng.getrandbits(32))))
        poke(booted, inbound(channel) + PENDING_SEND_SZ, rng.getrandbits(32))
        booted.host.signal(relid)
    booted.settle()

    assert sum(booted.refused().values()) > 20
    assert booted.shut_down() == {}


def test_drain_of_nothing(booted: World, channel: Channel) -> None:
    """An interrupt without data is harmless."""
    booted.host.signal(9)
    booted.settle()

    assert booted.call(lambda current: vmbus_drain(current, channel)) == []
    assert booted.refused() == {}
