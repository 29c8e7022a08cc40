"""Calls to another processor: they run there once, and a processor that is gone ends the wait."""

from __future__ import annotations

import pytest

from emu.errors import DeadlinePassed
from guestproc.kernel.actors import Actor
from guestproc.kernel.functions import IPI_FUNCTIONS
from guestproc.kernel.locks import Spinlock
from guestproc.kernel.smp import CallRecord, ProcessorGone
from tests.guestproc.kernel.fakes import FREE_GPA, SECOND_NS, Crowd, Lone

REMEMBER = 901
ADD = 902


@IPI_FUNCTIONS.register(REMEMBER, "test: remember")
def remember(owner: list[int], argument: int) -> None:
    """The owner is the test's list."""
    owner.append(argument)


@IPI_FUNCTIONS.register(ADD, "test: add")
def add(owner: Crowd, argument: int) -> None:
    """Adds to a plain word: only the target ever does."""
    owner.ram.words64(LOG_GPA, 1)[0] += argument


LOG_GPA = FREE_GPA + 0x100


class World:
    """A caller and CPU 1's call record."""

    def __init__(self) -> None:
        self.lone = Lone()
        self.caller = self.lone.actor
        self.target = self.lone.new_actor(2, is_vcpu=True, cpu=1)
        self.record = CallRecord(self.lone.ram, FREE_GPA, "cpus[1].call")
        self.ran: list[int] = []
        self.online = True

    def call(self, argument: int = 5) -> None:
        self.record.call(self.caller, 1, REMEMBER, argument, lambda: self.online, SECOND_NS)


def test_a_call_runs_on_the_target_and_the_caller_waits() -> None:
    """The interrupt is requested once; the target runs the function and wakes the caller."""
    world = World()
    world.lone.hooks.meanwhile.append(lambda: world.record.run(world.target, world.ran))

    world.call()

    assert (world.ran, world.lone.hooks.called) == ([5], [1])
    assert world.lone.hooks.woken == [world.caller.number]
    assert not world.record.run(world.target, world.ran), "it is not run a second time"
    assert world.lone.waiters.in_use == 0


def test_an_interrupt_without_a_call_runs_nothing() -> None:
    """A spurious call-function interrupt is harmless."""
    world = World()

    assert not world.record.run(world.target, world.ran)


def test_a_second_caller_waits_for_its_turn() -> None:
    """One record, so calls to a processor are made one after the other."""
    world = World()
    second = world.lone.new_actor(3)

    def second_calls() -> None:
        world.lone.hooks.meanwhile.append(lambda: world.record.run(world.target, world.ran))
        with pytest.raises(DeadlinePassed):
            world.record.call(second, 1, REMEMBER, 6, lambda: True, SECOND_NS // 2)

    world.lone.hooks.meanwhile.append(second_calls)
    world.call()

    assert world.ran == [5]
    world.lone.hooks.meanwhile.append(lambda: world.record.run(world.target, world.ran))
    world.call(7)
    assert world.ran == [5, 7]


def test_an_offline_target_ends_the_call_with_an_error() -> None:
    """Before it was claimed, and while the caller waits; the record is free again afterwards."""
    world = World()
    world.online = False
    with pytest.raises(ProcessorGone, match="CPU 1 is offline or dead"):
        world.call()

    world.online = True

    def goes_offline() -> None:
        world.online = False
        world.record.offline(world.target)

    world.lone.hooks.meanwhile.append(goes_offline)
    with pytest.raises(ProcessorGone):
        world.call()
    assert world.lone.waiters.in_use == 0

    world.online = True
    world.lone.hooks.meanwhile.append(lambda: world.record.run(world.target, world.ran))
    world.call(8)
    assert world.ran == [8]


def test_a_call_given_up_while_it_runs_frees_the_record_when_it_returns() -> None:
    """The caller's deadline passes inside the function; the next call finds the record free."""
    world = World()
    caught: list[DeadlinePassed] = []

    class Slow(list[int]):
        """Appending takes as long as the caller waits."""

        def append(self, argument: int) -> None:
            """The target is in here when the caller's time is over."""
            super().append(argument)
            world.lone.hooks.time_ns += 2 * SECOND_NS
            world.record._give_back(world.caller)

    slow = Slow()
    world.lone.hooks.meanwhile.append(lambda: world.record.run(world.target, slow))
    try:
        world.call()
    except DeadlinePassed as error:
        caught.append(error)
    assert len(slow) == 1 and len(caught) == 1

    world.lone.hooks.meanwhile.append(lambda: world.record.run(world.target, world.ran))
    world.call(9)
    assert world.ran == [9]


def test_nobody_calls_inside_a_spinlock_or_itself() -> None:
    """The target might wait for that lock; and a call to oneself is a plain function call."""
    world = World()
    with (
        Spinlock(world.lone.ram, LOG_GPA, "lock").hold(world.caller),
        pytest.raises(AssertionError, match="while holding lock"),
    ):
        world.call()
    with pytest.raises(AssertionError, match="calls itself"):
        world.record.call(world.target, 1, REMEMBER, 1, lambda: True)


def test_calls_between_processes_run_once_each() -> None:
    """Two callers, one target: every call is answered, none is run twice."""
    crowd = Crowd(3)
    rounds = 200
    done = crowd.ram.u32(LOG_GPA + 64)

    def target(actor: Actor) -> None:
        record = CallRecord(crowd.ram, FREE_GPA, "cpus[0].call")
        while done.load() < 2:
            if not record.run(actor, crowd):
                actor.block(actor.now() + SECOND_NS // 100)

    def caller(actor: Actor) -> None:
        record = CallRecord(crowd.ram, FREE_GPA, "cpus[0].call")
        for _ in range(rounds):
            record.call(actor, 0, ADD, 1, lambda: True, 20 * SECOND_NS)
        done.fetch_add(1)

    crowd.run(target, caller, caller)
    assert crowd.ram.words64(LOG_GPA, 1)[0] == 2 * rounds
    assert crowd.waiters.in_use == 0
