"""Spinlocks and mutexes: a word in guest RAM that holds the number of the actor that has the lock.

A **spinlock** covers a few lines with no wait, IPI, VM exit or driver callback inside (`assert_may_wait`).
It is taken with interrupts off and given back before they come on again: an ISR that waited for the task it
interrupted would wait for ever. A **mutex** may be held across waits; who finds it taken sleeps.

Locks have ranks, and are taken in rising rank only; taking one out of rank is our bug and an assertion. A
lock whose owner died, or that is not had within its time, stops the machine by the lock's name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from enum import IntEnum
from types import TracebackType
from typing import Final

from emu.errors import DeadlinePassed, MachineStopping, VmbusError
from guestproc.kernel.actors import Actor
from guestproc.kernel.records import INDEX_MASK, Part, Ram
from guestproc.kernel.wait import SECOND_NS, WaitWord, assert_may_wait, sleep

LOOKS_BEFORE_YIELD: Final = 20
SPINLOCK_TIMEOUT_NS: Final = 10 * SECOND_NS
MUTEX_TIMEOUT_NS: Final = 60 * SECOND_NS
_WERE_OFF: Final = 1
"""Saved flags: interrupts were off before the lock was taken."""


class Rank(IntEnum):
    """The order in which locks are taken; an actor takes only ranks above all it holds."""

    # Mutexes.
    DRIVER_LIST = 10
    DEVICE = 20  # device_lock: held across probe and remove, which open and close channels
    RTNL = 25  # the network lock: taken in probe, and by work that waits for a device's sub-channels
    CPUS = 30  # cpus_read_lock, before channel_mutex (vmbus_process_offer)
    CHANNEL = 40  # vmbus_connection.channel_mutex
    DRIVER_STATE = 50  # a driver's own mutex, taken in probe and in its work
    RING = 55  # channel.ring_buffer_mutex, inside channel_mutex or without
    # Spinlocks. The order below is the one in which one function holds two of them.
    CHANNELMSG = 60  # vmbus_connection.channelmsg_lock: completes requests inside
    SCHED = 70  # channel.sched_lock: the ISR, around an HV_CALL_ISR callback
    DRIVER_RING = 80  # a driver's transmit lock, around a packet
    REQUESTOR = 90  # vmbus_requestor.req_lock, inside a packet's write
    QUEUE = 100  # a work queue's list: queued from under any of the above
    PAGES = 110  # the page allocator's free lists
    LEAF = 120  # nothing is taken inside


class LockStuck(DeadlinePassed):
    """A lock was not had in its time: names the lock, its owner and who else waits."""

    def __init__(self, name: str, owner: int, waiters: list[int], timeout_ns: int) -> None:
        others = ", ".join(f"{number:#x}" for number in waiters) or "nobody"
        super().__init__(f"lock {name}: held by actor {owner:#x}, waited for by {others}", timeout_ns)
        self.owner = owner
        self.waiters = waiters


class LockOwnerDied(VmbusError):
    """The actor that holds a lock is dead, so what the lock covers may be half changed."""

    def __init__(self, name: str, owner: int) -> None:
        super().__init__(f"lock {name}: its owner, actor {owner:#x}, died holding it")
        self.owner = owner


class Ranked:
    """What an actor can hold: it has a name, and a rank that must be above those of what is held already."""

    __slots__ = ("name", "rank")

    def __init__(self, name: str, rank: Rank) -> None:
        self.name: Final = name
        self.rank: Final = rank

    def out_of_rank(self, actor: Actor) -> AssertionError:
        """The error for taking this above one of a higher or equal rank."""
        names = ", ".join(f"{lock.name} ({lock.rank.name})" for lock, _ in actor.held)
        return AssertionError(f"{actor} takes {self.name} ({self.rank.name}) while holding {names}")


class Lock(Ranked, ABC):
    """What both kinds of lock share: one actor at a time holds it."""

    __slots__ = ()

    @abstractmethod
    def acquire(self, actor: Actor) -> None:
        """Take the lock."""

    @abstractmethod
    def release(self, actor: Actor) -> None:
        """Give the lock back."""

    @abstractmethod
    def hold(self, actor: Actor) -> AbstractContextManager[None]:
        """`with lock.hold(actor):` takes the lock for the block."""

    @abstractmethod
    def is_held_by(self, actor: Actor) -> bool:
        """Whether this actor holds the lock."""

    def assert_held(self, actor: Actor) -> None:
        """`lockdep_assert_held`."""
        assert self.is_held_by(actor), f"{actor} needs {self.name} and does not hold it"


class Spinlock(Lock):
    """A u32 word: 0, or the number of the actor that holds it, with interrupts off."""

    SIZE: Final = 4

    __slots__ = ("_cas", "_exchange", "_word")

    def __init__(self, ram: Ram, gpa: int, name: str, rank: Rank = Rank.LEAF) -> None:
        super().__init__(name, rank)
        self._word: Final = ram.u32(gpa)
        self._cas: Final = self._word.cas
        self._exchange: Final = self._word.exchange

    @property
    def owner(self) -> int:
        """Number of the holder, 0 if it is free."""
        return self._word.load()

    def is_held_by(self, actor: Actor) -> bool:
        """Whether this actor holds the lock."""
        return self._word.load() == actor.number

    def hold(self, actor: Actor) -> HeldSpinlock:
        """`with lock.hold(actor):` takes the lock for the block."""
        return HeldSpinlock(self, actor)

    def acquire(self, actor: Actor) -> None:
        """`spin_lock_irqsave`: interrupts off first, so that no ISR of this processor finds it taken."""
        flags = actor.irq_save() if actor.has_interrupts else 0
        held = actor.held
        if held and held[-1][0].rank >= self.rank:
            raise self.out_of_rank(actor)
        if self._cas(0, actor.number):
            self._spin(actor)
        actor.spinning += 1
        held.append((self, flags))

    def lock(self, actor: Actor) -> None:
        """`spin_lock`: as `acquire` for who has interrupts off already, as an ISR has: there is nothing to save."""
        held = actor.held
        if held and held[-1][0].rank >= self.rank:
            raise self.out_of_rank(actor)
        if self._cas(0, actor.number):
            self._spin(actor)
        actor.spinning += 1
        held.append((self, _WERE_OFF))

    def unlock(self, actor: Actor) -> None:
        """`spin_unlock`, of what was taken by `lock`."""
        lock, _flags = actor.held.pop()
        assert lock is self or lock.name == self.name, f"{actor} gives {self.name} back before {lock.name}"
        actor.spinning -= 1
        owner = self._exchange(0)
        assert owner == actor.number, f"{actor} gave back {self.name}, which {owner:#x} held"

    def try_acquire(self, actor: Actor) -> bool:
        """`spin_trylock_irqsave`: True if it was free (the rank does not matter: nobody waits)."""
        flags = actor.irq_save()
        if self._cas(0, actor.number):
            actor.irq_restore(flags)
            return False
        actor.spinning += 1
        actor.held.append((self, flags))
        return True

    def release(self, actor: Actor) -> None:
        """`spin_unlock_irqrestore`: the word first, then the interrupts."""
        lock, flags = actor.held.pop()
        assert lock is self or lock.name == self.name, f"{actor} gives {self.name} back before {lock.name}"
        actor.spinning -= 1
        owner = self._exchange(0)
        assert owner == actor.number, f"{actor} gave back {self.name}, which {owner:#x} held"
        if actor.has_interrupts:
            actor.irq_restore(flags)

    def _spin(self, actor: Actor) -> None:
        """Look until the word is 0; every 20 looks let the holder run, and see whether it still can."""
        cas = self._cas
        number = actor.number
        deadline_ns = actor.now() + SPINLOCK_TIMEOUT_NS
        while True:
            for _ in range(LOOKS_BEFORE_YIELD):
                owner = cas(0, number)
                if not owner:
                    return
            assert owner != number, f"{actor} takes {self.name} twice"
            actor.yield_processor()
            if actor.stopping():
                raise MachineStopping(f"{actor} waited for {self.name}")
            if actor.is_dead(owner):
                raise LockOwnerDied(self.name, owner)
            if actor.now() > deadline_ns:
                raise LockStuck(self.name, owner, [number], SPINLOCK_TIMEOUT_NS)


class HeldSpinlock:
    """The block of a `with lock.hold(actor)`: what `acquire` and `release` do, without a call to them.

    A lock that is free is most of what a channel's bring-up does, some thirty times.
    """

    __slots__ = ("_actor", "_lock")

    def __init__(self, lock: Spinlock, actor: Actor) -> None:
        self._lock = lock
        self._actor = actor

    def __enter__(self) -> None:
        lock, actor = self._lock, self._actor
        flags = actor.irq_save() if actor.has_interrupts else 0
        held = actor.held
        if held and held[-1][0].rank >= lock.rank:
            raise lock.out_of_rank(actor)
        if lock._cas(0, actor.number):
            lock._spin(actor)
        actor.spinning += 1
        held.append((lock, flags))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lock, actor = self._lock, self._actor
        taken, flags = actor.held.pop()
        assert taken is lock or taken.name == lock.name, f"{actor} gives {lock.name} back before {taken.name}"
        actor.spinning -= 1
        owner = lock._exchange(0)
        assert owner == actor.number, f"{actor} gave back {lock.name}, which {owner:#x} held"
        if actor.has_interrupts:
            actor.irq_restore(flags)


class Mutex(Lock):
    """A u64 word: its owner's number above, the chain of those who sleep for it below (`wait`).

    Giving it back takes the chain out in the same swap and wakes all of it, oldest first; who is too late
    announces itself again. The chains are short: workers, and the tasks that open or close.
    """

    SIZE: Final = 8

    __slots__ = ("_chain", "_word")

    def __init__(self, ram: Ram, gpa: int, name: str, rank: Rank = Rank.DRIVER_STATE) -> None:
        super().__init__(name, rank)
        self._word: Final = ram.u64(gpa)
        self._chain: Final = WaitWord(ram, gpa, name)

    @property
    def owner(self) -> int:
        """Number of the holder, 0 if it is free."""
        return self._word.load() >> 32

    def is_held_by(self, actor: Actor) -> bool:
        """Whether this actor holds the mutex."""
        return self._word.load() >> 32 == actor.number

    def waiters(self, actor: Actor) -> list[int]:
        """Who sleeps for it, oldest first."""
        return self._chain.waiters(actor.waiters)

    def hold(self, actor: Actor) -> HeldMutex:
        """`with lock.hold(actor):` takes the mutex for the block."""
        return HeldMutex(self, actor)

    def acquire(self, actor: Actor) -> None:
        """`mutex_lock`; raises LockStuck when its time passed, LockOwnerDied, MachineStopping."""
        # Who has no interrupts and no spinlock may wait: asked here, as it is nearly always so.
        if actor.spinning or actor.has_interrupts:
            assert_may_wait(actor, self.name)
        held = actor.held
        if held and held[-1][0].rank >= self.rank:
            raise self.out_of_rank(actor)
        if self._word.cas(0, actor.number << 32):
            self._wait(actor)
        held.append((self, 0))

    def try_acquire(self, actor: Actor) -> bool:
        """`mutex_trylock`: True if it was free."""
        assert_may_wait(actor, self.name)
        while not (word := self._word.load()) >> 32:
            if self._word.cas(word, word | actor.number << 32) == word:
                actor.held.append((self, 0))
                return True
        return False

    def release(self, actor: Actor) -> None:
        """`mutex_unlock`; mutexes may be given back in any order."""
        held = actor.held
        if held and held[-1][0] is self:  # the last one taken, nearly always
            held.pop()
        else:
            for position in range(len(held) - 1, -1, -1):
                if held[position][0].name == self.name:
                    del held[position]
                    break
        word = self._word.exchange(0)
        assert word >> 32 == actor.number, f"{actor} gave back {self.name}, which {word >> 32:#x} held"
        if word & INDEX_MASK:
            self._chain.wake(actor, word & INDEX_MASK)

    def _wait(self, actor: Actor) -> None:
        """Sleep until the word has no owner and we are it."""
        deadline_ns = actor.now() + MUTEX_TIMEOUT_NS
        while not self._take_or_sleep(actor, deadline_ns):
            if actor.stopping():
                raise MachineStopping(f"{actor} waited for {self.name}")
            owner = self.owner
            if owner and actor.is_dead(owner):
                raise LockOwnerDied(self.name, owner)
            if actor.now() >= deadline_ns:
                waiters = [*self.waiters(actor), actor.number]
                raise LockStuck(self.name, owner, waiters, MUTEX_TIMEOUT_NS)

    def _take_or_sleep(self, actor: Actor, deadline_ns: int) -> bool:
        """One round: take it if it is free, else join the chain (in the same swap) and sleep."""
        while True:
            word = self._word.load()
            if not word >> 32:
                if self._word.cas(word, word | actor.number << 32) == word:
                    return True
                continue
            assert word >> 32 != actor.number, f"{actor} takes {self.name} twice"
            waiter = self._chain.enlist(actor)
            waiter.next = word & INDEX_MASK
            if self._word.cas(word, word & ~INDEX_MASK | waiter.index + 1) == word:
                break
            self._chain.forget(actor, waiter)
        sleep(actor, waiter, deadline_ns)
        self._chain.retract(actor, waiter)
        return False


class HeldMutex:
    """The block of a `with mutex.hold(actor)`: `acquire` and `release` of one that is free, as in `HeldSpinlock`."""

    __slots__ = ("_actor", "_lock")

    def __init__(self, lock: Mutex, actor: Actor) -> None:
        self._lock = lock
        self._actor = actor

    def __enter__(self) -> None:
        lock, actor = self._lock, self._actor
        if actor.spinning or actor.has_interrupts:
            assert_may_wait(actor, lock.name)
        held = actor.held
        if held and held[-1][0].rank >= lock.rank:
            raise lock.out_of_rank(actor)
        if lock._word.cas(0, actor.number << 32):
            lock._wait(actor)
        held.append((lock, 0))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lock, actor = self._lock, self._actor
        held = actor.held
        if held and held[-1][0] is lock:
            held.pop()
            word = lock._word.exchange(0)
            assert word >> 32 == actor.number, f"{actor} gave back {lock.name}, which {word >> 32:#x} held"
            if word & INDEX_MASK:
                lock._chain.wake(actor, word & INDEX_MASK)
        else:
            lock.release(actor)


def spinlock(rank: Rank) -> Part[Spinlock]:
    """A `Spinlock` as a field of a record."""
    return Part(lambda ram, gpa, name: Spinlock(ram, gpa, name, rank), Spinlock.SIZE, "atomic: it is the lock", 4)


def mutex(rank: Rank) -> Part[Mutex]:
    """A `Mutex` as a field of a record."""
    return Part(lambda ram, gpa, name: ram.variant(Mutex)(ram, gpa, name, rank), Mutex.SIZE, "atomic: it is the lock")
