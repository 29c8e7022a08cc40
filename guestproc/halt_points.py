"""A processor's halt in a machine that runs schedules: with the sync point between its look and its sleep.

A real VP is run by a loop of the hypervisor's: is there a message for it? no: enter it, until it exits. Here that loop
is the halt of its process, so races.md B6 is about this: who asks for an interrupt between the look and the sleep.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from emu.interrupt_trace import RecordedHalt
from emu.interrupts import AWAKE, HALTED
from emu.switches import Fix
from emu.syncpoint import Armed, Point
from emu.tracing import Recorder

_AFTER_QUEUE_CHECK = int(Point.HOST_AFTER_QUEUE_CHECK)


class Holder(Protocol):
    """Whose halt it is: its points, once it has any."""

    armed: Armed
    reach: Callable[..., None]


class PointedHalt(RecordedHalt):
    """Polls nothing, so that a schedule finds it where it looks for it; `record_with` and `belong_to` first."""

    __slots__ = ("_announces_first", "_holder")

    def belong_to(self, holder: Holder, fix: Fix) -> None:
        """Be the halt of this processor, with the point between look and sleep."""
        self._holder = holder
        self._announces_first = fix.kick_after_enqueue

    def halt(self, timeout_ns: int) -> None:
        """As `Halt`; wrong on purpose (races.md B6): look, then announce, and sleep without another look."""
        if self._look():
            return
        if self._holder.armed[_AFTER_QUEUE_CHECK]:
            self._holder.reach(_AFTER_QUEUE_CHECK, still=True)
        self._state.store(HALTED)
        if self._announces_first and self._look() and self._state.cas(HALTED, AWAKE) == HALTED:
            return
        self._counters.blocks += 1
        self._counters.flush()
        before = time.monotonic_ns()
        self._sleep(min(timeout_ns / 1e9, self._longest_s))
        self.policy.blocked_for(time.monotonic_ns() - before)


def pointed_halt_of(holder: Holder, fix: Fix, recorder: Recorder, *arguments: Any, **more: Any) -> PointedHalt:
    """A `PointedHalt` of these arguments."""
    halt = PointedHalt(*arguments, **more)
    halt.record_with(recorder)
    halt.belong_to(holder, fix)
    return halt
