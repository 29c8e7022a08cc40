"""The director: runs the steps of a schedule on a launched machine, holds its actors and lets them go.

It never sleeps in place of a condition: it waits on its own semaphore, which whoever arrives at a point posts, looks
again every millisecond, and gives up by name after a few seconds. What it cannot decide is inconclusive, not a failure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from emu.control import ActorKind, ActorRow, slot_of
from emu.errors import UserError, VmbusError
from emu.fault_plan import PlannedFault
from emu.faults import parse as parse_fault
from emu.machine import USER_WAKEUP
from emu.mirror import Mirror
from emu.orders import OrderDesk, OrderRefused, OrderState, Recipient
from emu.recording import TraceRecord
from emu.scenario import derived_instance
from emu.syncpoint import TICKETS, Action, Ticket, Tickets, director_wakeup, ticket_wakeup
from emu.task_board import Program, TaskBoard, TaskState
from emu.user_calls import DEVICES, GUID, NUMBERS
from emu.vmexit import HostBell
from hostproc.protocol.states import REVOKED_STATES
from tools.device_list import list_devices
from tools.event_names import name_of
from tools.launch import RunningMachine
from tools.live_records import records_of
from tools.schedule import Step, duration_ns, point_of
from tools.settled import SettleTest

STEP_S: Final = 3.0
"""How long a step may take: everything in a machine that is not held takes milliseconds."""
LOOK_S: Final = 0.001


@dataclass(frozen=True, slots=True)
class Broken:
    """An invariant that is broken: `INV-nn`, and in what way."""

    invariant: str
    text: str


class Inconclusive(VmbusError):
    """A step did not come to its end: the schedule says nothing about the machine."""


class _TooLong(Inconclusive):
    """Somebody waited in vain; `Director.do` adds for which step."""


class Departed(Inconclusive):
    """The machine has settled, and nobody came to the point at which `expect` wants somebody: it goes another way."""


@dataclass(slots=True)
class Seen:
    """The records of a run, decoded as they come."""

    records: list[TraceRecord] = field(default_factory=list)

    def take(self, row: ActorRow, raw: bytes) -> None:
        """Another piece of one actor's records (`RecordingWriter.tee`)."""
        self.records += records_of(row, raw)


class Director:
    """The steps of one schedule, on one machine."""

    def __init__(self, running: RunningMachine, seen: Seen) -> None:
        self.running: Final = running
        self.machine: Final = running.machine
        self.seen: Final = seen
        self.tickets: Final = Tickets(self.machine.control)
        self.settling: Final = SettleTest(self.machine, parked=self._standing_still)
        self._wakeup: Final = self.machine.wakeup(director_wakeup())
        self._labels: Final[dict[str, int]] = {}
        self._relids: Final[dict[str, int]] = {}
        self._instances: Final[dict[str, str]] = {}
        self._letters: Final[dict[str, int]] = {}
        self.answers: Final[dict[str, dict[str, Any]]] = {}
        self._planned: Final[dict[str, PlannedFault]] = {}
        self._tasks: Final[dict[str, int]] = {}
        self.judge: Callable[[Director], list[Broken]] = lambda _director: []
        """What `check` asks; whoever runs the schedule says so."""
        self.checked: Final[list[Broken]] = []
        """What a `check` found."""
        self._since_ns = 0
        self._host_bell: Final = HostBell(self.machine.doorbells.view, self.machine.wakeup("host"))
        self._verbs: Final[Mapping[str, Callable[[Step], None]]] = {
            "arm": self._arm,
            "disarm": self._disarm,
            "resume": self._resume,
            "until arrived": self._until_arrived,
            "expect": self._expect,
            "until event": self._until_event,
            "until answered": self._until_answered,
            "until settled": self._until_settled,
            "advance": self._advance,
            "check": self._check,
            "offer": self._offer,
            "offer-subchannel": self._offer_subchannel,
            "rescind": self._rescind,
            "rescind-again": self._rescind_again,
            "send": self._send,
            "fault": self._fault,
            "end": self._end,
            "call": self._call,
            "run": self._run,
            "until done": self._until_done,
        }

    def do(self, step: Step) -> None:
        """One step. UserError: it cannot be meant; Inconclusive: it did not come about; MachineDied."""
        try:
            self._verbs[step.verb](step)
        except OrderRefused as refused:
            raise UserError(f"step {step.number} `{step.text}`: {refused}") from None
        except _TooLong as passed:
            raise Inconclusive(f"step {step.number} `{step.text}`: {passed}") from None

    def _check(self, _step: Step) -> None:
        """Judge it as it stands now; the end of a run judges it again."""
        self.settle()
        self.checked.extend(self.judge(self))

    @property
    def relids(self) -> Mapping[str, int]:
        """Relids by the names that the steps have used so far; it grows with them."""
        return self._relids

    def release_all(self) -> None:
        """Let everybody go who is still held: a run is judged with nobody at a point."""
        for number in range(TICKETS):
            if self.tickets.state(number) is Ticket.ARMED:
                self.tickets.disarm(number)
        for number in self.tickets.parked():
            self._let_go(number)

    def failed_calls(self) -> list[str]:
        """What came back of calls that nobody waited for with `until answered`, where it is an error."""
        desk, failed = OrderDesk(self.machine.control), []
        for label, at in self._letters.items():
            if desk.state(at) is OrderState.DONE:
                try:
                    desk.wait(at, label)
                except OrderRefused as refused:
                    failed.append(f"call {label}: {refused}")
        self._letters.clear()
        return failed

    # -- points -------------------------------------------------------------------------------------

    def _arm(self, step: Step) -> None:
        options = step.options
        if not any(self.tickets.state(number) is Ticket.FREE for number in range(TICKETS)):
            cure = "`disarm` or `resume` some that you do not need any more"
            raise UserError(f"step {step.number} `{step.text}`: {TICKETS} are armed or held already; {cure}")
        self._labels[step.label] = self.tickets.arm(
            point_of(step.words[0]),
            actor=self._slot(options["actor"]) if "actor" in options else -1,
            cpu=int(options.get("cpu", -1)),
            relid=self.relid(options["relid"]) if "relid" in options else 0,
            skip=int(options.get("skip", 0)),
            action=Action.FAULT if "fault" in options else Action.SEE if "do" in options else Action.HOLD,
            fault=self._put_down(step) if "fault" in options else None,
        )

    def _put_down(self, step: Step) -> PlannedFault:
        """The fault that who comes to a point turns on; `end LABEL` turns it off."""
        fault = parse_fault(step.options["fault"], source=f"step {step.number}")
        self._planned[step.label] = planned = self.running.faults.add(fault, on=False)
        return planned

    def _disarm(self, step: Step) -> None:
        number = self._labels[step.words[0]]
        if not self.tickets.disarm(number):
            raise Inconclusive(f"step {step.number}: {self._who(number)} came to {self.tickets.point(number).text}")

    def _until_arrived(self, step: Step) -> None:
        number = self._labels[step.words[0]]
        point = self.tickets.point(number)
        self._wait(f"somebody to come to {point.text}", lambda: self.tickets.arrived(number)[0] != 0)

    def _expect(self, step: Step) -> None:
        """As `until arrived`, for a step that follows another machine's: Departed once this one has settled without."""
        number = self._labels[step.words[0]]
        point = self.tickets.point(number)

        def arrived() -> bool:
            return self.tickets.arrived(number)[0] != 0

        # Looked at again behind the look at everybody: who arrives stands still, and that is settled, too.
        self._wait(f"somebody to come to {point.text}", lambda: arrived() or self.settling.take().settled)
        if not arrived():
            raise Departed(f"step {step.number} `{step.text}`: the machine has settled, nobody came to {point.text}")

    def _resume(self, step: Step) -> None:
        number = self._labels[step.words[0]]
        if self.tickets.state(number) is not Ticket.ARRIVED:
            point = self.tickets.point(number).text
            raise Inconclusive(f"step {step.number}: nobody is held at {point}; wait with `until arrived` first")
        self._act()
        self._let_go(number)

    def _let_go(self, number: int) -> None:
        row = self.machine.control.row(slot_of(self.tickets.arrived(number)[0]))
        halted = self.tickets.is_halted(number)
        self.tickets.go(number)
        if row.kind == ActorKind.HYPERVISOR:
            self.machine.control.view.store_u32(self.machine.control.points_bell_offset, 1)
            self._host_bell.wake()
            return
        if halted:
            self.running.nudge(row.cpu)
        else:
            self.machine.wakeup(ticket_wakeup(number)).post()

    def _who(self, number: int) -> str:
        return self.machine.control.name_of(self.tickets.arrived(number)[0])

    # -- waiting ------------------------------------------------------------------------------------

    def _until_event(self, step: Step) -> None:
        name, wanted = step.words[0], step.options

        def fits(record: TraceRecord) -> bool:
            return record.t_ns >= self._since_ns and record.event.name == name and self._fits(record, wanted)

        self._wait(f"an event `{step.text.removeprefix('until event ')}`", lambda: any(map(fits, self.seen.records)))

    def _fits(self, record: TraceRecord, wanted: Mapping[str, str]) -> bool:
        for one, value in record.event.pairs(record.values):
            text = wanted.get(one.name)
            if text is None or text in (name_of(one, value), one.show(value)):
                continue
            if not (one.name.endswith("relid") and self._relids.get(text) == value):
                return False
        return True

    def _until_answered(self, step: Step) -> None:
        label = step.words[0]
        at, desk = self._letters.pop(label), OrderDesk(self.machine.control)
        self._wait(f"an answer to {label}", lambda: desk.state(at) is OrderState.DONE)
        self.answers[label] = desk.wait(at, label)

    def _until_settled(self, _step: Step) -> None:
        self.settle()

    def settle(self) -> None:
        """Wait until nothing more will happen by itself. Inconclusive: something still does."""
        found = self.settling.take()

        def settled() -> bool:
            nonlocal found
            found = self.settling.take()
            return bool(found.settled)

        self._wait("the machine to settle", settled, who=lambda: found.text())

    def _standing_still(self) -> set[int]:
        """Slots of who is held at a point; the host is not among them, as only one task of its is."""
        rows = (self.machine.control.row(slot_of(actor)) for actor in self.tickets.parked().values())
        return {row.slot for row in rows if row.kind != ActorKind.HYPERVISOR}

    def _wait(self, what: str, condition: Callable[[], bool], who: Callable[[], str] | None = None) -> None:
        """Look until it is so; Inconclusive after `STEP_S`, with who is held or still at work."""
        end = time.monotonic() + STEP_S
        while True:
            self.running.pump(0)
            if condition():
                return
            if time.monotonic() > end:
                held = ", ".join(
                    f"{self._who(number)} is held at {self.tickets.point(number).text}"
                    for number in self.tickets.parked()
                )
                rest = who() if who is not None else ""
                raise _TooLong("; ".join(filter(None, (f"waited {STEP_S:g} s for {what}", held, rest))))
            # Posted by who arrives at a point; what else it waits for it looks at.
            self._wakeup.block(LOOK_S)

    def _advance(self, step: Step) -> None:
        self._act()
        self.machine.clock.advance(duration_ns(step.words[0]))
        # Whoever sleeps until a time that is over now shall look.
        self.machine.wake_everybody()

    # -- what host and guest are told to do ---------------------------------------------------------

    def _act(self) -> None:
        self._since_ns = time.monotonic_ns()

    def host(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Order something of the host, which answers at once."""
        self._act()
        return OrderDesk(self.machine.control).ask(Recipient.HOST, what, self._host_bell.wake, **arguments)

    def _offer(self, step: Step) -> None:
        arguments = {"class": step.words[0], "backend": None, "count": 1, "instance": None}
        if "number" in step.options:
            arguments["instance"] = str(derived_instance(step.words[0], int(step.options["number"])))
        if "subchannels" in step.options:
            arguments["subchannels"] = int(step.options["subchannels"])
        answer = self.host("offer", **arguments)
        offered = answer["offered"][0]
        self._relids[step.label], self._instances[step.label] = offered["relid"], offered["instance"]

    def _offer_subchannel(self, step: Step) -> None:
        index = int(step.options.get("index", 1))
        answer = self.host("offer-subchannel", relid=self.relid(step.words[0]), index=index)
        self._relids[step.label] = answer["relid"]

    def _rescind(self, step: Step) -> None:
        relid = self.relid(step.words[0])
        self.host("rescind", relid=relid, instance="" if relid else self._instances[step.words[0]])

    def _rescind_again(self, step: Step) -> None:
        self.host("rescind-again", relid=self.relid(step.words[0]))

    def _send(self, step: Step) -> None:
        """A device writes packets that nobody asked for; with an id, they ask for completions."""
        count, size = int(step.options.get("count", 1)), int(step.options.get("size", 8))
        first_id = int(step.options.get("id", 0))
        self.host("send", relid=self.relid(step.words[0]), count=count, size=size, id=first_id)

    def _call(self, step: Step) -> None:
        """A call of the guest's user space, which may wait for somebody who is held: nobody waits for it here."""
        self._act()
        wake = self.machine.wakeup(f"actor.{USER_WAKEUP}").post
        desk = OrderDesk(self.machine.control)
        arguments: dict[str, Any] = {name: self._value(name, value) for name, value in step.options.items()}
        at = desk.post(Recipient.GUEST, step.words[0], wake, **arguments)
        self._letters[step.label or f"of step {step.number}"] = at

    def _run(self, step: Step) -> None:
        """A program of the guest's on a processor; nobody waits for it here."""
        self._act()
        options = step.options
        self._tasks[step.label or f"step {step.number}"] = self.running.order(
            Program[step.words[0].upper()],
            int(options.get("cpu", 0)),
            relid=self.relid(options["relid"]) if "relid" in options else 0,
            wanted=int(options.get("wanted", 1)),
            size=int(options.get("size", 8)),
            rate=int(options.get("rate", 0)),
        )

    def _until_done(self, step: Step) -> None:
        index = self._tasks[step.words[0]]
        ended = (TaskState.DONE, TaskState.FAILED)
        self._wait(f"{step.words[0]} to end", lambda: TaskBoard(self.machine.control).row(index).state in ended)

    def _fault(self, step: Step) -> None:
        """From here on; in the words of `--fault`."""
        self._act()
        planned = self.running.turn_on(step.words[0], source=f"step {step.number}")
        self._planned[step.label or f"step {step.number}"] = planned

    def _end(self, step: Step) -> None:
        self._act()
        self.running.turn_off(self._planned[step.words[0]])

    def _value(self, name: str, text: str) -> int | str:
        """An argument of a call, of the type that the guest expects of one of that name."""
        if name in DEVICES and not GUID.fullmatch(text):
            return self.relid(text) if name == "relid" else str(self.relid(text))
        return int(text) if name in NUMBERS else text

    def relid(self, device: str) -> int:
        """The relid of a label, of `CLASS#N`, or itself; UserError."""
        if device.isdecimal():
            return int(device)
        name, hashed, index = device.partition("#")
        if hashed and index.isdecimal():
            self._instances[device] = str(derived_instance(name, int(index) - 1))
        if self._relids.get(device):
            return self._relids[device]
        if device in self._relids:  # offered, and no relid until the guest lets go of its life before this one
            for offer in Mirror(self.machine.control).channels():
                gone = offer.sub_channel_index or offer.state in REVOKED_STATES
                if str(offer.if_instance) == self._instances[device] and not gone:
                    self._relids[device] = offer.relid
            return self._relids[device]
        for one in list_devices(self.machine):
            if str(one.device_id) == self._instances.get(device):
                self._relids[device] = one.relid
                return one.relid
        raise UserError(f"{device} is no device of this schedule; name a label, CLASS#N or a relid")

    def _slot(self, name: str) -> int:
        """The slot of an actor, which may be a worker that has not quite begun; UserError."""

        def slots() -> list[int]:
            return [row.slot for row in self.machine.control.rows() if row.name == name]

        try:
            self._wait(f"an actor called {name}", lambda: bool(slots()))
        except Inconclusive:
            names = ", ".join(row.name for row in self.machine.control.rows())
            raise UserError(f"no actor is called {name}; there are {names}") from None
        return slots()[0]
