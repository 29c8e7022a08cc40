"""Mutexes, completions and wait queues of a machine that records: the same classes, with records around their steps.

`record_waits` has a process build them in place of the plain ones, before it has built any. Recorded are mutexes taken
and given back, and whoever is about to sleep, is woken, goes on. A spinlock is not: it covers a few lines, and a record
would take as long as those. Causes come first: a wait is recorded before it is announced, and the end of a holding
before the mutex is free; so what the records say of waits and holders was true at each moment.
"""

from __future__ import annotations

from types import TracebackType
from typing import Final

from emu.event_fields import text_value
from emu.tracing import E_LOCK, E_UNLOCK, E_WAIT, E_WAIT_DONE, E_WAKE, EVENTS, WaitedFor
from guestproc.kernel.actors import Actor
from guestproc.kernel.locks import HeldMutex, Mutex, Rank
from guestproc.kernel.records import Ram


def _name_words(name: str) -> tuple[int, ...]:
    """The words of a name, behind the two others of a `lock` or `wait` record."""
    return EVENTS["lock"].pack(0, 0, text_value(name, 32))[2:]


class RecordedSleepers:
    """Says who sleeps for a word, is woken, and goes on (a `WaitWatcher`)."""

    __slots__ = ("_gpa", "_name_words", "_what")

    def __init__(self, what: WaitedFor, gpa: int, name: str) -> None:
        self._what = int(what)
        self._gpa = gpa
        self._name_words = _name_words(name)

    def waits(self, actor: Actor) -> None:
        """Record that the actor waits, as it will announce."""
        actor.record(E_WAIT, self._what, self._gpa, *self._name_words)

    def goes_on(self, actor: Actor) -> None:
        """Record that it goes on."""
        actor.record(E_WAIT_DONE, self._what, self._gpa)

    def wakes(self, actor: Actor, sleeper: int) -> None:
        """Record whom it wakes, before that."""
        actor.record(E_WAKE, self._what, self._gpa, sleeper)


class RecordedMutex(Mutex):
    """Says who has it, from after it was taken until before it is given back."""

    __slots__ = ("_gpa", "_name_words")

    def __init__(self, ram: Ram, gpa: int, name: str, rank: Rank = Rank.DRIVER_STATE) -> None:
        super().__init__(ram, gpa, name, rank)
        self._gpa: Final = gpa
        self._name_words: Final = _name_words(name)

    def hold(self, actor: Actor) -> HeldRecordedMutex:
        """`with lock.hold(actor):` takes the mutex for the block."""
        return HeldRecordedMutex(self, actor)

    def acquire(self, actor: Actor) -> None:
        """Take it, then record that."""
        super().acquire(actor)
        actor.record(E_LOCK, self._gpa, actor.number, *self._name_words)

    def try_acquire(self, actor: Actor) -> bool:
        """Record that it was taken, if it was."""
        taken = super().try_acquire(actor)
        if taken:
            actor.record(E_LOCK, self._gpa, actor.number, *self._name_words)
        return taken

    def release(self, actor: Actor) -> None:
        """Record that it is free, then give it back."""
        actor.record(E_UNLOCK, self._gpa, actor.number, *self._name_words)
        super().release(actor)


class HeldRecordedMutex(HeldMutex):
    """The block of a `with mutex.hold(actor)`, by the calls that record."""

    __slots__ = ()

    def __enter__(self) -> None:
        self._lock.acquire(self._actor)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release(self._actor)


def record_waits(ram: Ram) -> None:
    """Have this process build what records; nothing of the guest kernel's records may have been built in it."""
    ram.variants = {Mutex: RecordedMutex}
    ram.watch_wait = RecordedSleepers
