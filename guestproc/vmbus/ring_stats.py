"""`hv_ringbuffer_get_debuginfo`: the words of a channel's rings, as who reads `in_mask` or `read_avail` has them.

It reads under ring_buffer_mutex, under which a closer takes the rings away: whoever reads them keeps their pages.
"""

from __future__ import annotations

from struct import unpack_from
from typing import TYPE_CHECKING, Final

from emu.memory import PAGE_SHIFT
from emu.syncpoint import Point
from emu.wire.ring_layout import INTERRUPT_MASK, READ_INDEX, WRITE_INDEX
from guestproc.protocol import opening
from guestproc.ring_points import RingEpoch

if TYPE_CHECKING:
    from guestproc.current import Current
    from guestproc.kernel.layout import Channel

RingDebugInfo = dict[str, int]
"""`current_interrupt_mask`, `current_read_index`, `current_write_index` of one ring, the indices in bytes."""
_RING_STATS: Final = int(Point.RING_STATS)
_WORDS: Final = (
    ("current_interrupt_mask", INTERRUPT_MASK),
    ("current_read_index", READ_INDEX),
    ("current_write_index", WRITE_INDEX),
)


def hv_ringbuffer_get_debuginfo(current: Current, channel: Channel) -> tuple[RingDebugInfo, RingDebugInfo] | None:
    """The outbound and the inbound ring of an open channel; None: it has none."""
    if not current.fix.close_quiesces and current.fix.variant == "stats_reader":
        # Wrong on purpose (races.md E1): found open, and read with nothing that keeps the pages.
        return _read(current, channel)
    with channel.ring_buffer_mutex.hold(current.actor):
        return _read(current, channel)


def _read(current: Current, channel: Channel) -> tuple[RingDebugInfo, RingDebugInfo] | None:
    if not channel.ring_gpa or not opening.is_open(channel):
        return None
    epoch, pfns, send = RingEpoch(current, channel), current.rings.pfns(channel), channel.ring_send_pages
    outbound, inbound = (pfns[first] << PAGE_SHIFT for first in (0, send))
    if current.armed[_RING_STATS]:
        current.reach(_RING_STATS, channel.relid)
    epoch.check("a look at the indices")
    return _words_at(current, outbound), _words_at(current, inbound)


def _words_at(current: Current, gpa: int) -> RingDebugInfo:
    buffer = current.tables.ram.buffer
    return {name: unpack_from("<I", buffer, gpa + offset)[0] for name, offset in _WORDS}
