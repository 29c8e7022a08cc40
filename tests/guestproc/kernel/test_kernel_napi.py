"""NAPI: one owner at a time, no packet left lying, a full budget comes again, and disabling waits for the owner."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from emu.errors import DeadlinePassed
from guestproc.kernel.actors import Context
from guestproc.kernel.functions import TASKLET_FUNCTIONS
from guestproc.kernel.napi import (
    DISABLE,
    MISSED,
    SCHED,
    Napi,
    napi_complete_done,
    napi_disable,
    napi_enable,
    napi_poll,
    napi_schedule,
    napi_schedule_prep,
    netif_napi_add,
    netif_napi_del,
)
from guestproc.kernel.napi import __napi_schedule as schedule_owned
from guestproc.kernel.records import Ram
from guestproc.kernel.tasklet import TaskletQueue
from guestproc.kernel.wait import WaitQueue
from tests.guestproc.kernel.fakes import FREE_GPA, SECOND_NS, Lone
from tests.interleaving import Actor as Steps
from tests.interleaving import Turns, explore, stepped_view

NAPI_GPA = FREE_GPA
IDLE_GPA = FREE_GPA + 64
RING_GPA = FREE_GPA + 128
CALL_POLL = 903
BUDGET = 4


@TASKLET_FUNCTIONS.register(CALL_POLL, "test: call the poll")
def call_poll(owner: Callable[[], None], _argument: int) -> None:
    """The owner of these queues polls."""
    owner()


class Net:
    """Two processors and a ring that is two words: packets that are there, and the mask."""

    def __init__(self, ram: Ram | None = None) -> None:
        self.lone = Lone()
        self.ram = ram or self.lone.ram
        self.idle = WaitQueue(self.lone.ram, IDLE_GPA, "idle")
        self.napi = Napi(self.ram, NAPI_GPA, "napi")
        self.there = self.ram.u32(RING_GPA)
        self.mask = self.ram.u32(RING_GPA + 4)
        self.taken = 0
        self.second_look = True
        self.polls: list[int] = []
        self.masked_at_polls: list[int] = []
        self.meanwhile: Callable[[], object] = lambda: None
        """What happens between the last look at the ring and the completion."""
        cpus = [self.lone.new_actor(10 + cpu, is_vcpu=True, cpu=cpu) for cpu in range(2)]
        self.cpus = cpus
        self.queues = [TaskletQueue(cpus[0], self.idle, lambda: self.poll(0)), TaskletQueue(cpus[1], self.idle)]
        self.queues[1] = TaskletQueue(cpus[1], self.idle, lambda: self.poll(1))
        netif_napi_add(self.napi, CALL_POLL, 0)

    def poll(self, cpu: int) -> None:
        napi_poll(
            self.cpus[cpu], self.queues[cpu], self.napi, lambda budget: self.drain(cpu, budget), self.idle, BUDGET
        )

    def drain(self, cpu: int, budget: int) -> int:
        """What a driver's poll does."""
        self.masked_at_polls.append(self.mask.load())
        work = 0
        while work < budget and self.there.load():
            self.there.fetch_sub(1)
            work += 1
        self.taken += work
        self.polls.append(work)
        if work == budget:
            return work
        self.meanwhile()
        if napi_complete_done(self.cpus[cpu], self.queues[cpu], self.napi, self.idle):
            self.mask.exchange(0)
            if self.second_look and self.there.load() and napi_schedule_prep(self.napi):
                self.mask.exchange(1)
                schedule_owned(self.queues[cpu], self.napi)
        return work

    def arrive(self, count: int = 1, cpu: int = 0) -> bool:
        """Packets, and the interrupt if the ring asks for one; whether there was one."""
        self.there.fetch_add(count)
        if self.mask.load():
            return False
        if napi_schedule_prep(self.napi):
            self.mask.exchange(1)
            schedule_owned(self.queues[cpu], self.napi)
        return True

    def settle(self) -> None:
        """Both processors run what is pending."""
        while any(queue.runnable() for queue in self.queues):
            for queue in self.queues:
                queue.run()


@pytest.fixture
def net() -> Net:
    """Enabled."""
    net = Net()
    napi_enable(net.napi)
    return net


def test_an_interrupt_schedules_one_poll(net: Net) -> None:
    """The ring is masked until the poll has emptied it; then an interrupt comes again."""
    assert net.arrive(3)
    assert not net.arrive()
    assert (net.polls, net.mask.load()) == ([], 1)

    net.settle()

    assert (net.polls, net.mask.load(), net.napi.scheduled) == ([4, 0], 0, False)
    assert net.arrive()


def test_a_full_budget_comes_again_masked(net: Net) -> None:
    """Ten packets with a budget of four: three polls, the ring unmasked only after the last."""
    net.arrive(10)
    net.settle()

    assert net.polls == [4, 4, 2]
    assert net.masked_at_polls == [1, 1, 1]
    assert net.mask.load() == 0


def test_bytes_before_the_unmask_bring_another_poll(net: Net) -> None:
    """They come after the last look and find the ring masked: no interrupt, and nothing is lost."""

    def late() -> None:
        net.meanwhile = lambda: None
        assert not net.arrive()

    net.meanwhile = late
    net.arrive()
    net.settle()

    assert net.polls == [1, 1]
    assert (net.there.load(), net.mask.load(), net.taken) == (0, 0, 2)


def test_a_missed_interrupt_polls_once_more(net: Net) -> None:
    """Who schedules what is owned leaves a mark; completing then is not allowed."""

    def missed() -> None:
        net.meanwhile = lambda: None
        assert not napi_schedule_prep(net.napi)
        assert net.napi.word.load() == SCHED | MISSED

    net.meanwhile = missed
    net.arrive()
    net.settle()

    assert net.polls == [1, 0]
    assert net.napi.word.load() == 0


def test_both_halves_of_a_schedule_in_one(net: Net) -> None:
    """For drivers with nothing to mask."""
    assert napi_schedule(net.queues[0], net.napi)
    assert not napi_schedule(net.queues[1], net.napi)

    net.settle()

    assert net.polls == [0, 0]


def test_a_disabled_one_is_not_scheduled() -> None:
    """Neither before it was enabled nor after it was disabled; what came meanwhile is forgotten by an enable."""
    net = Net()
    assert not napi_schedule_prep(net.napi)
    napi_enable(net.napi)
    assert net.napi.word.load() == 0
    napi_disable(net.lone.actor, net.napi, net.idle)

    assert not napi_schedule_prep(net.napi)
    napi_enable(net.napi)
    assert napi_schedule_prep(net.napi)


def test_disable_waits_for_a_poll_that_is_due(net: Net) -> None:
    """It completes, wakes who waits, and its record may go."""
    net.arrive(2)
    net.lone.hooks.meanwhile.append(net.settle)

    napi_disable(net.lone.actor, net.napi, net.idle)
    netif_napi_del(net.lone.actor, net.napi, net.idle)

    assert (net.taken, net.napi.word.load()) == (2, SCHED)
    assert net.lone.hooks.woken == [net.lone.actor.number]
    assert net.lone.waiters.in_use == 0


def test_disable_ends_a_poll_that_always_finds_its_budget_full(net: Net) -> None:
    """A flood does not keep it: the poll that was going to come again completes instead."""
    net.arrive(1000)
    net.lone.hooks.meanwhile.append(lambda: net.queues[0].run())

    napi_disable(net.lone.actor, net.napi, net.idle)

    assert net.polls == [4] and net.there.load() == 996
    assert not net.arrive()


def test_disabling_what_never_completes_is_reported(net: Net) -> None:
    """By name, at the deadline."""
    net.arrive()

    with pytest.raises(DeadlinePassed, match="napi to be idle"):
        napi_disable(net.lone.actor, net.napi, net.idle, SECOND_NS)
    assert net.napi.word.load() & DISABLE


def test_nobody_waits_for_a_poll_in_an_interrupt(net: Net) -> None:
    """It might be the one that was interrupted."""
    net.lone.hooks.where = Context.SOFTIRQ

    with pytest.raises(AssertionError, match="napi"):
        napi_disable(net.lone.actor, net.napi, net.idle)


def test_whoever_does_not_own_it_may_not_finish_it(net: Net) -> None:
    """Scheduling, completing and enabling by nobody are our bugs."""
    for wrong in (
        lambda: schedule_owned(net.queues[0], net.napi),
        lambda: napi_complete_done(net.cpus[0], net.queues[0], net.napi, net.idle),
        lambda: napi_enable(net.napi),
        lambda: net.poll(0),
    ):
        with pytest.raises(AssertionError, match="napi"):
            wrong()


def test_a_poll_may_not_exceed_its_budget(net: Net) -> None:
    """That is the driver's bug."""
    napi_schedule_prep(net.napi)

    with pytest.raises(AssertionError, match="did 65 of 64"):
        napi_poll(net.cpus[0], net.queues[0], net.napi, lambda budget: budget + 1, net.idle)


def orders(*, second_look: bool) -> int:
    """A host that writes, and whose interrupts another processor takes, beside a poll that ends: in every order."""

    def scenario(turns: Turns) -> tuple[list[Steps], Callable[[], None]]:
        buffer = bytearray(1 << 18)
        net = Net(Ram(buffer, stepped_view(turns, buffer)))
        net.second_look = second_look
        napi_enable(net.napi)
        net.arrive()

        def host() -> None:
            net.arrive(cpu=1)
            net.arrive(cpu=1)

        def processor() -> None:
            net.queues[0].run()

        def check() -> None:
            net.settle()
            assert (net.there.load(), net.taken) == (0, 3), "a packet is left lying"
            assert (net.mask.load(), net.napi.word.load()) == (0, 0)

        return [processor, host], check

    return explore(scenario, preemptions=3)


def test_no_order_of_steps_leaves_a_packet_lying() -> None:
    """Whatever comes between the last look, the completion and the unmask is taken by somebody's poll."""
    assert orders(second_look=True) > 500


def test_without_the_second_look_one_is_left_lying() -> None:
    """Some order then ends with a packet in the ring and no interrupt for it."""
    with pytest.raises(AssertionError, match="left lying"):
        orders(second_look=False)
