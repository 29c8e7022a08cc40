"""A channel's interrupts move to another processor: `target_cpu_store`, in every state and with every host."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from emu.wire.messages import STATUS_UNSUCCESSFUL, MessageType, ModifyChannel, ModifyChannelResponse
from emu.wire.ring_layout import INTERRUPT_MASK
from emu.wire.versions import VERSION_WIN10, VERSION_WIN10_V4_1, VERSION_WIN10_V5_2, VERSION_WIN10_V5_3
from guestproc.current import Current
from guestproc.drivers.echo import claim_channels, release_channel
from guestproc.drivers.echo_inbox import INBOXES
from guestproc.drivers.steering import LEFT
from guestproc.kernel.layout import Channel, ChannelState
from guestproc.protocol import era as eras
from guestproc.vmbus import percpu
from guestproc.vmbus.chan_sched import find_in_table, words_with_flags
from guestproc.vmbus.channel import vmbus_close
from guestproc.vmbus.cpu_hotplug import cpu_down
from guestproc.vmbus.packets import vmbus_sendpacket
from guestproc.vmbus.retarget import target_cpu_store
from tests.guestproc.world import World, new_world

T = MessageType


@pytest.fixture
def channel(booted: World) -> Channel:
    """An open echo channel, relid 9, whose interrupts CPU 0 takes."""
    return open_channel(booted)


def open_channel(world: World, relid: int = 9) -> Channel:
    """An echo device, probed."""
    world.host.device(relid)
    world.settle()
    return world.channel(relid)


def moving(channel: Channel, text: str = "1") -> Callable[[Current], int]:
    """The write, as a task."""
    handle = channel.handle
    return lambda current: target_cpu_store(current, handle, text)


def targets(channel: Channel) -> tuple[int, int]:
    """Its CPU and its VP."""
    return channel.target_cpu.load(), channel.target_vp


def vp(world: World, cpu: int) -> int:
    """VP index of a CPU."""
    index: int = world.tables.cpus.at(cpu).vp_index
    return index


def modified(world: World) -> list[ModifyChannel]:
    """What the host was asked."""
    return [message for message in world.host.posted if isinstance(message, ModifyChannel)]


def test_words_with_flags_are_found_wherever_they_are() -> None:
    """Every word that has a flag, and no other."""
    for words in ([], [0], [31], [0, 5, 31], list(range(32))):
        flags = b"".join((1 << word if word in words else 0).to_bytes(8, "little") for word in range(32))
        assert words_with_flags(flags) == words


def test_lanes_that_are_let_go_of_are_made_anew(booted: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is room for so many; whoever is found by its relid is found by its handle, too, so its tasklet has it."""
    monkeypatch.setattr(percpu, "MOST_LANES", 2)
    for relid in (5, 6, 7):
        booted.host.device(relid)
    booted.settle()
    current = booted.currents[0]
    cpu = current.percpu
    assert cpu is not None

    for relid in (5, 6, 7, 5, 6, 7, 7):
        lane = find_in_table(current, cpu, relid)
        assert lane is not None and lane.channel.relid == relid
        assert cpu.lanes[lane.handle] is lane
        assert len(cpu.lanes) <= 2


# -- what goes well -------------------------------------------------------------------------------------


def test_interrupts_come_to_the_other_processor(booted: World, channel: Channel) -> None:
    """The host is told the VP, and what it answers after that is taken there."""
    assert booted.call(moving(channel)) == 0
    booted.events.clear()
    booted.call(lambda current: vmbus_sendpacket(current, channel, b"x" * 8))
    booted.settle()

    assert modified(booted) == [ModifyChannel(9, vp(booted, 1))]
    assert targets(channel) == (1, vp(booted, 1))
    assert [event.actor for event in booted.events if event.name == "vmbus_chan_sched"] == ["vcpu1"]
    assert booted.shut_down() == {}


def test_target_changes_with_the_answer(booted: World, channel: Channel) -> None:
    """From 5.3 on the host answers; until then the channel's target is the old one."""
    booted.host.hold(T.MODIFYCHANNEL)
    task = booted.start(moving(channel))
    booted.settle()
    assert (task.ended(), targets(channel)) == (False, (0, vp(booted, 0)))
    booted.host.release(T.MODIFYCHANNEL)
    booted.settle()

    assert (task.result, targets(channel)) == (0, (1, vp(booted, 1)))


@pytest.mark.parametrize("version", [VERSION_WIN10_V4_1, VERSION_WIN10_V5_2])
def test_before_5_3_nobody_answers(version: int) -> None:
    """It is enough that the message was posted."""
    with new_world(versions={version}) as world:
        world.boot()
        channel = open_channel(world)

        assert (world.call(moving(channel)), targets(channel)) == (0, (1, vp(world, 1)))
        assert world.shut_down() == {}


def test_there_already(booted: World, channel: Channel) -> None:
    """Then nothing is sent; and there and back again are two messages."""
    assert booted.call(moving(channel, "0")) == 0
    assert modified(booted) == []
    assert [booted.call(moving(channel, text)) for text in ("1\n", "0 and more")] == [0, 0]

    assert [message.target_vp for message in modified(booted)] == [vp(booted, 1), vp(booted, 0)]
    assert targets(channel) == (0, vp(booted, 0))


def test_late_interrupt_on_the_old_processor(booted: World, channel: Channel) -> None:
    """One that the host had sent there before it moved is taken there: any processor finds any channel."""
    assert booted.call(moving(channel)) == 0
    event = booted.host.channels[9].event
    assert event is not None
    event.position = booted.cpus[0].position
    booted.events.clear()
    booted.host.write(9, b"late")
    booted.settle()

    assert [event.actor for event in booted.events if event.name == "vmbus_chan_sched"] == ["vcpu0"]
    assert booted.host.channels[9].producer is not None
    assert booted.tables.ram.atomics.load_u32(inbound(channel) + INTERRUPT_MASK) == 0


def inbound(channel: Channel) -> int:
    """GPA of the host-to-guest ring."""
    return channel.ring_gpa + 4096 * channel.ring_send_pages


# -- what is refused ------------------------------------------------------------------------------------


def test_before_4_1_no_channel_moves() -> None:
    """-EIO, and the host hears nothing of it."""
    with new_world(versions={VERSION_WIN10}) as world:
        world.boot()
        channel = open_channel(world)

        assert (world.call(moving(channel)), modified(world)) == (-errno.EIO, [])


@pytest.mark.parametrize(
    ("text", "error"),
    [("", errno.EIO), ("one", errno.EIO), ("-1", errno.EIO), ("٣", errno.EIO), ("9" * 30, errno.EIO)]
    + [("2", errno.EINVAL), ("64", errno.EINVAL)],
)
def test_text_that_names_no_processor(booted: World, channel: Channel, text: str, error: int) -> None:
    """-EIO for what is no number, -EINVAL for a processor that is not there."""
    assert (booted.call(moving(channel, text)), modified(booted)) == (-error, [])


def test_processor_that_is_offline(booted: World, channel: Channel) -> None:
    """-EINVAL."""
    assert booted.call(lambda current: cpu_down(current, 1)) == 0

    assert (booted.call(moving(channel)), modified(booted)) == (-errno.EINVAL, [])


def test_channel_that_is_closed(booted: World, channel: Channel) -> None:
    """-EIO: a host ignores what it gets of it, and nobody would ever answer."""
    booted.call(lambda current: vmbus_close(current, channel))

    assert (booted.call(moving(channel)), modified(booted)) == (-errno.EIO, [])


def test_channel_that_is_gone(booted: World, channel: Channel) -> None:
    """-ENODEV for one that was taken back."""
    task = moving(channel)
    booted.host.rescind(9)
    booted.settle()

    assert (booted.call(task), modified(booted)) == (-errno.ENODEV, [])


def test_host_refuses(booted: World, channel: Channel) -> None:
    """-EIO, and the target is what it was; the channel may be moved later."""
    booted.host.answer[T.MODIFYCHANNEL] = lambda message: [ModifyChannelResponse(9, STATUS_UNSUCCESSFUL)]
    assert (booted.call(moving(channel)), targets(channel)) == (-errno.EIO, (0, vp(booted, 0)))
    del booted.host.answer[T.MODIFYCHANNEL]

    assert booted.call(moving(channel)) == 0


def test_host_that_does_not_answer(booted: World, channel: Channel) -> None:
    """-ETIMEDOUT in the end, and nothing is left of the request."""
    booted.host.hold(T.MODIFYCHANNEL)
    task = booted.start(moving(channel))
    booted.pass_time(46)

    assert (task.result, targets(channel)) == (-errno.ETIMEDOUT, (0, vp(booted, 0)))
    assert booted.tables.requests.in_use == 0


def test_second_move_meanwhile(booted: World, channel: Channel) -> None:
    """-EBUSY: a host takes a second request for a mistake and answers one of the two."""
    booted.host.hold(T.MODIFYCHANNEL)
    first = booted.start(moving(channel))
    booted.settle()
    second = booted.call(moving(channel), cpu=1)
    booted.host.release(T.MODIFYCHANNEL)
    booted.settle()

    assert (second, first.result, len(modified(booted))) == (-errno.EBUSY, 0, 1)


# -- others meanwhile (races.md F5) ---------------------------------------------------------------------


def test_rescind_ends_the_wait(booted: World, channel: Channel) -> None:
    """A host that took the channel back before it handled the message does not answer; the rescind is not held up."""
    booted.host.hold(T.MODIFYCHANNEL)
    task = booted.start(moving(channel))
    booted.settle()
    booted.host.rescind(9)
    booted.settle()

    assert (task.result, booted.host.released) == (-errno.ENODEV, [9])
    assert booted.tables.channels.in_use == booted.tables.requests.in_use == 0


def test_rescind_waits_for_who_holds_the_mutex() -> None:
    """Without `fix.move_under_mutex` (ack_holds_mutex) neither ends."""
    switches = {"move_under_mutex": False, "variant": "ack_holds_mutex"}
    with new_world(versions={VERSION_WIN10_V5_3}, switches=switches) as world:
        world.boot()
        channel = open_channel(world)
        world.host.hold(T.MODIFYCHANNEL)
        task = world.start(moving(channel))
        world.settle()
        world.host.rescind(9)
        world.settle()

        assert (task.ended(), world.host.released, channel.rescind.load()) == (False, [], 0)


def test_offer_goes_on_meanwhile() -> None:
    """Movers and offers share the lock, also while somebody waits to have it alone: a rescind waits for the offer."""
    with new_world(cpus=3, versions={VERSION_WIN10_V5_3}) as world:
        world.boot()
        channel = open_channel(world)
        world.host.hold(T.MODIFYCHANNEL)
        task = world.start(moving(channel))
        world.settle()
        going = world.start(lambda current: cpu_down(current, 1), cpu=2)
        world.settle()
        assert (task.ended(), going.ended()) == (False, False)
        world.host.device(10)
        world.host.rescind(9)
        world.settle()

        assert (task.result, world.host.released) == (-errno.ENODEV, [9])
        # The offer came first, and has the processor that was to go.
        offered = world.channel(10)
        assert (offered.state.load(), offered.target_cpu.load()) == (ChannelState.OPENED_STATE, 1)
        assert going.result == -errno.EBUSY


def test_close_meanwhile(booted: World, channel: Channel) -> None:
    """The host handles both in order; a channel that was closed keeps the target that it was opened for."""
    booted.host.hold(T.MODIFYCHANNEL)
    task = booted.start(moving(channel))
    booted.settle()
    booted.call(lambda current: vmbus_close(current, channel), cpu=1)
    booted.host.send(ModifyChannelResponse(9, 0))
    booted.settle()

    assert (task.result, targets(channel)) == (-errno.EIO, (0, vp(booted, 0)))
    types = [one for one in booted.host.types() if one in (T.MODIFYCHANNEL, T.CLOSECHANNEL)]
    assert types == [T.MODIFYCHANNEL, T.CLOSECHANNEL]


def test_answer_that_nobody_asked_for(booted: World, channel: Channel) -> None:
    """Is ignored."""
    booted.host.send(ModifyChannelResponse(9, 0))
    booted.settle()

    assert targets(channel) == (0, vp(booted, 0))


# -- a kernel with lists of channels (races.md F1) ------------------------------------------------------


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A kernel that never was: the article's lists, and a version that moves channels."""
    kernel = replace(eras.SEED, versions=(VERSION_WIN10_V5_2,))
    monkeypatch.setitem(eras.ERAS, "seed", kernel)
    with new_world(era="seed", versions={VERSION_WIN10_V5_2}) as world:
        world.boot()
        yield world


def test_lists_follow(listed: World) -> None:
    """The old processor takes the channel off its list, the new one puts it on its own; the end finds it there."""
    channel = open_channel(listed)

    assert listed.call(moving(channel)) == 0

    on_lists = [[one.relid for one in listed.tables.chan_list(listed.tables.cpus.at(cpu))] for cpu in range(2)]
    assert on_lists == [[], [9]]
    assert listed.shut_down() == {}


def test_late_interrupt_is_lost_with_lists() -> None:
    """Without `fix.global_relid_map` the old processor clears the flag, and finds no such channel on its list."""
    with new_world(versions={VERSION_WIN10_V5_2}, switches={"global_relid_map": False}) as world:
        world.boot()
        channel = open_channel(world)
        assert world.call(moving(channel)) == 0
        event = world.host.channels[9].event
        assert event is not None
        event.position = world.cpus[0].position
        world.events.clear()
        world.host.write(9, b"late")
        world.settle()

        seen = [event.name for event in world.events if event.name in ("flag_clear", "vmbus_chan_sched")]
        assert seen == ["flag_clear"]


# -- who reads ------------------------------------------------------------------------------------------


def test_what_comes_back_is_read_by_the_claimant(booted: World, channel: Channel) -> None:
    """CPU 0 has claimed it, CPU 1 is interrupted: it leaves the ring masked, and CPU 0 reads it and unmasks."""
    claimed = booted.call(lambda current: claim_channels(current, 0))
    inbox = INBOXES[channel.handle]
    assert booted.call(moving(channel)) == 0
    booted.events.clear()
    booted.call(lambda current: vmbus_sendpacket(current, channel, b"y" * 8))
    booted.settle()

    ran = [event.actor for event in booted.events if event.name == "vmbus_on_event"]
    assert (claimed, ran, [packet[3] for packet in inbox]) == ([channel], ["vcpu1", "vcpu0"], [b"y" * 8])
    assert booted.tables.ram.atomics.load_u32(inbound(channel) + INTERRUPT_MASK) == 0
    assert channel.reader.load() == 1


def test_claim_ends_while_something_was_left(booted: World, channel: Channel) -> None:
    """It is read once more by the one who lets go, so that its ring is not masked for ever."""
    booted.call(lambda current: claim_channels(current, 0))
    assert booted.call(moving(channel)) == 0

    def let_go(current: Current) -> None:
        # As if CPU 1 had left it just now.
        current.rings.of(channel).inbound.begin_read()
        channel.reader.fetch_or(LEFT)
        release_channel(current, channel)

    booted.call(let_go)
    booted.host.write(9, b"z" * 8)
    booted.settle()

    assert channel.reader.load() == 0
    assert booted.tables.ram.atomics.load_u32(inbound(channel) + INTERRUPT_MASK) == 0
    assert booted.tables.ram.atomics.load_u32(inbound(channel)) == booted.tables.ram.atomics.load_u32(
        inbound(channel) + 4
    )


def test_one_reader_at_a_time(booted: World, channel: Channel) -> None:
    """A program on the processor that is interrupted now gets no channel that another one still reads."""
    booted.call(lambda current: claim_channels(current, 0))
    assert booted.call(moving(channel)) == 0
    assert booted.call(lambda current: claim_channels(current, 1), cpu=1) == []
    booted.call(lambda current: release_channel(current, channel))

    assert booted.call(lambda current: claim_channels(current, 1), cpu=1) == [channel]
    booted.call(lambda current: release_channel(current, channel), cpu=1)
    assert booted.shut_down() == {}
