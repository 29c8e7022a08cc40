"""A machine that records says who holds which mutex, and who sleeps for what; one that does not has none of it."""

from __future__ import annotations

import pytest

from emu.errors import MachineStopping
from emu.tracing import EVENTS, WaitedFor
from guestproc.kernel.actors import Actor, actor_number
from guestproc.kernel.layout import Era, KernelTables
from guestproc.kernel.locks import Mutex
from guestproc.kernel.wait import Completion, WaitQueue
from guestproc.kernel.wait_trace import RecordedMutex, RecordedSleepers, record_waits
from tests.guestproc.kernel.fakes import FREE_GPA, SECOND_NS, Lone

NUMBERS = {spec.number: name for name, spec in EVENTS.items()}
Said = list[tuple[str, int, int]]


def listener(lone: Lone, slot: int, said: Said) -> Actor:
    """An actor whose records are kept as (event, its first two arguments)."""

    def record(event: int, *words: int) -> None:
        first, second = EVENTS[NUMBERS[event]].unpack([*words, *[0] * (6 - len(words))])[:2]
        said.append((NUMBERS[event], first, second))

    return Actor(actor_number(slot, 1), lone.hooks, lone.waiters, name=f"a{slot}", record=record)


def recorded() -> tuple[Lone, Actor, Said]:
    """RAM of a process that records, and an actor in it."""
    lone, said = Lone(), Said()
    record_waits(lone.ram)
    return lone, listener(lone, 2, said), said


def test_mutex_is_recorded_while_it_is_held() -> None:
    """Taken, tried, and given back; a try in vain is nothing."""
    lone, actor, said = recorded()
    mutex = lone.ram.variant(Mutex)(lone.ram, FREE_GPA, "m")
    with mutex.hold(actor):
        assert not mutex.try_acquire(lone.new_actor(3))
    assert mutex.try_acquire(actor)
    mutex.release(actor)

    assert said == [(what, FREE_GPA, actor.number) for what in ("lock", "unlock", "lock", "unlock")]


def test_sleeper_for_a_mutex_is_recorded_and_its_waker() -> None:
    """Before it is announced; by who gives the mutex back; and then it has it."""
    lone, actor, said = recorded()
    mutex = lone.ram.variant(Mutex)(lone.ram, FREE_GPA, "m")
    owner = listener(lone, 3, said)
    mutex.acquire(owner)
    lone.hooks.meanwhile.append(lambda: mutex.release(owner))
    mutex.acquire(actor)

    what = int(WaitedFor.MUTEX)
    assert said == [
        ("lock", FREE_GPA, owner.number),
        ("wait", what, FREE_GPA),
        ("unlock", FREE_GPA, owner.number),
        ("wake", what, FREE_GPA),
        ("wait_done", what, FREE_GPA),
        ("lock", FREE_GPA, actor.number),
    ]


def test_completion_that_is_done_is_no_wait() -> None:
    """Only who sleeps is recorded; a wait whose time passes ends, too."""
    lone, actor, said = recorded()
    event = lone.ram.variant(Completion)(lone.ram, FREE_GPA, "answer")
    event.complete(actor)
    event.wait(actor)
    assert said == []

    assert not event.wait_timeout(actor, SECOND_NS)
    assert said == [("wait", WaitedFor.COMPLETION, FREE_GPA), ("wait_done", WaitedFor.COMPLETION, FREE_GPA)]


def test_queue_is_recorded_even_if_the_machine_stops() -> None:
    """The wait has ended then."""
    lone, actor, said = recorded()
    queue = lone.ram.variant(WaitQueue)(lone.ram, FREE_GPA, "queue")
    lone.hooks.stop = True
    with pytest.raises(MachineStopping):
        queue.wait_until(actor, lambda: False)

    assert said == [("wait", WaitedFor.WAIT_QUEUE, FREE_GPA), ("wait_done", WaitedFor.WAIT_QUEUE, FREE_GPA)]


def test_records_of_the_guest_have_recorded_parts_only_where_the_process_records() -> None:
    """All that lie in records: chosen when the process attaches, by nobody afterwards."""
    memory = bytearray(64 << 20)
    plain, other = KernelTables.format(memory, 2, Era.CURRENT), KernelTables.attach(memory)
    record_waits(other.ram)

    assert type(plain.connection.channel_mutex) is Mutex
    assert type(other.connection.channel_mutex) is RecordedMutex
    assert type(plain.connection.offer_wait) is WaitQueue
    assert type(other.connection.offer_wait._watcher) is RecordedSleepers
    assert type(other.cpus.at(0).call._wait._watcher) is RecordedSleepers
