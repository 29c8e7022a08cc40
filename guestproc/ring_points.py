"""Rings of a guest that runs schedules: the same words and the same ends, with sync points and with old mistakes.

Chosen when a process maps a ring; a ring of any other machine has no trace of this in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from struct import pack
from typing import TYPE_CHECKING, Final

from emu.errors import RingFull
from emu.ring import Packet, RingConsumer, RingMemory, RingProducer, RingWords
from emu.ring_memory import Payload
from emu.stale_reads import StaleReads, TooOld
from emu.syncpoint import Point
from emu.tracing import E_STALE_READ, Side
from emu.wire.packets import VM_PKT_DATA_INBAND
from emu.wire.ring_layout import CONTROL_PAGE_SIZE
from guestproc.kernel.layout import Channel
from guestproc.kernel.page_records import PAGE_SHIFT
from guestproc.kernel.pages import owner_text
from guestproc.vmbus.connection import vmbus_setevent

if TYPE_CHECKING:
    from guestproc.current import Current

_IN_CALLBACK: Final = int(Point.CHAN_IN_CALLBACK)
_AFTER_CALLBACK: Final = int(Point.CHAN_AFTER_CALLBACK)
_AFTER_PENDING_READ: Final = int(Point.RING_AFTER_PENDING_READ)
_BODY_PREFETCHED: Final = int(Point.RING_BODY_PREFETCHED)

SWITCHES: Final = ("recheck_after_unmask", "read_side_order", "close_quiesces", "acquire_write_index")
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

    if current.fix.variant == "mask_abuse":
        # Wrong on purpose (races.md D2): that a reader wants no interrupts says nothing about the writer.
        load_mask = words.load_mask
        return replace(words, load_pending=lambda: 0 if load_mask() else load_and_reach())
    if current.fix.variant == "stale_write_index":
        return _with_old_write_index(words, load_and_reach)

    # Wrong on purpose (races.md D2, stale_pending): what the writer wishes is read before read_index is stored, and
    # acted on behind it. A writer that comes in between sees the old index, and is not seen.
    def store_too_late(index: int) -> None:
        nonlocal early
        early = load_and_reach()
        store_read(index)

    return replace(words, store_read=store_too_late, load_pending=lambda: early)


def _with_old_write_index(words: RingWords, load_pending: Callable[[], int]) -> RingWords:
    """Wrong on purpose (races.md D2, stale_write_index): whether the room was there before, an old index is asked.

    Behind the wish comes the write_index that the reader began with. What was written since makes the room smaller.
    """
    load_write = words.load_write
    begun, asks = load_write(), False

    def wish() -> int:
        nonlocal asks
        wanted = load_pending()
        asks = wanted != 0
        return wanted

    def write_index() -> int:
        nonlocal asks, begun
        if asks:
            asks = False
        else:
            begun = load_write()
        return begun

    return replace(words, load_pending=wish, load_write=write_index)


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


def early_bytes(current: Current, relid: int, memory: RingMemory, words: RingWords) -> RingMemory | None:
    """Load a ring's bytes before its write_index, as a processor may; a ring of these bytes if they may be used.

    The bytes are one word of `StaleReads`, the index is another. The host stores bytes, then releases the index. With
    an acquire the early bytes are refused as soon as the index says that there are newer ones; without (races.md D5,
    wrong on purpose) nothing orders the two loads.
    """
    shim = StaleReads()
    before = words.load_write()
    chosen = shim.store("host", "bytes", data_of(memory))
    shim.store("host", "write_index", before, release=True)
    current.reach(_BODY_PREFETCHED, relid)
    after = words.load_write()
    if after == before:
        return None  # whatever was loaded is what is there
    shim.store("host", "bytes", None)
    shim.store("host", "write_index", after, release=True)
    shim.load("guest", "write_index", acquire=current.fix.acquire_write_index)
    try:
        data = shim.load("guest", "bytes", chosen=chosen)
    except TooOld:
        data = None
    current.record(E_STALE_READ, relid, Side.TO_GUEST, words.load_read(), after, data is None)
    return None if data is None else RingMemory.on(bytearray(CONTROL_PAGE_SIZE) + data)


def data_of(memory: RingMemory) -> bytes:
    """What lies in a ring now."""
    count = memory.data_size >> 3
    return pack(f"<{count}Q", *[memory.headers[number] for number in range(count)])


class PointedConsumer(RingConsumer):
    """A guest's reader with points inside the callback and behind it, D1's way to leave, and a look at its pages."""

    __slots__ = ("_current", "_epoch", "_mask", "_relid", "_unmask")

    def __init__(self, current: Current, channel: Channel, memory: RingMemory, words: RingWords) -> None:
        super().__init__(memory, sole=False, words=inbound_words(current, words, channel.relid))
        self._current = current
        self._relid = channel.relid
        self._epoch = RingEpoch(current, channel)
        self.read_lone, self.emptied = _none_alone, _never
        self._mask, self.begin_read = self.begin_read, self._begin_read
        self._unmask, self.end_read = self.end_read, self._end_read

    def read_many(self, limit: int | None = None, most_bytes: int | None = None) -> list[Packet]:
        """As `RingConsumer`, from pages that are the channel's still.

        Where somebody is to be held with the bytes loaded early, these may be what is read.
        """
        armed = self._current.armed
        if armed[_IN_CALLBACK]:
            self._current.reach(_IN_CALLBACK, self._relid)
        self._epoch.check("a read")
        if not armed[_BODY_PREFETCHED]:
            return super().read_many(limit, most_bytes)
        early = early_bytes(self._current, self._relid, self.memory, self.words)
        if early is None:
            return super().read_many(limit, most_bytes)
        stale = RingConsumer(early, sole=False, words=self.words)
        packets = stale.read_many(limit, most_bytes)
        self.fault = stale.fault
        self.signal_owed |= stale.take_signal()
        return packets

    def _begin_read(self) -> None:
        """As `RingConsumer`."""
        self._epoch.check("the mask")
        self._mask()

    def _end_read(self) -> int:
        """As `RingConsumer`; wrong on purpose (races.md D1): unmask, and leave without another look."""
        if self._current.armed[_AFTER_CALLBACK]:
            self._current.reach(_AFTER_CALLBACK, self._relid)
        self._epoch.check("the unmask")
        left = self._unmask()
        return left if self._current.fix.recheck_after_unmask else 0


def _none_alone() -> None:
    """`read_lone` where every reading is to have its points: `read_many`."""


def _never() -> bool:
    """`emptied` there: the look that finds nothing has its points, too."""
    return False


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
