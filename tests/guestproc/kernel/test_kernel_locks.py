"""Spinlocks and mutexes: who has them, in which order, and what happens when that goes wrong."""

from __future__ import annotations

import itertools

import pytest

from emu.errors import MachineStopping
from guestproc.kernel.actors import Actor, Context
from guestproc.kernel.locks import (
    MUTEX_TIMEOUT_NS,
    SPINLOCK_TIMEOUT_NS,
    LockOwnerDied,
    LockStuck,
    Mutex,
    Rank,
    Spinlock,
)
from guestproc.kernel.wait import assert_may_wait
from tests.guestproc.kernel.fakes import FREE_GPA, SECOND_NS, Crowd, Lone, meddle, meddle_with


def spinlock(lone: Lone, rank: Rank = Rank.LEAF, gpa: int = FREE_GPA) -> Spinlock:
    """A spinlock at `gpa`."""
    return Spinlock(lone.ram, gpa, f"spin{gpa:x}", rank)


def mutex(lone: Lone, rank: Rank = Rank.CHANNEL, gpa: int = FREE_GPA + 64) -> Mutex:
    """A mutex at `gpa`."""
    return Mutex(lone.ram, gpa, f"mutex{gpa:x}", rank)


def test_a_spinlock_holds_its_owners_number_with_interrupts_off() -> None:
    """Taking it stores the actor's number and switches interrupts off; giving it back undoes both."""
    lone = Lone()
    lock = spinlock(lone)

    with lock.hold(lone.actor):
        assert lock.owner == lone.actor.number
        assert lone.hooks.irqs_off

    assert lock.owner == 0
    assert not lone.hooks.irqs_off


def test_an_isr_takes_a_spinlock_and_leaves_interrupts_as_they_are() -> None:
    """Whoever has them off already neither switches them off nor, when it gives the lock back, on."""
    lone = Lone()
    lock, later = spinlock(lone, Rank.SCHED), spinlock(lone, Rank.CHANNELMSG, FREE_GPA + 8)
    flags = lone.actor.irq_save()

    lock.lock(lone.actor)
    assert (lock.owner, lone.actor.spinning, lone.hooks.irqs_off) == (lone.actor.number, 1, True)
    with pytest.raises(AssertionError, match="while holding"):
        later.lock(lone.actor)
    lock.unlock(lone.actor)

    assert (lock.owner, lone.actor.spinning, lone.hooks.irqs_off) == (0, 0, True)
    lone.actor.irq_restore(flags)
    assert not lone.hooks.irqs_off


def test_a_spinlock_is_given_back_before_interrupts_come_on() -> None:
    """An ISR that runs when interrupts come on again finds the lock free."""
    lone = Lone()
    lock = spinlock(lone)
    owners = []
    restore = lone.hooks.irq_restore

    def isr_first(flags: int) -> None:
        owners.append(lock.owner)
        restore(flags)

    lone.hooks.irq_restore = isr_first  # type: ignore[method-assign]
    actor = lone.new_actor(2)
    with lock.hold(actor):
        pass

    assert owners == [0]


def test_interrupts_stay_off_until_the_outer_spinlock_is_given_back() -> None:
    """Each lock restores what it found."""
    lone = Lone()
    outer, inner = spinlock(lone, Rank.QUEUE), spinlock(lone, Rank.LEAF, FREE_GPA + 8)

    with outer.hold(lone.actor):
        with inner.hold(lone.actor):
            pass
        assert lone.hooks.irqs_off
    assert not lone.hooks.irqs_off


def test_a_contended_spinlock_lets_the_holder_run() -> None:
    """After 20 looks the looker yields; the holder then gives the lock back."""
    lone = Lone()
    lock = spinlock(lone)
    other = lone.new_actor(2)
    lock.acquire(other)
    lone.hooks.on_yield = lambda: lock.release(other)

    lock.acquire(lone.actor)

    assert lone.hooks.yields == 1
    assert lock.is_held_by(lone.actor)


def test_a_spinlock_taken_just_before_ours_is_waited_for() -> None:
    """Looking and taking are one operation: who gets in between keeps the lock."""
    lone = Lone()
    lock, theirs, other = spinlock(lone), spinlock(lone), lone.new_actor(2)
    meddle_with(lock, "_cas", lambda: theirs.acquire(other))
    lone.hooks.on_yield = lambda: theirs.release(other)

    lock.acquire(lone.actor)

    assert lone.hooks.yields == 1
    assert lock.owner == lone.actor.number


def test_try_acquire_never_spins() -> None:
    """A spinlock that is taken is not waited for, and interrupts are as before."""
    lone = Lone()
    lock = spinlock(lone)
    other = lone.new_actor(2)

    assert lock.try_acquire(other)
    lone.hooks.irqs_off = False
    assert not lock.try_acquire(lone.actor)
    assert not lone.hooks.irqs_off and not lone.actor.held


def test_a_spinlock_of_a_dead_owner_stops_the_machine_by_its_name() -> None:
    """What the lock covers may be half changed, so nobody takes it over."""
    lone = Lone()
    lock = spinlock(lone)
    other = lone.new_actor(2)
    lock.acquire(other)
    lone.hooks.dead.add(other.number)

    with pytest.raises(LockOwnerDied, match=f"spin20000: its owner, actor {other.number:#x}, died"):
        lock.acquire(lone.actor)


def test_a_spinlock_that_is_never_free_is_reported_in_time() -> None:
    """The deadline is in machine time; the report names the lock and its owner."""
    lone = Lone()
    lock = spinlock(lone)
    other = lone.new_actor(2)
    lock.acquire(other)
    start = lone.hooks.time_ns

    with pytest.raises(LockStuck, match="lock spin20000: held by actor 0x1002") as caught:
        lock.acquire(lone.actor)
    assert caught.value.owner == other.number
    assert SPINLOCK_TIMEOUT_NS <= lone.hooks.time_ns - start <= SPINLOCK_TIMEOUT_NS + SECOND_NS


def test_a_looker_leaves_when_the_machine_stops() -> None:
    """The holder may be gone already."""
    lone = Lone()
    lock = spinlock(lone)
    lock.acquire(lone.new_actor(2))
    lone.hooks.stop = True

    with pytest.raises(MachineStopping):
        lock.acquire(lone.actor)


def test_taking_a_lock_twice_is_noticed() -> None:
    """An actor that has the lock would wait for itself."""
    lone = Lone()
    lock, sleeping = spinlock(lone), mutex(lone)
    lock.acquire(lone.actor)
    lone.actor.held.clear()  # as if it had forgotten: the word itself tells
    with pytest.raises(AssertionError, match="a1 takes spin20000 twice"):
        lock.acquire(lone.actor)

    other = Lone()
    sleeping = mutex(other)
    sleeping.acquire(other.actor)
    other.actor.held.clear()
    with pytest.raises(AssertionError, match="a1 takes mutex20040 twice"):
        sleeping.acquire(other.actor)


def test_giving_back_what_another_holds_is_noticed() -> None:
    """The word must hold the number of who gives the lock back."""
    lone = Lone()
    lock, other = spinlock(lone), lone.new_actor(2)
    lock.acquire(lone.actor)
    other.held.append((lock, 0))

    with pytest.raises(AssertionError, match="a2 gave back spin20000, which 0x1001 held"):
        lock.release(other)


def test_assert_held_knows_the_holder() -> None:
    """`lockdep_assert_held` for both kinds."""
    lone = Lone()
    for lock in (mutex(lone), spinlock(lone)):
        with pytest.raises(AssertionError, match="needs"):
            lock.assert_held(lone.actor)
        lock.acquire(lone.actor)
        lock.assert_held(lone.actor)


def new_lock(lone: Lone, rank: Rank) -> Spinlock | Mutex:
    """The kind that this rank is for, at an address of its own."""
    gpa = FREE_GPA + 64 * rank
    return mutex(lone, rank, gpa) if rank < Rank.CHANNELMSG else spinlock(lone, rank, gpa)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(Rank, Rank)))
def test_locks_are_taken_in_rising_rank_only(first: Rank, second: Rank) -> None:
    """Every pair of ranks: the second is taken only above the first, and no mutex inside a spinlock."""
    lone = Lone()
    outer = new_lock(lone, first)
    inner = new_lock(lone, second)
    outer.acquire(lone.actor)

    if first < second:
        inner.acquire(lone.actor)
        assert [lock.rank for lock, _ in lone.actor.held] == [first, second]
    else:
        with pytest.raises(AssertionError, match=r"while holding"):
            inner.acquire(lone.actor)


def test_mutexes_may_be_given_back_in_any_order() -> None:
    """The locks held stay in order of rank, so the check of ranks stays right."""
    lone = Lone()
    low, high = mutex(lone, Rank.DEVICE), mutex(lone, Rank.CHANNEL, FREE_GPA + 128)
    low.acquire(lone.actor)
    high.acquire(lone.actor)

    low.release(lone.actor)

    assert [lock.rank for lock, _ in lone.actor.held] == [Rank.CHANNEL]
    with pytest.raises(AssertionError):
        low.acquire(lone.actor)


def test_nobody_waits_inside_a_spinlock() -> None:
    """The helper that every wait, IPI, exit and callback calls names the locks that are held."""
    lone = Lone()
    assert_may_wait(lone.actor, "something")

    with (
        spinlock(lone).hold(lone.actor),
        pytest.raises(AssertionError, match="waits for something while holding spin"),
    ):
        assert_may_wait(lone.actor, "something")


@pytest.mark.parametrize("context", [Context.SOFTIRQ, Context.HARDIRQ])
def test_nobody_waits_in_an_interrupt(context: Context) -> None:
    """Nor does an ISR or a tasklet take a mutex."""
    lone = Lone()
    lone.hooks.where = context

    with pytest.raises(AssertionError, match=f"in {context.name}"):
        mutex(lone).acquire(lone.actor)


def test_nobody_waits_with_interrupts_off() -> None:
    """What would end the wait may be an interrupt."""
    lone = Lone()
    lone.hooks.irqs_off = True

    with pytest.raises(AssertionError, match="with interrupts off"):
        mutex(lone).acquire(lone.actor)


def test_a_mutex_may_be_held_across_a_wait() -> None:
    """Unlike a spinlock."""
    lone = Lone()

    with mutex(lone).hold(lone.actor):
        assert_may_wait(lone.actor, "an answer")


def test_giving_a_mutex_back_wakes_who_sleeps_for_it() -> None:
    """The waiter sleeps without looking; the owner's swap takes its announcement out and posts."""
    lone = Lone()
    lock, other = mutex(lone), lone.new_actor(2)
    lock.acquire(other)
    lone.hooks.meanwhile.append(lambda: lock.release(other))

    lock.acquire(lone.actor)

    assert lone.hooks.woken == [lone.actor.number]
    assert lock.owner == lone.actor.number
    assert lone.waiters.in_use == 0


def test_a_mutex_given_back_just_before_the_announcement_is_taken() -> None:
    """Announcing oneself fails when the owner went in between: nobody sleeps for a mutex that is free."""
    lone = Lone()
    lock, theirs, other = mutex(lone), mutex(lone), lone.new_actor(2)
    theirs.acquire(other)
    looks = [lambda: None, lambda: theirs.release(other)]

    def before_each_change() -> None:
        looks.pop(0)()
        if looks:
            meddle(lock, "_word", before_each_change)

    meddle(lock, "_word", before_each_change)
    lock.acquire(lone.actor)

    assert (lock.owner, lone.hooks.woken, lone.waiters.in_use) == (lone.actor.number, [], 0)


def test_a_wake_for_no_reason_does_not_open_a_mutex() -> None:
    """A stale token ends the sleep, not the wait."""
    lone = Lone()
    lock, other = mutex(lone), lone.new_actor(2)
    lock.acquire(other)
    lone.hooks.meanwhile.extend([lambda: None, lambda: None, lambda: lock.release(other)])

    lock.acquire(lone.actor)

    assert lock.owner == lone.actor.number


def test_a_mutex_that_is_taken_again_before_the_waiter_looks_is_waited_for_again() -> None:
    """Waking does not hand the mutex over: who is late announces itself again."""
    lone = Lone()
    lock, other = mutex(lone), lone.new_actor(2)
    lock.acquire(other)

    def steal() -> None:
        lock.release(other)
        lock.acquire(other)

    lone.hooks.meanwhile.extend([steal, lambda: lock.release(other)])
    lock.acquire(lone.actor)

    assert lone.hooks.woken == [lone.actor.number] * 2
    assert lone.waiters.in_use == 0


def test_a_mutex_that_is_never_free_reports_owner_and_waiters() -> None:
    """The report names the mutex, who holds it and who waits; nothing is left behind in the mutex."""
    lone = Lone()
    lock, other = mutex(lone), lone.new_actor(2)
    lock.acquire(other)

    with pytest.raises(LockStuck, match="mutex20040: held by actor 0x1002, waited for by 0x1001") as caught:
        lock.acquire(lone.actor)

    assert caught.value.waiters == [lone.actor.number]
    assert caught.value.timeout_ns == MUTEX_TIMEOUT_NS
    assert lone.waiters.in_use == 0
    lock.release(other)
    assert lone.hooks.woken == []


def test_a_mutex_of_a_dead_owner_stops_the_machine_by_its_name() -> None:
    """A waiter that is woken looks whether the owner still lives."""
    lone = Lone()
    lock, other = mutex(lone), lone.new_actor(2)
    lock.acquire(other)
    lone.hooks.meanwhile.append(lambda: lone.hooks.dead.add(other.number))

    with pytest.raises(LockOwnerDied, match="mutex20040"):
        lock.acquire(lone.actor)


def test_a_mutex_waiter_leaves_when_the_machine_stops() -> None:
    """The launcher posts every semaphore once the state word says so."""
    lone = Lone()
    lock = mutex(lone)
    lock.acquire(lone.new_actor(2))
    lone.hooks.meanwhile.append(lambda: setattr(lone.hooks, "stop", True))

    with pytest.raises(MachineStopping):
        lock.acquire(lone.actor)
    assert lone.waiters.in_use == 0


def test_a_mutex_that_is_free_is_tried_successfully_once() -> None:
    """`mutex_trylock` takes a free one and leaves a taken one."""
    lone = Lone()
    lock, other = mutex(lone), lone.new_actor(2)

    assert lock.try_acquire(other)
    assert not lock.try_acquire(lone.actor)
    assert not lone.actor.held


def count_up(kind: type[Spinlock] | type[Mutex], rounds: int) -> None:
    """Two processes add to a plain word under one lock; an addition lost means both were inside."""
    crowd = Crowd(2)
    word = FREE_GPA + 128

    def part(actor: Actor) -> None:
        lock = kind(crowd.ram, FREE_GPA, "lock", Rank.QUEUE if kind is Spinlock else Rank.CHANNEL)
        count = crowd.ram.words64(word, 1)
        for _ in range(rounds):
            with lock.hold(actor):
                value = count[0]
                assert lock.owner == actor.number
                count[0] = value + 1

    crowd.run(part, part)
    assert crowd.ram.words64(word, 1)[0] == 2 * rounds
    assert crowd.waiters.in_use == 0


@pytest.mark.parametrize("kind", [Spinlock, Mutex])
def test_only_one_process_is_inside(kind: type[Spinlock] | type[Mutex]) -> None:
    """Plain additions under the lock are never lost."""
    count_up(kind, 10_000)


@pytest.mark.soak
@pytest.mark.parametrize("kind", [Spinlock, Mutex])
def test_only_one_process_is_inside_for_long(kind: type[Spinlock] | type[Mutex]) -> None:
    """The same, long enough for the rare orders."""
    count_up(kind, 100_000)
