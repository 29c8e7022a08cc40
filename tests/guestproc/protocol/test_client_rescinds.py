"""Who handles a rescind, and who removes the channel at its end: every case of both tables."""

from __future__ import annotations

from itertools import product

import pytest

from emu.wire.messages import MessageType
from guestproc.kernel.layout import Channel, ChannelState, KernelTables
from guestproc.protocol import pending, rescinds
from guestproc.protocol.rescinds import Closing, Removal

STATES = list(ChannelState)


def new_channel(tables: KernelTables, relid: int = 9) -> Channel:
    """A channel that is in the relid table."""
    channel = tables.channels.alloc()
    assert channel is not None
    channel.relid = relid
    tables.relids.publish(channel)
    return channel


def test_channel_is_claimed_once(tables: KernelTables) -> None:
    """The second RESCIND of a channel finds it claimed (races.md A6)."""
    channel = new_channel(tables)

    assert rescinds.find(tables, 9) == channel
    assert [rescinds.claim(channel), rescinds.claim(channel)] == [True, False]


@pytest.mark.parametrize("relid", [0, 8, 2047, 2048, 0xFFFFFFFF])
def test_rescind_of_nothing_finds_nothing(tables: KernelTables, relid: int) -> None:
    """An id that nobody has, or nobody can have."""
    new_channel(tables)

    assert rescinds.find(tables, relid) is None


def test_mark_raises_the_flag_and_names_who_waits(tables: KernelTables) -> None:
    """The requests of this channel, if there are any; others are not touched."""
    channel, other = new_channel(tables), new_channel(tables, 10)
    for waiting in (other, channel):
        request = pending.new_request(tables, MessageType.OPENCHANNEL, channel=waiting.handle)
        assert request is not None
        pending.enter(tables, request)

    found = rescinds.mark(tables, channel)

    assert (channel.rescind.load(), other.rescind.load()) == (1, 0)
    assert [one.waiting_channel for one in found] == [channel.handle]
    assert rescinds.mark(tables, new_channel(tables, 11)) == []


@pytest.mark.parametrize(
    ("device", "callback", "sub", "state"), list(product((False, True), (0, 5), (False, True), STATES))
)
def test_removal_is_decided(tables: KernelTables, device: bool, callback: int, sub: bool, state: ChannelState) -> None:
    """The device goes by its driver's callback or is unregistered; a sub-channel that is not closed waits."""
    channel = new_channel(tables)
    channel.device_obj = 77 if device else 0
    channel.rescind_callback = callback
    channel.primary_channel = 55 if sub else 0
    channel.state.store(state)

    removal = rescinds.decide(channel)

    if device:
        assert removal is (Removal.CALL_DRIVER if callback else Removal.UNREGISTER_DEVICE)
    elif sub and state is not ChannelState.OPEN_STATE:
        assert removal is Removal.LEAVE_TO_CLOSER
    else:
        assert removal is Removal.REMOVE_CHANNEL


@pytest.mark.parametrize(("rescinded", "decided", "state"), list(product((0, 1), (False, True), STATES)))
def test_closer_knows_what_to_do(tables: KernelTables, rescinded: int, decided: bool, state: ChannelState) -> None:
    """Close what is not rescinded; remove what was left to it; leave what its handler removes; else wait."""
    actorless = new_channel(tables)
    actorless.rescind.store(rescinded)
    actorless.state.store(state)
    if decided:
        # A completion's word: the count in its upper half.
        tables.ram.atomics.store_u64(actorless.gpa + _offset("rescind_event"), 1 << 32)

    todo = rescinds.closing(actorless)

    if not rescinded:
        assert todo is Closing.CLOSE
    elif decided:
        assert todo is Closing.CLOSE_AND_REMOVE
    else:
        closed = state in (ChannelState.OPEN_STATE, ChannelState.OFFER_STATE)
        assert todo is (Closing.LEAVE if closed else Closing.AWAIT_RESCIND)


def _offset(name: str) -> int:
    return next(field.offset for field in Channel.FIELDS if field.name == name)
