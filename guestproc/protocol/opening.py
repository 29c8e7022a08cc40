"""A channel's way from closed to open and back: states, callback, rings (reference 3.12).

    OPEN_STATE --begin--> OPENING_STATE --opened--> OPENED_STATE --begin_close--> OPEN_STATE
                              |--failed--> OPEN_STATE

Whoever leaves a state by compare-and-swap is the only one to open, or to close. The callback is read by the
ISR under sched_lock, so it is changed under it.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from emu.values import valueclass
from emu.wire.messages import MAX_USER_DEFINED_BYTES, OpenChannel
from guestproc.kernel.layout import Channel, ChannelState
from guestproc.kernel.page_records import PageRun
from guestproc.kernel.records import Fields

_WHERE = Fields(Channel, "ring_gpa", "ring_pfns_gpa")
_RINGS = Fields(
    Channel,
    "ring_generation",
    "ring_send_pages",
    "ring_recv_pages",
    "ringbuffer_gpadlhandle",
    "ringbuffer_send_offset",
)

_CALLBACK: Final = Struct("<IQ")
"""As the record has them: onchannel_callback, channel_callback_context."""

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


def check_callback(callback: int, context: int) -> None:
    """struct.error for numbers that `set_callback` cannot write down, or what is none."""
    _CALLBACK.pack(callback, context)


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
    channel.openid = relid = channel.relid
    _generation, _send, _receive, gpadl, send_offset = _RINGS.read(channel)
    return OpenChannel(
        child_relid=relid,
        openid=relid,
        ringbuffer_gpadlhandle=gpadl,
        target_vp=channel.target_vp,
        downstream_ringbuffer_pageoffset=send_offset,
        userdata=userdata.ljust(MAX_USER_DEFINED_BYTES, b"\0"),
    )


# -- rings --------------------------------------------------------------------------------------------


@valueclass()
class RingPages:
    """Which pages a channel's rings have: one run, or (`scattered` of them) single pages that `run` lists."""

    run: PageRun
    scattered: int = 0


def note_rings(channel: Channel, send_pages: int, recv_pages: int, first_gpa: int, pages: RingPages) -> None:
    """Write down the rings' pages (`ringbuffer_page`, `ringbuffer_send_offset`)."""
    gpadl = channel.ringbuffer_gpadlhandle
    _RINGS.write(channel, pages.run.generation, send_pages, recv_pages, gpadl, send_pages)
    _WHERE.write(channel, first_gpa, pages.run.gpa if pages.scattered else 0)


def ring_pages(channel: Channel) -> tuple[int, int, int, int]:
    """GPA of the rings, GPA of their page list (0: contiguous), pages of the send ring, of the receive ring."""
    gpa, listing = _WHERE.read(channel)
    _generation, send, receive, _gpadl, _offset = _RINGS.read(channel)
    return gpa, listing, send, receive


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
