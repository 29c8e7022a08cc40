"""The rule about who sleeps for whom, as far as records tell it: mutexes, and queues that are flushed.

A mutex is given back by who has it; who flushes a queue goes on when its worker has done what it runs. Whatever else
is waited for may come from somewhere that no record shows, so nobody is called stuck for that: a settled machine is
judged by its state as well (`tools.invariants_settled_waits`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from emu.recording import TraceRecord
from emu.tracing import WaitedFor
from guestproc.kernel.actors import actor_slot
from guestproc.kernel.workqueue import WORKERS, QueueNumber
from tools.invariants import Feed, Machine, Rule

_FLUSHERS: Final = re.compile(r"queues\[(\d+)\]\.flushers")


class NobodyWaitsInACircle(Rule):
    """Each sleeper waits for one other at most here, so a circle is found by walking from the one who closes it."""

    NUMBER = 27
    TITLE = "Nobody sleeps for who sleeps for him: mutexes, and queues that are flushed"

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self._asleep: dict[int, TraceRecord] = {}
        self._holders: dict[int, TraceRecord] = {}
        self._working: dict[int, TraceRecord] = {}

    def feeds(self) -> Mapping[str, Feed]:
        """Sleepers by actor, holders by mutex, what runs by queue."""
        return {
            "wait": self._wait,
            "wake": self._wake,
            "wait_done": self._wait_done,
            "lock": self._lock,
            "unlock": self._unlock,
            "work_run": self._work_run,
            "work_done": self._work_done,
        }

    def guest_died(self) -> None:
        """Nothing of it is left."""
        self._asleep.clear()
        self._holders.clear()
        self._working.clear()

    def _wait(self, record: TraceRecord) -> None:
        self._asleep[record.actor.slot] = record
        chain: list[TraceRecord] = []
        sleeper: TraceRecord | None = record
        while sleeper is not None and sleeper not in chain[::2]:
            if (producer := self._producer(sleeper)) is None:
                return
            chain += [sleeper, producer]
            sleeper = self._asleep.get(producer.actor.slot)
        if sleeper is record:
            links = [f"{one.actor.name} sleeps for {one.shown['name']}" for one in chain[::2]]
            self.violate("; ".join(links) + ": a circle", *chain)

    def _producer(self, sleeper: TraceRecord) -> TraceRecord | None:
        """The record that makes somebody the one who can end a wait: of a lock taken, or work begun."""
        what, object_ = sleeper.values[:2]
        if what == WaitedFor.MUTEX:
            return self._holders.get(object_)
        flushed = _FLUSHERS.fullmatch(str(sleeper.shown["name"]))
        # Of two workers either may have what is waited for.
        if flushed is None or WORKERS[QueueNumber(int(flushed[1]))] > 1:
            return None
        return self._working.get(int(flushed[1]))

    def _wake(self, record: TraceRecord) -> None:
        slot = actor_slot(record.values[2])
        asleep = self._asleep.get(slot)
        if asleep is not None and asleep.values[1] == record.values[1]:
            del self._asleep[slot]

    def _wait_done(self, record: TraceRecord) -> None:
        self._asleep.pop(record.actor.slot, None)

    def _lock(self, record: TraceRecord) -> None:
        self._holders[record.values[0]] = record

    def _unlock(self, record: TraceRecord) -> None:
        self._holders.pop(record.values[0], None)

    def _work_run(self, record: TraceRecord) -> None:
        self._working[record.values[0]] = record

    def _work_done(self, record: TraceRecord) -> None:
        self._working.pop(record.values[0], None)
