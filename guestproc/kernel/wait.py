"""Sleeping until somebody says so: completions, and wait queues for any other condition.

All of it is one u64 word in the object waited for: the upper half is the object's own count, the lower half
the newest of a chain of `Waiter` records (index + 1; 0: nobody waits). Because both lie in one word,
"announce, look again" is one compare-and-swap, and a completer that has done its own is finished with the
object: it may be freed at once by whoever saw it done.

    waiter:     link a record in front of the chain, only while the count is still 0; look again; block
    completer:  (count, chain) -> (count + 1, nobody); then wake the chain it took out, oldest first

A waiter that gives up marks its record abandoned and wakes the rest of the chain, which looks again: so no
object ever names a record whose owner has gone on. Every wait has a deadline.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from emu.errors import DeadlinePassed, MachineStopping
from emu.ipc.atomics import fence
from emu.tracing import WaitedFor
from guestproc.kernel.actors import Actor, Context
from guestproc.kernel.records import INDEX_MASK, Part, Ram, Table
from guestproc.kernel.waiters import Waiter, WaiterState

SECOND_NS: Final = 1_000_000_000
DEFAULT_TIMEOUT_NS: Final = 60 * SECOND_NS
"""For the waits that have none in the kernel: long enough that only a bug meets it."""
COMPLETED_FOR_ALL: Final = 0xFFFFFFFF
"""Count of a completion after `complete_all` (the kernel's UINT_MAX): nobody takes it down."""

TASK: Final = Context.TASK
WAITING: Final = WaiterState.WAITING.value
WOKEN: Final = WaiterState.WOKEN.value
ABANDONED: Final = WaiterState.ABANDONED.value


def assert_may_wait(actor: Actor, what: str) -> None:
    """No wait, IPI, VM exit or driver callback inside a spinlock, an interrupt, or with interrupts off."""
    if not actor.spinning and (not actor.has_interrupts or (actor.context() is TASK and not actor.irqs_disabled())):
        return
    if actor.spinning:
        names = ", ".join(lock.name for lock, _ in actor.held)
        raise AssertionError(f"{actor} waits for {what} while holding {names}")
    context = actor.context()
    assert context is TASK, f"{actor} waits for {what} in {context.name}"
    raise AssertionError(f"{actor} waits for {what} with interrupts off")


def new_waiter(actor: Actor, what: str, now_ns: int = 0) -> Waiter:
    """A waiter record for this actor, not yet in any chain; `now_ns` is for who knows the time already."""
    waiter = actor.waiters.alloc()
    assert waiter is not None, f"{actor} waits for {what}: all {actor.waiters.capacity} waiter records are used"
    waiter.actor = actor.number
    waiter.since_ns = now_ns or actor.now()
    waiter.state.store(WAITING)
    return waiter


def wake_chain(actor: Actor, newest: int, wake: Callable[[int], None] | None = None) -> int:
    """Wake everybody in a chain that was taken out of its object, oldest first; how many were asleep.

    `wake` is what wakes one of them, `actor.wake` unless it is said.
    """
    if not newest:
        return 0
    chain = []
    while newest:
        waiter = actor.waiters.at(newest - 1)
        chain.append((waiter, waiter.actor))
        newest = waiter.next
    woken = 0
    wake = wake or actor.wake
    for waiter, sleeper in reversed(chain):
        # The record is the waiter's again the moment it is WOKEN, so its actor was read before.
        if waiter.state.cas(WAITING, WOKEN) == WAITING:
            wake(sleeper)
            woken += 1
        else:
            actor.waiters.free(waiter)
    return woken


def sleepers(table: Table[Waiter], newest: int) -> list[int]:
    """Actor numbers in a chain, oldest first: for reports, so a chain that changes meanwhile is cut short."""
    found: list[int] = []
    try:
        # A record that was freed between two looks holds poison, which is no index.
        while 0 < newest <= table.capacity and len(found) < table.capacity:
            waiter = table.at(newest - 1)
            found.append(waiter.actor)
            newest = waiter.next
    except AssertionError:
        pass
    return found[::-1]


def sleep(actor: Actor, waiter: Waiter, deadline_ns: int) -> bool:
    """Block until `waiter` is woken (True) or the deadline passed or the machine stops (False)."""
    state = waiter.state
    # For who asks whether anything will still happen: a sleeper whose time is over has not settled, however late it
    # comes to notice (races.md E2 was let go too early that way).
    waiter.until_ns = deadline_ns
    while state.load() == WAITING:
        blocked = actor.block(deadline_ns)
        if state.load() != WAITING:
            return True
        if not blocked or actor.stopping():
            return state.load() != WAITING
    return True


class WaitWatcher(Protocol):
    """What is told of the sleepers of one word, where a machine records (`guestproc.kernel.wait_trace`)."""

    def waits(self, actor: Actor) -> None:
        """The actor is about to announce itself."""

    def goes_on(self, actor: Actor) -> None:
        """It goes on: woken, or because it gave up, or because it need not have waited."""

    def wakes(self, actor: Actor, sleeper: int) -> None:
        """The actor wakes a sleeper next."""


class WaitWord:
    """The word itself: a count above, the newest waiter below. By itself it is the chain of a mutex."""

    SIZE: Final = 8

    __slots__ = ("_watcher", "_word", "name")

    def __init__(self, ram: Ram, gpa: int, name: str) -> None:
        self._word: Final = ram.u64(gpa)
        self.name: Final = name
        self._watcher: Final[WaitWatcher | None] = ram.watch_wait and ram.watch_wait(self.what(), gpa, name)

    def what(self) -> WaitedFor:
        """What it is that has the word."""
        return WaitedFor.MUTEX

    def waiters(self, table: Table[Waiter]) -> list[int]:
        """Numbers of who waits, oldest first (for reports)."""
        return sleepers(table, self._word.load() & INDEX_MASK)

    def enlist(self, actor: Actor, now_ns: int = 0) -> Waiter:
        """A record with which to announce oneself; `retract` ends the wait, or `forget` if it was never announced."""
        if self._watcher is not None:
            self._watcher.waits(actor)
        return new_waiter(actor, self.name, now_ns)

    def forget(self, actor: Actor, waiter: Waiter) -> None:
        """Free the record of a waiter that is in no chain."""
        actor.waiters.free(waiter)
        if self._watcher is not None:
            self._watcher.goes_on(actor)

    def wake(self, actor: Actor, newest: int) -> int:
        """Wake a chain that was taken out of this word, which may be gone by now; how many were asleep."""
        watcher = self._watcher
        if watcher is None:
            return wake_chain(actor, newest)

        def wake(sleeper: int) -> None:
            watcher.wakes(actor, sleeper)
            actor.wake(sleeper)

        return wake_chain(actor, newest, wake)

    def retract(self, actor: Actor, waiter: Waiter) -> None:
        """Take back an announcement, or free its record if a waker was quicker."""
        self._take_back(actor, waiter)
        if self._watcher is not None:
            self._watcher.goes_on(actor)

    def _take_back(self, actor: Actor, waiter: Waiter) -> None:
        if waiter.state.cas(WAITING, ABANDONED) != WAITING:
            actor.waiters.free(waiter)
            return
        # Still chained, or held by a waker on its way: whoever takes the chain out frees the record.
        while True:
            word = self._word.load()
            if not word & INDEX_MASK:
                return
            if self._word.cas(word, word & ~INDEX_MASK) == word:
                self.wake(actor, word & INDEX_MASK)
                return


class Completion(WaitWord):
    """The kernel's `struct completion`: `complete` lets one waiter through, `complete_all` all of them."""

    __slots__ = ()

    def what(self) -> WaitedFor:
        """What it is that has the word."""
        return WaitedFor.COMPLETION

    @property
    def done(self) -> int:
        """How many waiters may still pass without sleeping."""
        return self._word.load() >> 32

    def reinit(self) -> None:
        """`reinit_completion`: not done any more; who waits goes on waiting."""
        while True:
            word = self._word.load()
            if self._word.cas(word, word & INDEX_MASK) == word:
                return

    def complete(self, actor: Actor) -> int:
        """Let one waiter through, now or later; may be called anywhere. How many were asleep."""
        return self.wake(actor, self.let_through())

    def let_through(self) -> int:
        """`complete` under a spinlock that the waiter takes next: who slept, for `wake` behind the unlock.

        Woken inside, it would find the lock taken, perhaps on the core of whoever holds it (the kernel's `wake_q`).
        The object is not touched after the swap, so a waiter that passes may free it at once.
        """
        while True:
            word = self._word.load()
            count = word >> 32
            if count < COMPLETED_FOR_ALL - 1:
                count += 1
            if self._word.cas(word, count << 32) == word:
                return word & INDEX_MASK

    def complete_all(self, actor: Actor) -> int:
        """Let everybody through until `reinit`. How many were asleep."""
        return self.wake(actor, self._word.exchange(COMPLETED_FOR_ALL << 32) & INDEX_MASK)

    def try_wait(self) -> bool:
        """`try_wait_for_completion`: pass if it is done, without sleeping."""
        while True:
            word = self._word.load()
            count = word >> 32
            if not count:
                return False
            if count == COMPLETED_FOR_ALL or self._word.cas(word, word - (1 << 32)) == word:
                return True

    def wait(self, actor: Actor, timeout_ns: int = DEFAULT_TIMEOUT_NS) -> None:
        """`wait_for_completion`; raises DeadlinePassed, or MachineStopping."""
        if not self.wait_timeout(actor, timeout_ns):
            raise DeadlinePassed(self.name, timeout_ns)

    def wait_timeout(self, actor: Actor, timeout_ns: int) -> bool:
        """`wait_for_completion_timeout`: False when it was not done in time; raises MachineStopping."""
        assert_may_wait(actor, self.name)
        if self.try_wait():
            return True
        now_ns = actor.now()
        deadline_ns = now_ns + timeout_ns
        while True:
            waiter = self.enlist(actor, now_ns)
            announced = self._announce(waiter)
            woken = not announced or sleep(actor, waiter, deadline_ns)
            if announced:
                self.retract(actor, waiter)
                if actor.stopping():
                    raise MachineStopping(f"{actor} waited for {self.name}")
            else:
                self.forget(actor, waiter)
            if self.try_wait():
                return True
            if not woken:
                return False
            now_ns = actor.now()

    def _announce(self, waiter: Waiter) -> bool:
        """Join the chain while the count is 0: announcing and looking again are this one swap."""
        while True:
            word = self._word.load()
            if word >> 32:
                return False
            waiter.next = word
            if self._word.cas(word, waiter.index + 1) == word:
                return True


class WaitQueue(WaitWord):
    """For conditions that live elsewhere: whoever makes one true calls `wake_all` afterwards."""

    __slots__ = ()

    def what(self) -> WaitedFor:
        """What it is that has the word."""
        return WaitedFor.WAIT_QUEUE

    def announced(self) -> bool:
        """Whether anybody is in the chain: for callers whose change was a full barrier itself."""
        return bool(self._word.load())

    def wake_all(self, actor: Actor) -> int:
        """Wake everybody, who look again; may be called anywhere. How many were asleep.

        The fence orders the caller's change of the condition before the look at the chain; the waiter
        links itself before it looks at the condition, so one of the two sees the other.
        """
        fence()
        if not self._word.load():
            return 0
        return self.wake(actor, self._word.exchange(0) & INDEX_MASK)

    def wait_until(
        self,
        actor: Actor,
        condition: Callable[[], bool],
        timeout_ns: int = DEFAULT_TIMEOUT_NS,
        what: str = "",
        subject: int = 0,
    ) -> None:
        """`wait_event`: return once `condition()`; raises DeadlinePassed, or MachineStopping."""
        if not self.wait_until_timeout(actor, condition, timeout_ns, subject):
            raise DeadlinePassed(what or self.name, timeout_ns)

    def wait_until_timeout(
        self, actor: Actor, condition: Callable[[], bool], timeout_ns: int, subject: int = 0
    ) -> bool:
        """`wait_event_timeout`: False when the condition was not true in time; raises MachineStopping.

        `subject` is for reports, where many conditions share a queue: GPA of the record that this one is about.
        """
        assert_may_wait(actor, self.name)
        if condition():
            return True
        now_ns = actor.now()
        deadline_ns = now_ns + timeout_ns
        while True:
            waiter = self.enlist(actor, now_ns)
            if subject:
                waiter.subject = subject
            self._announce(waiter)
            done = condition()
            woken = done or sleep(actor, waiter, deadline_ns)
            self.retract(actor, waiter)
            if done or condition():
                return True
            if actor.stopping():
                raise MachineStopping(f"{actor} waited for {self.name}")
            if not woken:
                return False
            now_ns = actor.now()

    def _announce(self, waiter: Waiter) -> None:
        while True:
            word = self._word.load()
            waiter.next = word
            if self._word.cas(word, waiter.index + 1) == word:
                fence()
                return


def completion(lock: str = "atomic") -> Part[Completion]:
    """A `Completion` as a field of a record."""
    return Part(Completion, Completion.SIZE, lock)


def wait_queue(lock: str = "atomic") -> Part[WaitQueue]:
    """A `WaitQueue` as a field of a record."""
    return Part(WaitQueue, WaitQueue.SIZE, lock)
