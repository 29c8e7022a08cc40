"""A channel's way from closed to open and back: states, callback, rings (reference 3.12).

    OPEN_STATE --begin--> OPENING_STATE --opened--> OPENED_STATE --begin_close--> OPEN_STATE
                              |--failed--> OPEN_STATE

Whoever leaves a state by compare-and-swap is the only one to open, or to close. The callback is read by the
ISR under sched_lock, so it is changed under it.
"""

from __future__ import annotations

from dataclasses import dataclass

from emu.wire.messages import MAX_USER_DEFINED_BYTES, OpenChannel
from guestproc.kernel.layout import Channel, ChannelState
from guestproc.kernel.pages import PageRun

OPEN = int(ChannelState.OPEN_STATE)
OPENING = int(ChannelState.OPENING_STATE)
OPENED = int(ChannelState.OPENED_STATE)


def begin(channel: Channel) -> bool:
    """OPEN → OPENING for one opener; False for a channel that is not closed."""
    return channel.state.cas(OPEN, OPENING) == OPEN


def opened(channel: Channel) -> None:
    """The host said yes."""
    channel.state.store(OPENED)


def failed(channel: Channel) -> None:
    """Closed again, and may be opened once more."""
    channel.state.store(OPEN)


def begin_close(channel: Channel) -> bool:
    """OPENED → OPEN for one closer; False for a channel that is not open."""
    return channel.state.cas(OPENED, OPEN) == OPENED


def set_callback(channel: Channel, callback: int, context: int) -> None:
    """Under sched_lock: what the ISR and the tasklet call from now on."""
    channel.onchannel_callback = callback
    channel.channel_callback_context = context


def take_callback(channel: Channel) -> None:
    """Under sched_lock: nothing any more."""
    channel.onchannel_callback = 0


def is_open(channel: Channel) -> bool:
    """Open on the host, so that there are rings to use."""
    return channel.state.load() == OPENED


def open_message(channel: Channel, userdata: bytes) -> OpenChannel:
    """OPENCHANNEL for a channel whose ring GPADL is established; openid is the relid, as Linux has it."""
    channel.openid = channel.relid
    return OpenChannel(
        child_relid=channel.relid,
        openid=channel.openid,
        ringbuffer_gpadlhandle=channel.ringbuffer_gpadlhandle,
        target_vp=channel.target_vp,
        downstream_ringbuffer_pageoffset=channel.ringbuffer_send_offset,
        userdata=userdata.ljust(MAX_USER_DEFINED_BYTES, b"\0"),
    )


# -- rings --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RingPages:
    """Which pages a channel's rings have: one run, or (`scattered` of them) single pages that `run` lists."""

    run: PageRun
    scattered: int = 0


def note_rings(channel: Channel, send_pages: int, recv_pages: int, first_gpa: int, pages: RingPages) -> None:
    """Write down the rings' pages (`ringbuffer_page`, `ringbuffer_send_offset`)."""
    channel.ring_generation = pages.run.generation
    channel.ring_pfns_gpa = pages.run.gpa if pages.scattered else 0
    channel.ring_send_pages = send_pages
    channel.ring_recv_pages = recv_pages
    channel.ringbuffer_send_offset = send_pages
    channel.ring_gpa = first_gpa


def forget_rings(channel: Channel) -> RingPages | None:
    """Under outbound_ring_lock: the channel has no rings any more; the pages to free, None for none."""
    gpa, listing, generation = channel.ring_gpa, channel.ring_pfns_gpa, channel.ring_generation
    if not gpa:
        return None
    count = channel.ring_send_pages + channel.ring_recv_pages
    channel.ring_gpa = channel.ring_pfns_gpa = 0
    channel.ring_send_pages = channel.ring_recv_pages = 0
    if listing:
        return RingPages(PageRun(listing >> 12, -(-8 * count // 4096), generation), count)
    return RingPages(PageRun(gpa >> 12, count, generation))
