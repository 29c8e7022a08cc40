"""A channel's states against every step, and what is written down about its rings."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest

from guestproc.kernel.layout import Channel, ChannelState, KernelTables
from guestproc.kernel.page_records import PageRun
from guestproc.protocol import opening
from guestproc.protocol.opening import RingPages

S = ChannelState
STEPS: dict[str, tuple[Callable[[Channel], object], dict[ChannelState, ChannelState]]] = {
    "begin": (opening.begin, {S.OPEN_STATE: S.OPENING_STATE}),
    "begin_close": (opening.begin_close, {S.OPENED_STATE: S.OPEN_STATE}),
}


@pytest.fixture
def channel(tables: KernelTables) -> Channel:
    """A channel that was offered."""
    channel = tables.channels.alloc()
    assert channel is not None
    return channel


@pytest.mark.parametrize(("step", "state"), list(product(STEPS, S)))
def test_each_step_in_each_state(channel: Channel, step: str, state: ChannelState) -> None:
    """A step is made from its own state only, and says so; from any other nothing changes."""
    act, edges = STEPS[step]
    channel.state.store(state)

    assert bool(act(channel)) == (state in edges)
    assert channel.state.load() == edges.get(state, state)


def test_end_of_an_opening(channel: Channel) -> None:
    """Open, or closed again; only open is open."""
    opening.opened(channel)
    assert channel.state.load() == S.OPENED_STATE
    assert opening.is_open(channel)
    opening.failed(channel)
    assert channel.state.load() == S.OPEN_STATE
    assert not opening.is_open(channel)


def test_callback_is_set_and_taken(channel: Channel) -> None:
    """Number and context together; taken away, the number is 0."""
    opening.set_callback(channel, 16, 99)
    assert (channel.onchannel_callback, channel.channel_callback_context) == (16, 99)
    opening.take_callback(channel)
    assert channel.onchannel_callback == 0


def test_open_message_carries_the_channels_words(channel: Channel) -> None:
    """openid is the relid, as Linux has it; user data is filled up to 120 bytes."""
    channel.relid = 9
    channel.ringbuffer_gpadlhandle = 0xE1E10
    channel.target_vp = 13
    channel.ringbuffer_send_offset = 16

    message = opening.open_message(channel, b"user")

    assert (message.child_relid, message.openid, channel.openid) == (9, 9, 9)
    assert (message.ringbuffer_gpadlhandle, message.target_vp) == (0xE1E10, 13)
    assert message.downstream_ringbuffer_pageoffset == 16
    assert message.userdata == b"user" + bytes(116)
    assert len(message.pack()) == 148


@pytest.mark.parametrize("pages", [RingPages(PageRun(100, 6, 3)), RingPages(PageRun(90, 1, 4), scattered=6)])
def test_rings_are_forgotten_as_they_were_noted(channel: Channel, pages: RingPages) -> None:
    """What is to be freed is what was had, once; a channel without rings has nothing to free."""
    opening.note_rings(channel, 2, 4, 100 << 12, pages)

    assert (channel.ring_send_pages, channel.ring_recv_pages, channel.ringbuffer_send_offset) == (2, 4, 2)
    assert channel.ring_generation == pages.run.generation
    assert bool(channel.ring_pfns_gpa) == bool(pages.scattered)
    assert opening.forget_rings(channel) == pages
    assert opening.forget_rings(channel) is None
    assert (channel.ring_gpa, channel.ring_pfns_gpa) == (0, 0)
