"""The message tasklet against a host that sends what it likes: dropped, counted, and the slot is given back."""

from __future__ import annotations

import random

import pytest

from emu.wire.messages import MAX_MESSAGE_SIZE, MESSAGES, MessageType, RescindChannelOffer, UnloadResponse
from emu.wire.synic import HVMSG_NONE, HVMSG_TIMER_EXPIRED, VMBUS_MESSAGE_SINT
from guestproc.kernel.layout import ChannelState
from guestproc.vmbus.message_dpc import vmbus_signal_eom
from tests.guestproc.world import World

T = MessageType


def slot_of(world: World, cpu: int = 0) -> int:
    """GPA of a CPU's SINT2 slot."""
    gpa: int = world.tables.cpus.at(cpu).synic_message_page_gpa
    return gpa + VMBUS_MESSAGE_SINT * 256


def message_type(world: World, cpu: int = 0) -> int:
    """Type in a CPU's slot."""
    return world.tables.ram.atomics.load_u32(slot_of(world, cpu))


def still_alive(world: World) -> None:
    """The slot is empty, nothing is lost, and a device can be offered."""
    assert message_type(world) == HVMSG_NONE
    world.host.device(500)
    world.settle()
    assert world.channel(500).state.load() == ChannelState.OPENED_STATE
    assert world.tables.connection.offer_in_progress.load() == 0
    assert world.shut_down() == {}


@pytest.mark.parametrize("era", ["current", "seed"])
@pytest.mark.parametrize("msgtype", range(34))
def test_every_type_cut_at_every_length(booted: World, msgtype: int) -> None:
    """Zeros behind the type: too short, without handler, unknown or meaningless, the guest goes on."""
    for size in (*range(44), 60, 100, 195, 196, 197, 239, MAX_MESSAGE_SIZE):
        booted.host.send(msgtype.to_bytes(4, "little").ljust(max(4, size), b"\0")[: max(4, size)])
    booted.settle()

    still_alive(booted)


@pytest.mark.parametrize("era", ["current", "seed"])
def test_random_messages(booted: World) -> None:
    """A thousand messages of random bytes behind a type that mostly exists."""
    rng = random.Random(1)
    for _ in range(1_000):
        msgtype = rng.randrange(1, 30) if rng.random() < 0.95 else rng.getrandbits(32)
        booted.host.send(msgtype.to_bytes(4, "little") + rng.randbytes(rng.randrange(MAX_MESSAGE_SIZE - 3)))
    booted.settle()

    assert message_type(booted) == HVMSG_NONE
    assert booted.tables.connection.offer_in_progress.load() == 0
    assert booted.tables.requests.in_use == 0
    assert booted.shut_down() == {}


def test_complaints_are_logged_once(booted: World) -> None:
    """WARN_ONCE: the first of a rule, then the tenth and the hundredth; the others are counted."""
    for _ in range(150):
        booted.host.send((77).to_bytes(8, "little"))
    booted.settle()

    assert booted.refused()["unknown-msgtype"] == 150
    assert [line for line in booted.log if "msgtype=77" in line] == [
        "vmbus_on_msg_dpc: unknown msgtype=77 [unknown-msgtype]",
        "vmbus_on_msg_dpc: unknown msgtype=77 [unknown-msgtype] (10 times)",
        "vmbus_on_msg_dpc: unknown msgtype=77 [unknown-msgtype] (100 times)",
    ]


def test_payload_size_beyond_a_message(booted: World) -> None:
    """255 bytes are claimed in a slot of 240: dropped, as the size is looked at before the bytes."""
    atomics, slot = booted.tables.ram.atomics, slot_of(booted)
    octets = booted.tables.ram.octets
    octets[slot + 4 : slot + 20] = bytes([255, 0, 0, 0]) + bytes(8) + (2).to_bytes(4, "little")
    atomics.store_u32(slot, 1)
    booted.partition.request_interrupt(booted.cpus[0].position, 0xF3)
    booted.settle()

    assert booted.refused() == {"message-too-long": 1}
    still_alive(booted)


def test_messages_without_a_handler_are_dropped_silently(booted: World) -> None:
    """What only a host receives, and TL_CONNECT_RESULT: no work record, no line, the slot is free."""
    for spec in MESSAGES.values():
        handled = spec.min_payload_len or spec.type in (T.ALLOFFERS_DELIVERED, T.UNLOAD_RESPONSE)
        if spec.type < 25 and not handled:
            booted.host.send(int(spec.type).to_bytes(4, "little").ljust(240, b"\0"))
    lines = len(booted.log)
    booted.settle()

    assert len(booted.log) == lines
    assert booted.tables.work.in_use == 0
    still_alive(booted)


@pytest.mark.parametrize("era", ["current", "seed"])
def test_no_work_record_leaves_the_message_in_the_slot(booted: World) -> None:
    """As in the kernel: no end of message; whatever brings the next interrupt makes the tasklet try again (B3)."""
    taken = []
    while (record := booted.tables.work.alloc()) is not None:
        taken.append(record)
    booted.host.device(9)
    booted.host.device(10)
    booted.settle()
    assert message_type(booted) != HVMSG_NONE
    assert booted.tables.connection.offer_in_progress.load() == 0
    for record in taken:
        booted.tables.work.free(record)
    booted.settle()
    assert message_type(booted) != HVMSG_NONE  # memory is back, nothing moves

    booted.partition.request_interrupt(booted.cpus[0].position, 0xF3)
    booted.settle()

    assert [booted.channel(relid).state.load() for relid in (9, 10)] == [ChannelState.OPENED_STATE] * 2


def test_message_is_read_once(booted: World) -> None:
    """A host that rewrites the slot behind the tasklet's copy changes nothing any more (races.md I1)."""
    booted.host.send(RescindChannelOffer(3))
    booted.host.step()
    octets, slot = booted.tables.ram.octets, slot_of(booted)
    take = booted.currents[0].tables.work_queues.allocate

    def rewrite(*arguments, **options):  # type: ignore[no-untyped-def]
        octets[slot + 4 : slot + 256] = b"\xff" * 252
        return take(*arguments, **options)

    booted.tables.work_queues.allocate = rewrite  # type: ignore[method-assign]
    booted.settle()
    booted.tables.work_queues.allocate = take  # type: ignore[method-assign]

    assert booted.refused() == {}
    assert [event.arguments[0] for event in booted.events if event.name == "rescind"] == [3]


def test_end_of_message_of_a_slot_that_was_refilled(booted: World) -> None:
    """Somebody else emptied and refilled it: it is theirs, and no EOM is ours."""
    hv_cpu = booted.currents[0].percpu
    assert hv_cpu is not None
    booted.tables.ram.atomics.store_u32(slot_of(booted), 5)
    booted.events.clear()

    booted.call(lambda current: vmbus_signal_eom(current, hv_cpu, 1))

    assert message_type(booted) == 5
    assert booted.event_names() == []


def test_timer_message_is_handled_in_the_interrupt(booted: World) -> None:
    """Clock event and end of message in the ISR, without the tasklet, whatever waits behind it."""
    booted.host.send(UnloadResponse())
    octets, slot = booted.tables.ram.octets, slot_of(booted)
    octets[slot + 4 : slot + 40] = bytes([24]) + bytes(35)
    booted.tables.ram.atomics.store_u32(slot, HVMSG_TIMER_EXPIRED)
    booted.host.step()  # finds the slot busy, sets the pending bit
    booted.events.clear()
    booted.partition.request_interrupt(booted.cpus[0].position, 0xF3)
    booted.settle()

    assert booted.tables.cpus.at(0).clock_events == 1
    first = booted.event_names().index("slot_free")
    assert booted.events[first].arguments[1] == HVMSG_TIMER_EXPIRED
    assert "tasklet_run" not in booted.event_names()[:first]
    assert booted.event_names()[first + 1] == "eom"
    assert booted.tables.connection.unload_event.done == 1  # the message behind it came


def test_replies_that_answer_nothing_are_ignored(booted: World) -> None:
    """Every reply the host has, unasked, and for channels that are there."""
    booted.host.device(9)
    booted.settle()
    for msgtype in (6, 10, 12, 15, 17, 24):
        for relid in (0, 9, 0xFFFF):
            words = [msgtype, 0, relid, relid, 0]
            booted.host.send(b"".join(word.to_bytes(4, "little") for word in words).ljust(24, b"\0"))
    booted.settle()

    assert booted.refused() == {}
    still_alive(booted)
