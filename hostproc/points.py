"""How the host comes to a sync point: what is left of one task's step is put aside, and everything else goes on.

The host has one thread, so it never waits there. Whoever comes to a point that is armed hands over the rest of what
it was doing; `serve` does that once the director says go (`emu.syncpoint`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from emu.machine import Machine
from emu.syncpoint import NOT_ARMED, Armed, PointAction, Tickets, director_wakeup
from emu.tracing import E_POINT, Recorder

_HELD: Final = int(PointAction.HELD)
_PASSED: Final = int(PointAction.PASSED)


class NoPoints:
    """The points of a host that runs no schedule: nothing is ever armed."""

    armed: Armed = NOT_ARMED

    def hold(self, point: int, relid: int, rest: Callable[[], object]) -> bool:
        """Whether `rest` was put aside; if not, the caller does it now."""
        del rest
        raise AssertionError(f"sync point {point} (relid {relid}) of a machine that runs no schedule")


class HostPoints(NoPoints):
    """The points of a host whose tasks a director may hold."""

    def __init__(self, machine: Machine, actor: int, trace: Recorder | None) -> None:
        self._tickets: Final = Tickets(machine.control)
        self._actor: Final = actor
        self._trace: Final = trace
        self._director: Final = machine.wakeup(director_wakeup())
        self._bell: Final = machine.control.view.cell_u32(machine.control.points_bell_offset)
        self.armed = self._tickets.armed()
        self.loads: Final = (self._bell.load,)
        self._held: Final[dict[int, tuple[int, int, Callable[[], object]]]] = {}

    def hold(self, point: int, relid: int, rest: Callable[[], object]) -> bool:
        """Put the rest of a step aside if a ticket fits; the director is told."""
        ticket = self._tickets.take(point, self._actor, -1, relid)
        if ticket is None:
            return False
        if (happened := self._tickets.passes(ticket)) is not None:
            self._record(point, happened, relid)
            self._director.post()
            return False
        self._held[ticket] = (point, relid, rest)
        self._record(point, _HELD, relid)
        self._director.post()
        return True

    def serve(self) -> bool:
        """Do the rest of whatever may go on; whether there was anything."""
        if not self._bell.load():
            return False
        # Taken before the tickets are looked at: one that gets its word behind that rings again.
        self._bell.exchange(0)
        ready = [ticket for ticket in self._held if self._tickets.may_go(ticket)]
        for ticket in ready:
            point, relid, rest = self._held.pop(ticket)
            self._tickets.give_back(ticket)
            self._record(point, _PASSED, relid)
            rest()
        return bool(ready)

    def _record(self, point: int, action: int, relid: int) -> None:
        if self._trace is not None:
            self._trace.record(E_POINT, point, action, relid)
