"""Rings of a guest that runs schedules: the same words and the same ends, with sync points and with old mistakes.

Chosen when a process maps a ring; a ring of any other machine has no trace of this in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from emu.errors import RingFull
from emu.ring import Packet, RingConsumer, RingMemory, RingProducer, RingWords
from emu.ring_memory import Payload
from emu.syncpoint import Point
from emu.wire.packets import VM_PKT_DATA_INBAND
from guestproc.kernel.layout import Channel
from guestproc.kernel.pages import PAGE_SHIFT, owner_text
from guestproc.vmbus.connection import vmbus_setevent

if TYPE_CHECKING:
    from guestproc.current import Current
    from guestproc.kernel.layout import Channel

_IN_CALLBACK: Final = int(Point.CHAN_IN_CALLBACK)
_AFTER_CALLBACK: Final = int(Point.CHAN_AFTER_CALLBACK)
_AFTER_PENDING_READ: Final = int(Point.RING_AFTER_PENDING_READ)

SWITCHES: Final = ("recheck_after_unmask", "read_side_order", "close_quiesces")
"""Of those that are off, the wrong way is here."""


def has_points(current: Current) -> bool:
    """Whether this guest's rings are to be mapped with points."""
    return current.machine.races or any(not getattr(current.fix, name) for name in SWITCHES)


def inbound_words(current: Current, words: RingWords, relid: int) -> RingWords:
    """The words of a reader's ring: the point behind the load of pending_send_sz, and D2's order."""
    load_pending, store_read = words.load_pending, words.store_read
    early = 0

    def load_and_reach() -> int:
        wish = load_pending()
        if current.armed[_AFTER_PENDING_READ]:
            current.reach(_AFTER_PENDING_READ, relid)
        return wish

    if current.fix.read_side_order:
        return replace(words, load_pending=load_and_reach)

    # Wrong on purpose (races.md D2, stale_pending): what the writer wishes is read before read_index is stored, and
    # acted on behind it. A writer that comes in between sees the old index, and is not seen.
    def store_too_late(index: int) -> None:
        nonlocal early
        early = load_and_reach()
        store_read(index)

    return replace(words, store_read=store_too_late, load_pending=lambda: early)


class RingEpoch:
    """The allocation that a channel's ring pages came from: whoever uses them after it has ended is wrong."""

    __slots__ = ("_generation", "_pages", "_pfn", "_relid")

    def __init__(self, current: Current, channel: Channel) -> None:
        self._pages = current.tables.pages
        self._pfn = (channel.ring_pfns_gpa or channel.ring_gpa) >> PAGE_SHIFT
        self._generation = channel.ring_generation
        self._relid = channel.relid

    def check(self, what: str) -> None:
        """An assertion where the pages were given back (races.md E1)."""
        if not self._pages.is_live(self._pfn, self._generation):
            owner = owner_text(self._pages.owner_of(self._pfn))
            raise AssertionError(f"INV-13: {what} of relid {self._relid}: page {self._pfn:#x} of its ring is {owner}")


class PointedConsumer(RingConsumer):
    """A guest's reader with points inside the callback and behind it, D1's way to leave, and a look at its pages."""

    __slots__ = ("_current", "_epoch", "_relid")

    def __init__(self, current: Current, channel: Channel, memory: RingMemory, words: RingWords) -> None:
        super().__init__(memory, sole=False, words=inbound_words(current, words, channel.relid))
        self._current = current
        self._relid = channel.relid
        self._epoch = RingEpoch(current, channel)

    def read_many(self, limit: int | None = None, most_bytes: int | None = None) -> list[Packet]:
        """As `RingConsumer`, from pages that are the channel's still."""
        if self._current.armed[_IN_CALLBACK]:
            self._current.reach(_IN_CALLBACK, self._relid)
        self._epoch.check("a read")
        return super().read_many(limit, most_bytes)

    def begin_read(self) -> None:
        """As `RingConsumer`."""
        self._epoch.check("the mask")
        super().begin_read()

    def end_read(self) -> int:
        """As `RingConsumer`; wrong on purpose (races.md D1): unmask, and leave without another look."""
        if self._current.armed[_AFTER_CALLBACK]:
            self._current.reach(_AFTER_CALLBACK, self._relid)
        self._epoch.check("the unmask")
        left = super().end_read()
        return left if self._current.fix.recheck_after_unmask else 0


class EagerProducer(RingProducer):
    """A guest's writer that signals at each write; wrong on purpose (races.md D3).

    Whether the reader needs one, it does not ask; and it signals even when the ring was full and nothing was written.
    """

    __slots__ = ()

    def __init__(self, current: Current, channel: Channel, memory: RingMemory, words: RingWords) -> None:
        super().__init__(memory, sole=False, words=words)
        write, write_many = self.write, self.write_many

        def write_and_signal(
            payload: Payload, trans_id: int = 0, flags: int = 0, packet_type: int = VM_PKT_DATA_INBAND
        ) -> bool:
            try:
                write(payload, trans_id, flags, packet_type)
            except RingFull:
                vmbus_setevent(current, channel)
                raise
            return True

        def write_many_and_signal(
            payloads: Sequence[Payload],
            first_trans_id: int | Iterable[int] = 0,
            flags: int = 0,
            packet_type: int = VM_PKT_DATA_INBAND,
        ) -> tuple[int, bool]:
            return write_many(payloads, first_trans_id, flags, packet_type)[0], True

        self.write, self.write_many = write_and_signal, write_many_and_signal
