"""How a thread of the guest comes to a sync point, and waits there (`emu.syncpoint`).

A processor that has its interrupts on takes them meanwhile, as a task or a tasklet that another actor overtakes would;
with interrupts off it stands still, and what comes for it stays pending. Of a processor with several tasks one is held,
and the others go on meanwhile. A worker stands still.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from emu.errors import MachineStopping
from emu.syncpoint import PointAction, Tickets, director_wakeup, ticket_wakeup
from emu.tracing import E_POINT
from guestproc.run_queue import GuestTask
from guestproc.vcpu import Vcpu, WorkerThread

_HELD: Final = int(PointAction.HELD)
_PASSED: Final = int(PointAction.PASSED)


class Points:
    """The points of one thread, in a machine that runs schedules."""

    def __init__(self, hooks: Vcpu | GuestTask | WorkerThread, record: Callable[..., None]) -> None:
        machine = hooks.machine
        self._hooks: Final = hooks
        self._record: Final = record
        self._tickets: Final = Tickets(machine.control)
        self._director: Final = machine.wakeup(director_wakeup())
        self.armed: Final = self._tickets.armed()

    def reach(self, point: int, relid: int = 0, *, still: bool = False) -> None:
        """Come to a point that is armed: pass, or be held until the director says go. MachineStopping ends that.

        `still`: a processor takes no interrupt there, although it could.
        """
        hooks, tickets = self._hooks, self._tickets
        halts = hooks.is_vcpu and not still and not hooks.irqs_disabled()
        ticket = tickets.take(point, hooks.row.number, hooks.cpu, relid, halted=halts)
        if ticket is None:
            return
        if (happened := tickets.passes(ticket)) is not None:
            self._record(E_POINT, point, happened, relid)
            self._director.post()
            return
        self._record(E_POINT, point, _HELD, relid)
        self._director.post()
        if halts and not isinstance(hooks, WorkerThread):
            hooks.wait_interruptible(lambda: tickets.may_go(ticket))
        else:
            self._stand_still(ticket)
        tickets.give_back(ticket)
        self._record(E_POINT, point, _PASSED, relid)

    def _stand_still(self, ticket: int) -> None:
        """Wait for the ticket alone; how often a signal interrupts that is noise, and not recorded."""
        wakeup = self._hooks.machine.wakeup(ticket_wakeup(ticket))
        while not self._tickets.may_go(ticket):
            if self._hooks.stopping():
                raise MachineStopping("the machine stops while an actor is held at a sync point")
            wakeup.block()
