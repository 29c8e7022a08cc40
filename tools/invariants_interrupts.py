"""Rules about event flags, tasklets, masks and signals."""

from __future__ import annotations

from collections.abc import Mapping

from emu.recording import TraceRecord
from emu.tracing import Context, Side
from emu.wire.synic import HYPERVISOR_CALLBACK_VECTOR
from guestproc.protocol.numbers import Tasklets
from tools.invariants import Feed, Machine, Rule, is_host


class FlagsAreTaken(Rule):
    """A flag that goes up is taken down once, by an interrupt that then looks at its channel."""

    NUMBER = 16
    TITLE = "Each event flag that is set is cleared exactly once"

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self._set: dict[tuple[int, int], list[TraceRecord]] = {}
        self._cleared: dict[tuple[int, int], list[TraceRecord]] = {}
        self._last_isr: dict[int, TraceRecord] = {}
        self._isr: dict[int, TraceRecord] = {}

    def feeds(self) -> Mapping[str, Feed]:
        """Flags as the host sets and the guest clears them; interrupts that ran to their end."""
        return {
            "flag_set": self._flag_set,
            "flag_clear": self._flag_clear,
            "isr_enter": self._isr_enter,
            "isr_exit": self._isr_exit,
        }

    def _flag_set(self, record: TraceRecord) -> None:
        position, _sint, flag, was_set = record.values
        if not was_set:
            self._set.setdefault((position, flag), []).append(record)

    def _flag_clear(self, record: TraceRecord) -> None:
        self._cleared.setdefault((self.machine.position(record), record.values[1]), []).append(record)

    def _isr_enter(self, record: TraceRecord) -> None:
        if record.values[0] == HYPERVISOR_CALLBACK_VECTOR:
            self._isr[record.actor.slot] = record

    def _isr_exit(self, record: TraceRecord) -> None:
        entered = self._isr.pop(record.actor.slot, None)
        if entered is not None and record.values[0] == HYPERVISOR_CALLBACK_VECTOR:
            self._last_isr[self.machine.position(record)] = entered

    def end(self) -> None:
        """As many clears as sets; the last set may be left only if no interrupt began after it.

        Below 2.4 a host sets flag 0 for all channels, whose bits in the interrupt page no record tells of.
        """
        shared = {position for position, flag in self._set if flag == 0}
        self._set = {key: sets for key, sets in self._set.items() if key[0] not in shared}
        self._cleared = {key: cleared for key, cleared in self._cleared.items() if key[0] not in shared}
        for (position, flag), cleared in self._cleared.items():
            sets = self._set.get((position, flag), [])
            if len(cleared) > len(sets):
                self.violate(f"flag {flag} of VP page {position} is cleared more often than it was set", cleared[-1])
        for (position, flag), sets in self._set.items():
            cleared = self._cleared.get((position, flag), [])
            isr = self._last_isr.get(position)
            if len(cleared) < len(sets) and isr is not None and isr.t_ns > sets[len(cleared)].t_ns:
                text = f"flag {flag} of VP page {position} was set and never cleared, and an interrupt came after it"
                self.violate(text, sets[len(cleared)], isr)


class MaskedIsServed(Rule):
    """A ring whose interrupts an ISR masked is looked at by the tasklet that it masked it for."""

    NUMBER = 17
    TITLE = "A masked ring has its consumer scheduled or running"
    AT_END = True

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self._masked: dict[int, TraceRecord] = {}

    def feeds(self) -> Mapping[str, Feed]:
        """Masks of the guest, the tasklets that follow, and what ends a channel."""
        return {
            "mask": self._mask,
            "tasklet_run": self._tasklet_run,
            "unmask": self._served,
            "close": self._served,
            "rescind": self._served,
            "refused": self._refused,
        }

    def _mask(self, record: TraceRecord) -> None:
        if not is_host(record) and record.context == Context.ISR.name:
            self._masked[record.values[0]] = record

    def _tasklet_run(self, record: TraceRecord) -> None:
        self._masked.pop(record.values[1], None)

    def _served(self, record: TraceRecord) -> None:
        if not is_host(record):
            self._masked.pop(record.values[0], None)

    def _refused(self, record: TraceRecord) -> None:
        # A ring that breaks a rule stays masked: nobody reads it any more.
        if not is_host(record):
            self._masked.clear()

    def end(self) -> None:
        """None is left so."""
        for relid, record in self._masked.items():
            self.violate(f"the inbound ring of relid {relid} was masked, and nobody read it", record)


class TaskletsRun(Rule):
    """A tasklet that was scheduled has run."""

    NUMBER = 18
    TITLE = "A scheduled tasklet runs"
    AT_END = True

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self._scheduled: dict[tuple[int, int], TraceRecord] = {}
        self._rescinded: set[int] = set()

    def feeds(self) -> Mapping[str, Feed]:
        """Scheduled and done, by processor and function."""
        return {"tasklet_sched": self._tasklet_sched, "tasklet_done": self._tasklet_done}

    def _tasklet_sched(self, record: TraceRecord) -> None:
        self._scheduled[record.actor.slot, record.values[0]] = record

    def _tasklet_done(self, record: TraceRecord) -> None:
        self._scheduled.pop((record.actor.slot, record.values[0]), None)

    def end(self) -> None:
        """None is left."""
        for (_slot, tasklet), record in self._scheduled.items():
            self.violate(f"tasklet {Tasklets(tasklet).name} was scheduled on {record.actor.name} and never ran", record)


class SignalsHaveACause(Rule):
    """Who signals has published something, or made room, since it last did."""

    NUMBER = 21
    TITLE = "Each signal has a cause: something published, or room made"

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        # By context as well: a tasklet comes between a task's publish and its signal, and has causes of its own.
        self._cause: dict[tuple[int, str, int], bool] = {}

    def feeds(self) -> Mapping[str, Feed]:
        """Rings and signals of one actor, in its own order."""
        return {
            "ring_publish": self._ring,
            "ring_release": self._ring,
            "signal": self._signal,
            "flag_set": self._flag_set,
        }

    def _ring(self, record: TraceRecord) -> None:
        # Its own end of the ring: each side publishes into the one and releases the other.
        published = record.event.name == "ring_publish"
        if (record.values[1] == Side.TO_GUEST) == (published == is_host(record)):
            self._cause[record.actor.slot, record.context, record.values[0]] = True

    def _signal(self, record: TraceRecord) -> None:
        self._look(record, record.values[0])

    def _flag_set(self, record: TraceRecord) -> None:
        # Flag 0 is everybody's below 2.4: whose it was, the interrupt page says.
        if record.values[2]:
            self._look(record, record.values[2])

    def _look(self, record: TraceRecord, relid: int) -> None:
        if not self._cause.pop((record.actor.slot, record.context, relid), False):
            self.violate(f"{record.actor.name} signals relid {relid} and has done nothing to its rings", record)
