"""Rules about event flags, tasklets, masks and signals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

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

    def guest_died(self) -> None:
        """Its flags went with their pages."""
        self._set.clear()
        self._cleared.clear()
        self._isr.clear()
        self._last_isr.clear()

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

    def guest_died(self) -> None:
        """Nothing of it is left."""
        self._masked.clear()

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

    def guest_died(self) -> None:
        """Nothing of it is left."""
        self._scheduled.clear()

    def _tasklet_sched(self, record: TraceRecord) -> None:
        self._scheduled[record.actor.slot, record.values[0]] = record

    def _tasklet_done(self, record: TraceRecord) -> None:
        self._scheduled.pop((record.actor.slot, record.values[0]), None)

    def end(self) -> None:
        """None is left."""
        for (_slot, tasklet), record in self._scheduled.items():
            self.violate(f"tasklet {Tasklets(tasklet).name} was scheduled on {record.actor.name} and never ran", record)


@dataclass(slots=True)
class _Cause:
    """What an actor has done to a channel's rings since it last signalled it."""

    good: bool = False
    """It made room, or published into a ring that was empty."""
    begins: set[int] = field(default_factory=set)
    """Where its other publishes began: each had a cause if the reader turns out to have been there."""


class SignalsHaveACause(Rule):
    """Who signals has made room, or has published into a ring that was empty, since it last did.

    Whether a guest's ring was empty is judged by where the host's reader stood: anywhere that it was between the
    guest's publish and its signal. A release is recorded behind its store, so the first one recorded after the signal
    may have been before it; no later one can. Of other rings only is asked whether anything was published.
    """

    NUMBER = 21
    TITLE = "Each signal has a cause: something published into an empty ring, or room made"

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        # By context as well: a tasklet comes between a task's publish and its signal, and has causes of its own.
        self._causes: dict[int, dict[tuple[int, str], _Cause]] = {}
        self._sizes: dict[int, int] = {}
        self._reads: dict[int, int] = {}
        """Where the host stands in the guest's ring, by relid; only of channels whose opening was recorded."""
        self._undecided: dict[int, list[tuple[TraceRecord, set[int]]]] = {}

    def feeds(self) -> Mapping[str, Feed]:
        """Rings and signals of one actor, in its own order; what the host has read of a guest's ring."""
        return {
            "map": self._map,
            "ring_attach": self._ring_attach,
            "ring_publish": self._ring_publish,
            "ring_release": self._ring_release,
            "signal": self._signal,
            "flag_set": self._flag_set,
        }

    def guest_died(self) -> None:
        """What its host had not read when it died is not read any more."""
        self._causes.clear()
        self._reads.clear()
        self._undecided.clear()

    def _cause(self, record: TraceRecord, relid: int) -> _Cause:
        return self._causes.setdefault(relid, {}).setdefault((record.actor.slot, record.context), _Cause())

    def _map(self, record: TraceRecord) -> None:
        relid = record.values[0]
        self._reads[relid] = 0
        self._causes.pop(relid, None)
        # The next release is one of the new rings: it says nothing of where the reader of the old ones stood.
        self._accuse_all(self._undecided.pop(relid, []))

    def _ring_attach(self, record: TraceRecord) -> None:
        relid, side, size, _write, _read = record.values
        if side == Side.TO_HOST:
            self._sizes[relid] = size

    def _ring_publish(self, record: TraceRecord) -> None:
        relid, side, index, size = record.values
        if (side == Side.TO_GUEST) != is_host(record):
            return
        cause = self._cause(record, relid)
        if side == Side.TO_GUEST or relid not in self._reads or not self._sizes.get(relid):
            cause.good = True
            return
        begin = (index - size) % self._sizes[relid]
        cause.begins.add(begin)
        cause.good = cause.good or begin == self._reads[relid]

    def _ring_release(self, record: TraceRecord) -> None:
        relid, side, index, _size = record.values
        if (side == Side.TO_HOST) != is_host(record):
            return
        self._cause(record, relid).good = True
        if side == Side.TO_GUEST:
            return
        self._reads[relid] = index
        for cause in self._causes[relid].values():
            cause.good = cause.good or index in cause.begins
        waiting = self._undecided.pop(relid, [])
        self._accuse_all([(signal, begins) for signal, begins in waiting if index not in begins])

    def _signal(self, record: TraceRecord) -> None:
        self._look(record, record.values[0])

    def _flag_set(self, record: TraceRecord) -> None:
        # Flag 0 is everybody's below 2.4: whose it was, the interrupt page says.
        if record.values[2]:
            self._look(record, record.values[2])

    def _look(self, record: TraceRecord, relid: int) -> None:
        cause = self._causes.get(relid, {}).pop((record.actor.slot, record.context), None)
        if cause is None:
            self.violate(f"{record.actor.name} signals relid {relid} and has done nothing to its rings", record)
        elif not cause.good:
            self._undecided.setdefault(relid, []).append((record, cause.begins))

    def _accuse_all(self, signals: Iterable[tuple[TraceRecord, set[int]]]) -> None:
        for signal, _begins in signals:
            text = f"{signal.actor.name} signals relid {signal.values[0]}, whose ring was not empty before it wrote"
            self.violate(text, signal)

    def end(self) -> None:
        """Nothing more was read: the reader was where it is."""
        for waiting in self._undecided.values():
            self._accuse_all(waiting)
