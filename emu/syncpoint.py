"""Sync points: named places where a schedule can hold an actor, across processes (docs/schedules.md lists them).

A director arms a *ticket* for a point, with filters. The first actor that comes there and fits takes it, says so, and
waits until it is told to go on. Machine time stands still meanwhile. A point that is not armed costs a look at one
byte; a machine without schedules has no tickets at all, and points on the packet path are not in its code.

    ticket   FREE -> ARMED (director) -> ARRIVED (actor) -> GO (director) -> FREE (actor)
             ARMED -> FREE (director: nobody came)
             ARMED -> ARRIVED -> PASSED (actor: it shall not be held, only be seen, or turn a fault on)

Tickets and bytes lie in `control`; their owner module is this one. Who may go on with interrupts off, in a worker or
in a task of the host, differs: each process has its own way to wait (`guestproc.points`, `hostproc.points`).
"""

from __future__ import annotations

import mmap
from enum import Enum, IntEnum
from typing import Final, Self

from emu.control import POINT_BYTES, POINT_TICKETS, TICKET_BYTES, Control
from emu.fault_plan import FaultPlan, PlannedFault

TICKETS: Final = POINT_TICKETS


class Scope(Enum):
    """What a parked actor keeps from going on."""

    TASK = "T"  # this actor only; interrupts of its processor are taken
    INTERRUPTS_OFF = "I"  # its processor: interrupts stay pending
    HOST = "H"  # one task of the host


class PointAction(IntEnum):
    """What a `point` record says: an actor is held there, or goes on; or it was seen there, or turned a fault on."""

    HELD = 1
    PASSED = 2
    SEEN = 3
    FAULT = 4


class Point(IntEnum):
    """Every point: its number, its name, its scope, and where it sits."""

    text: str
    scope: Scope
    where: str

    def __new__(cls, number: int, text: str, scope: Scope, where: str) -> Self:
        """A member is its number, with the rest as attributes."""
        point = int.__new__(cls, number)
        point._value_ = number
        point.text, point.scope, point.where = text, scope, where
        return point

    OFFER_BEFORE_MAP = 1, "g.wq.offer.before_map", Scope.TASK, "offer work: object built, relid table not written"
    ADD_FAILED = 2, "g.wq.add.failed", Scope.TASK, "add work: error path entered"
    RESCIND_WAIT_GATE = 3, "g.wq.rescind.wait_gate", Scope.TASK, "rescind work: waits for the offer counter"
    RESCIND_AFTER_LOOKUP = 4, "g.wq.rescind.after_lookup", Scope.TASK, "rescind work: channel found, not claimed"
    RESCIND_BEFORE_PROBE_WAIT = (
        5,
        "g.wq.rescind.before_probe_wait",
        Scope.TASK,
        "rescind work: before waiting for probe",
    )
    OPEN_BEFORE_LIST_ADD = 6, "g.open.before_list_add", Scope.TASK, "open: request built, not on the waiting list"
    OPEN_BEFORE_POST = 7, "g.open.before_post", Scope.TASK, "open: on the list, OPENCHANNEL not posted"
    OPEN_WAITING = 8, "g.open.waiting", Scope.TASK, "open: about to wait for OPENCHANNEL_RESULT"
    OPEN_TIMEOUT = 9, "g.open.timeout", Scope.TASK, "open: gave up waiting"
    CLOSE_EARLY_RETURN = 10, "g.close.early_return", Scope.TASK, "close: leaves, the channel is not open"
    CLOSE_BEFORE_RING_FREE = 11, "g.close.before_ring_free", Scope.TASK, "close: callback cleared, ring still there"
    MSG_AFTER_PENDING_READ = 12, "g.msg.after_pending_read", Scope.TASK, "message tasklet: pending bit read"
    MSG_BEFORE_ALLOC = 13, "g.msg.before_alloc", Scope.TASK, "message tasklet: before it takes a work record"
    POST_AFTER_FILL = 14, "g.post.after_fill", Scope.TASK, "post: hypercall page filled, not called"
    ISR_ENTER = 15, "g.isr.enter", Scope.INTERRUPTS_OFF, "ISR: entered, nothing read"
    ISR_AFTER_FLAG_LOAD = 16, "g.isr.after_flag_load", Scope.INTERRUPTS_OFF, "ISR: a word of event flags read"
    ISR_AFTER_LOOKUP = 17, "g.isr.after_lookup", Scope.INTERRUPTS_OFF, "ISR: channel of a flag found"
    LIST_AT_NODE = 18, "g.list.at_node", Scope.TASK, "walk of a CPU's channel list: stands on a node"
    CHAN_IN_CALLBACK = 19, "g.chan.in_callback", Scope.TASK, "channel tasklet: inside the driver's callback"
    CHAN_AFTER_CALLBACK = 20, "g.chan.after_callback", Scope.TASK, "channel tasklet: drained, not yet unmasked"
    RING_AFTER_PENDING_READ = 21, "g.ring.r.after_pending_read", Scope.TASK, "ring reader: pending size read"
    RING_BODY_PREFETCHED = 22, "g.ring.r.body_prefetched", Scope.TASK, "ring reader: bytes loaded before the index"
    DRV_LOCK_WAIT = 23, "g.drv.lock_wait", Scope.TASK, "driver: about to wait for the network lock"
    DRV_POLLER_ENABLE = 24, "g.drv.poller_enable", Scope.TASK, "driver: about to enable its poll"
    DRV_BEFORE_TX_STOP = 25, "g.drv.before_tx_stop", Scope.TASK, "driver: decided to stop its queue"
    CPU_PICKED = 26, "g.cpu.picked", Scope.TASK, "offer work: target CPU chosen, not published"
    MOVE_WAIT_ACK = 27, "g.move.wait_ack", Scope.TASK, "move: MODIFYCHANNEL posted"
    HOST_BEFORE_OPEN_RESULT = 28, "h.ctl.before_open_result", Scope.HOST, "host: device open, reply not sent"
    MOVE_CHECKED = 50, "g.move.checked", Scope.TASK, "move: channel found open, MODIFYCHANNEL not posted"
    CHAN_REPLY_FOUND = (
        52,
        "g.chan.reply_found",
        Scope.TASK,
        "channel tasklet: record of a reply found, reply not stored",
    )
    RING_STATS = 51, "g.ring.stats", Scope.TASK, "debug reader: ring found, its indices not read"
    HOST_ON_MODIFY = 29, "h.ctl.on_modify", Scope.HOST, "host: MODIFYCHANNEL received, not applied"
    HOST_STREAM_CLOSED = 30, "h.ctl.stream_closed", Scope.HOST, "host: a device's stream closed, not handled"
    HOST_SLOT_BUSY_SEEN = 31, "h.syn.slot_busy_seen", Scope.HOST, "host: slot read as busy, pending bit not set"
    HOST_TIMER_RETRY = 32, "h.syn.timer_retry", Scope.HOST, "host: timer message refused, the slot is full"
    HOST_AFTER_QUEUE_CHECK = (
        33,
        "h.vp.after_queue_check",
        Scope.INTERRUPTS_OFF,
        "loop that runs a VP: nothing for it, so it sleeps next",
    )
    HOST_OPEN_DONE = 34, "h.vsp.open_done", Scope.HOST, "host: device told that it is open"
    HOST_THROTTLE = 35, "h.vsp.throttle", Scope.HOST, "host: signals without cause over the limit"
    MSG_TAKEN = 36, "g.msg.taken", Scope.TASK, "message tasklet: a message read from its slot, nothing done with it"
    TURN = 37, "g.turn", Scope.TASK, "worker or caller: out of its sleep, it has not looked what woke it"
    HOST_ON_MESSAGE = 38, "h.ctl.on_message", Scope.HOST, "host: a message of the guest's received, not handled"
    HOST_BEFORE_ANSWER = 39, "h.ctl.before_answer", Scope.HOST, "host: device done with what it was asked, not told"


_BY_NUMBER: Final = {int(point): point for point in Point}
BY_TEXT: Final = {point.text: point for point in Point}
"""Points by the name that schedules use."""

Armed = bytes | mmap.mmap
"""A byte for each point, not 0 where a ticket is armed."""
NOT_ARMED: Final = bytes(POINT_BYTES)
"""`armed` of a machine without schedules."""


class Ticket(IntEnum):
    """State of a ticket."""

    FREE = 0
    ARMED = 1
    ARRIVED = 2
    GO = 3
    PASSED = 4


class Action(IntEnum):
    """What becomes of who takes a ticket."""

    HOLD = 0
    SEE = 1
    FAULT = 2


# A ticket, in u32: state, point, actor slot + 1, CPU + 1, relid, hits to let pass; who arrived, with which relid,
# and whether it halts there.
_STATE: Final = 0
_POINT: Final = 4
_ACTOR: Final = 8
_CPU: Final = 12
_RELID: Final = 16
_PASS: Final = 20
_ARRIVED: Final = 24
_ARRIVED_RELID: Final = 28
_HALTED: Final = 32
# What becomes of it (an `Action`), and the row and serial of the fault that it turns on.
_ACTION: Final = 36
_ROW: Final = 40
_SERIAL: Final = 44


def unreachable(_point: int, _relid: int = 0, *, still: bool = False) -> None:
    """`reach` of a machine without schedules: nothing is ever armed there."""
    raise AssertionError("a sync point of a machine that runs no schedule")


class Tickets:
    """The table of tickets, as director and actors see it."""

    def __init__(self, control: Control) -> None:
        self.control = control
        self._view = control.view
        self._base = control.tickets_offset
        self._bytes = control.armed_offset
        self._memory = control.memory
        self._plan = FaultPlan(control)
        self.clock = control.clock

    def armed(self) -> mmap.mmap:
        """A byte a point: how many tickets are armed for it; for actors, as it keeps the segment mapped.

        A mapping of its own, to look at: that takes a tenth less than through a memoryview.
        """
        return mmap.mmap(self.control.segment.fd, POINT_BYTES, prot=mmap.PROT_READ, offset=self._bytes)

    # -- the director's half ------------------------------------------------------------------------

    def arm(
        self,
        point: Point,
        *,
        actor: int = -1,
        cpu: int = -1,
        relid: int = 0,
        skip: int = 0,
        action: Action = Action.HOLD,
        fault: PlannedFault | None = None,
    ) -> int:
        """Arm a free ticket; its number. `actor` is a slot of the process table, `skip` hits pass unheld.

        `fault`, which is put down and off, is what Action.FAULT turns on.
        """
        number = next((n for n in range(TICKETS) if self.state(n) is Ticket.FREE), None)
        assert number is not None, f"all {TICKETS} tickets are in use"
        at = self._at(number)
        for offset, value in (
            (_POINT, point),
            (_ACTOR, actor + 1),
            (_CPU, cpu + 1),
            (_RELID, relid),
            (_PASS, skip),
            (_ACTION, action),
            (_ROW, 0 if fault is None else fault.index),
            (_SERIAL, 0 if fault is None else fault.serial),
            (_ARRIVED, 0),
            (_ARRIVED_RELID, 0),
        ):
            self._view.store_u32(at + offset, value)
        # The filters before the state, the state before the byte: whoever sees the byte finds a whole ticket.
        self._view.store_u32(at, Ticket.ARMED)
        self._count(point)
        return number

    def disarm(self, number: int) -> bool:
        """Take back a ticket that nobody took; False when somebody has."""
        at = self._at(number)
        taken = self._view.cas_u32(at, Ticket.ARMED, Ticket.FREE) != Ticket.ARMED
        self._count(self.point(number))
        return not taken

    def go(self, number: int) -> None:
        """Let whoever arrived go on; the caller wakes it. Machine time goes on with the last of them."""
        assert self.state(number) is Ticket.ARRIVED, f"ticket {number} holds nobody"
        self._count(self.point(number))
        self.clock.release()
        self._view.store_u32(self._at(number), Ticket.GO)

    def state(self, number: int) -> Ticket:
        """What has become of a ticket."""
        return Ticket(self._view.load_u32(self._at(number)))

    def point(self, number: int) -> Point:
        """The point that it is for."""
        return _BY_NUMBER[self._view.load_u32(self._at(number) + _POINT)]

    def arrived(self, number: int) -> tuple[int, int]:
        """Actor number of who took it (0: nobody yet), and the relid that it came with."""
        at = self._at(number)
        return self._view.load_u32(at + _ARRIVED), self._view.load_u32(at + _ARRIVED_RELID)

    def is_halted(self, number: int) -> bool:
        """Whether who arrived is a processor that halts there, so that only an interrupt makes it look."""
        return self._view.load_u32(self._at(number) + _HALTED) != 0

    def parked(self) -> dict[int, int]:
        """Ticket number -> actor number, of everybody who is held now."""
        return {n: self.arrived(n)[0] for n in range(TICKETS) if self.state(n) is Ticket.ARRIVED}

    def clear(self) -> None:
        """Free every ticket, after the machine's processes are gone."""
        for number in range(TICKETS):
            if self.state(number) is Ticket.ARRIVED:
                self.clock.release()
            self._view.store_u32(self._at(number), Ticket.FREE)
        self._memory[self._bytes : self._bytes + POINT_BYTES] = bytes(POINT_BYTES)

    def _count(self, point: Point) -> None:
        """The point's byte: only the director writes it, so it may count afresh."""
        count = sum(self.state(n) is Ticket.ARMED and self.point(n) is point for n in range(TICKETS))
        self._memory[self._bytes + point : self._bytes + point + 1] = bytes([count])

    # -- an actor's half ----------------------------------------------------------------------------

    def take(self, point: int, actor: int, cpu: int, relid: int, *, halted: bool = False) -> int | None:
        """Take a ticket that fits, if one is armed; where it holds its taker machine time stands still from here on.

        `halted`: the actor will wait as a processor that halts.
        """
        for number in range(TICKETS):
            at = self._at(number)
            if self._view.load_u32(at) != Ticket.ARMED or not self._fits(at, point, actor, cpu, relid):
                continue
            if self._view.load_u32(at + _PASS):
                self._view.fetch_sub_u32(at + _PASS, 1)
                continue
            holds = self._view.load_u32(at + _ACTION) == Action.HOLD
            if self._view.cas_u32(at, Ticket.ARMED, Ticket.ARRIVED) == Ticket.ARMED:
                if holds:
                    self.clock.hold()
                self._view.store_u32(at + _HALTED, halted)
                self._view.store_u32(at + _ARRIVED_RELID, relid)
                self._view.store_u32(at + _ARRIVED, actor)
                return number
        return None

    def passes(self, number: int) -> PointAction | None:
        """None: who took this ticket is to be held. Otherwise it goes on, and this is what happened."""
        at = self._at(number)
        action = self._view.load_u32(at + _ACTION)
        if action == Action.HOLD:
            return None
        if action == Action.FAULT:
            self._plan.turn_on(self._view.load_u32(at + _ROW), self._view.load_u32(at + _SERIAL))
        self._view.store_u32(at, Ticket.PASSED)
        return PointAction.FAULT if action == Action.FAULT else PointAction.SEEN

    def may_go(self, number: int) -> bool:
        """Whether a ticket that this actor took says so."""
        return self._view.load_u32(self._at(number)) == Ticket.GO

    def give_back(self, number: int) -> None:
        """The actor goes on."""
        self._view.store_u32(self._at(number), Ticket.FREE)

    def _fits(self, at: int, point: int, actor: int, cpu: int, relid: int) -> bool:
        view = self._view
        return (
            view.load_u32(at + _POINT) == point
            and view.load_u32(at + _ACTOR) in (0, (actor & 0xFFF) + 1)
            and view.load_u32(at + _CPU) in (0, cpu + 1)
            and view.load_u32(at + _RELID) in (0, relid)
        )

    def _at(self, number: int) -> int:
        return self._base + number * TICKET_BYTES


def director_wakeup() -> str:
    """The semaphore that a director sleeps on."""
    return "director"


def ticket_wakeup(number: int) -> str:
    """The semaphore on which whoever took a ticket waits, where it does not halt a processor."""
    return f"ticket.{number}"


RACE_WAKEUPS: Final = (director_wakeup(), *(ticket_wakeup(number) for number in range(TICKETS)))
"""Semaphores of a machine that runs schedules."""
