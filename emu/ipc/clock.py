"""Machine time: CLOCK_MONOTONIC minus an offset that all processes share, in nanoseconds.

It stands still while somebody holds it (an actor is parked, a process is stopped), jumps when somebody
advances it, and never steps back. Owner module of the clock words in `control`: offset, time of the hold, and
the change word, which says how many holds there are and whether the other two are being written.
"""

from __future__ import annotations

import os
import time
from typing import Final

from emu.ipc.atomics import AtomicView

OFFSET: Final = 0
CHANGE: Final = 8
HELD_AT: Final = 16
WORDS_BYTES: Final = 24

# The change word: bit 0 being written, 15:1 holds, 63:16 a count of changes.
_BUSY: Final = 1
_HOLD: Final = 1 << 1
_HOLDS: Final = 0xFFFE
_CHANGED: Final = 1 << 16
_U64: Final = 1 << 64

_MOST_LOOKS: Final = 20_000
"""A writer that died half way (the launcher, killed in between) must not stop the readers too."""


class MachineClock:
    """Reads machine nanoseconds (u64, 0 at creation); holding and advancing are for director and launcher."""

    __slots__ = ("_cas", "_change", "_held_at", "_known", "_load", "_load_held_at", "_load_offset", "_offset")

    def __init__(self, view: AtomicView, base: int) -> None:
        self._offset = view.cell_u64(base + OFFSET)
        self._change = view.cell_u64(base + CHANGE)
        self._held_at = view.cell_u64(base + HELD_AT)
        self._load = self._change.load
        self._cas = self._change.cas
        self._load_offset = self._offset.load
        self._load_held_at = self._held_at.load
        self._known = (0, _BUSY)
        """Offset, and the change word that it goes with, of a clock that runs: in one, for other threads."""

    def start(self) -> None:
        """Make now time 0 (by the launcher; again, when the machine's words were wiped)."""
        now = time.monotonic_ns()
        self._offset.store(now)
        # A count that no clock here had before: who attached to that one must not take its offset for this one's.
        self._change.store(now * _CHANGED % _U64)

    def now(self) -> int:
        """Machine time in nanoseconds."""
        # Nobody holds or writes, nearly always: one look, and no more than that for a question this frequent. The time
        # before it: a hold or a jump that is in it has changed the word by the time of the look. What is known before
        # the time: if another thread comes to know of a hold in between, this time is from before it.
        offset, change = self._known
        now = time.monotonic_ns()
        if self._load() == change:
            return now - offset
        return self._careful_now()

    def _careful_now(self) -> int:
        """As `now`, for a clock that is held, or being changed."""
        value = 0
        for _ in range(_MOST_LOOKS):
            change = self._load()
            held = change & _HOLDS
            offset, now = self._load_offset(), time.monotonic_ns()
            value = self._load_held_at() if held else (now - offset) % _U64
            # Looked at again: a hold that came and went between the loads above would make time step back.
            if not change & _BUSY and self._load() == change:
                if not held and value < _U64 // 2:
                    # The word's offset is that of a clock older than this computer modulo 2^64; this one is below 0.
                    self._known = now - value, change
                break
            os.sched_yield()
        return value

    def reference_time(self) -> int:
        """Partition reference time in 100 ns units (TLFS "Partition Reference Time")."""
        return self.now() // 100

    @property
    def held(self) -> bool:
        """Whether time stands still now."""
        return bool(self._load() & _HOLDS)

    def hold(self) -> None:
        """Stop the clock; holds nest."""
        change = self._begin()
        if not change & _HOLDS:
            self._held_at.store((time.monotonic_ns() - self._load_offset()) % _U64)
        self._end(change + _HOLD)

    def release(self) -> None:
        """Undo one hold; at the last one time goes on from where it stood."""
        change = self._begin()
        assert change & _HOLDS, "release of a clock that nobody holds"
        if change & _HOLDS == _HOLD:
            self._offset.store((time.monotonic_ns() - self._load_held_at()) % _U64)
        self._end(change - _HOLD)

    def advance(self, nanoseconds: int) -> None:
        """Jump forward, held or not."""
        assert nanoseconds >= 0, f"advance by {nanoseconds} ns"
        change = self._begin()
        self._held_at.fetch_add(nanoseconds)
        self._offset.fetch_sub(nanoseconds)
        self._end(change)

    def _begin(self) -> int:
        """Take the change word: director and launcher may both hold; readers wait these few stores."""
        for _ in range(_MOST_LOOKS):
            change = self._load()
            if not change & _BUSY and self._cas(change, change | _BUSY) == change:
                return change
            os.sched_yield()
        raise AssertionError("the clock's last writer died half way")

    def _end(self, change: int) -> None:
        self._change.store((change + _CHANGED) % _U64)
