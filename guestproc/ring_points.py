"""Rings of a guest that runs schedules: the same words and the same ends, with sync points and with old mistakes.

Chosen when a process maps a ring; a ring of any other machine has no trace of this in it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from emu.ring import RingConsumer, RingMemory, RingWords
from emu.syncpoint import Point

if TYPE_CHECKING:
    from guestproc.current import Current

_AFTER_CALLBACK: Final = int(Point.CHAN_AFTER_CALLBACK)
_AFTER_PENDING_READ: Final = int(Point.RING_AFTER_PENDING_READ)

SWITCHES: Final = ("recheck_after_unmask", "read_side_order")
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


class PointedConsumer(RingConsumer):
    """A guest's reader with the point between draining and unmasking, and D1's way to leave."""

    __slots__ = ("_current", "_relid")

    def __init__(self, current: Current, relid: int, memory: RingMemory, words: RingWords) -> None:
        super().__init__(memory, sole=False, words=inbound_words(current, words, relid))
        self._current = current
        self._relid = relid

    def end_read(self) -> int:
        """As `RingConsumer`; wrong on purpose (races.md D1): unmask, and leave without another look."""
        if self._current.armed[_AFTER_CALLBACK]:
            self._current.reach(_AFTER_CALLBACK, self._relid)
        left = super().end_read()
        return left if self._current.fix.recheck_after_unmask else 0
