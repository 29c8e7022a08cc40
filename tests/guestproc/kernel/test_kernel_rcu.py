"""Grace periods: what began before is waited for, what begins after is not."""

from __future__ import annotations

import pytest

from emu.errors import DeadlinePassed
from guestproc.kernel.actors import Actor
from guestproc.kernel.rcu import isr_enter, isr_exit, synchronize
from guestproc.kernel.wait import WaitQueue
from tests.guestproc.kernel.fakes import FREE_GPA, SECOND_NS, Crowd, Lone


class World:
    """Three processors' sequences."""

    def __init__(self, lone: Lone | Crowd) -> None:
        self.wait = WaitQueue(lone.ram, FREE_GPA, "grace")
        self.sequences = [lone.ram.u32(FREE_GPA + 64 * cpu) for cpu in range(1, 4)]


def test_without_an_isr_there_is_nothing_to_wait_for() -> None:
    """Every sequence is even."""
    lone = Lone()
    world = World(lone)
    isr_enter(world.sequences[1])
    isr_exit(lone.actor, world.sequences[1], world.wait)

    synchronize(lone.actor, world.sequences, world.wait, 1)

    assert world.sequences[1].load() == 2


def test_an_isr_that_began_before_is_waited_for() -> None:
    """Its end wakes the waiter; a new ISR on the same processor does not hold it up."""
    lone = Lone()
    world = World(lone)
    cpu = lone.new_actor(2, is_vcpu=True)
    isr_enter(world.sequences[0])

    def ends_and_begins_again() -> None:
        isr_exit(cpu, world.sequences[0], world.wait)
        isr_enter(world.sequences[0])

    lone.hooks.meanwhile.append(ends_and_begins_again)
    synchronize(lone.actor, world.sequences, world.wait)

    assert lone.hooks.woken == [lone.actor.number]


def test_an_isr_that_begins_later_is_not_waited_for() -> None:
    """It looks its channel up after the unpublishing."""
    lone = Lone()
    world = World(lone)
    cpu = lone.new_actor(2, is_vcpu=True)
    isr_enter(world.sequences[0])

    def another_begins() -> None:
        isr_enter(world.sequences[2])
        isr_exit(cpu, world.sequences[0], world.wait)

    lone.hooks.meanwhile.append(another_begins)
    synchronize(lone.actor, world.sequences, world.wait)


def test_an_isr_that_does_not_end_is_reported_by_its_cpu() -> None:
    """The wait has a deadline."""
    lone = Lone()
    world = World(lone)
    isr_enter(world.sequences[1])

    with pytest.raises(DeadlinePassed, match=r"grace period, ISRs of CPUs \[1\]"):
        synchronize(lone.actor, world.sequences, world.wait, SECOND_NS)
    assert lone.waiters.in_use == 0


def test_isrs_do_not_nest() -> None:
    """The sequence would go even inside one."""
    lone = Lone()
    world = World(lone)
    with pytest.raises(AssertionError, match="ended that did not begin"):
        isr_exit(lone.actor, world.sequences[0], world.wait)

    isr_enter(world.sequences[1])
    with pytest.raises(AssertionError, match="inside an ISR"):
        isr_enter(world.sequences[1])


def read_and_remove(rounds: int) -> None:
    """Two processors read a published word in their ISRs, a remover unpublishes and spoils what it names."""
    crowd = Crowd(3)
    published, slots = crowd.ram.u32(FREE_GPA + 0x400), FREE_GPA + 0x800
    stop = crowd.ram.u32(FREE_GPA + 0x440)
    crowd.ram.u32(slots + 4).store(1)
    published.store(1)

    def reader(actor: Actor) -> None:
        world = World(crowd)
        sequence = world.sequences[actor.cpu]
        while not stop.load():
            isr_enter(sequence)
            slot = published.load()
            if slot:
                word = crowd.ram.u32(slots + 4 * slot)
                for _ in range(5):
                    assert word.load() == 1, "the record was freed under the ISR"
            isr_exit(actor, sequence, world.wait)

    def remover(actor: Actor) -> None:
        world = World(crowd)
        for number in range(rounds):
            old, new = 1 + number % 2, 2 - number % 2
            crowd.ram.u32(slots + 4 * new).store(1)
            published.store(new)
            synchronize(actor, world.sequences, world.wait, 20 * SECOND_NS)
            crowd.ram.u32(slots + 4 * old).store(0xDEAD)
        stop.store(1)

    crowd.run(reader, reader, remover)
    assert crowd.waiters.in_use == 0


def test_nothing_is_freed_under_an_isr_of_another_process() -> None:
    """Unpublish, synchronize, free: no ISR sees what was freed, and no wake is lost."""
    read_and_remove(300)


@pytest.mark.soak
def test_nothing_is_freed_under_an_isr_of_another_process_for_long() -> None:
    """The same, long enough for the rare orders."""
    read_and_remove(30_000)
