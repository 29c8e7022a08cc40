"""Who sleeps, and for what: one record for each wait."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from guestproc.kernel.records import Atomic32, Record, Word, field_of


class WaiterState(IntEnum):
    """Waker and waiter each leave WAITING by compare-and-swap; the loser frees nothing."""

    WAITING = 1
    WOKEN = 2
    ABANDONED = 3


class Waiter(Record):
    """One actor's announcement that it sleeps, chained into the object it waits for."""

    state = Atomic32("atomic: a WaiterState; who leaves WAITING decides who frees the record")
    actor = Word(4, "written before the record is announced")
    next = Word(4, "written before the record is announced (index + 1 of the waiter before it)")
    since_ns = Word(8, "written before the record is announced")
    subject = Word(8, "written before the record is announced: GPA of the record that must change, 0: not said")
    until_ns = Word(8, "written by its actor before it blocks: machine time at which it looks again by itself")

    def sleeper(self) -> int:
        """Whose it is, for a report: reads without the check, for it may be given back meanwhile."""
        actor: int = self.words[_WAITER_ACTOR]
        return actor


_WAITER_ACTOR: Final = field_of(Waiter, "actor").offset // 4
