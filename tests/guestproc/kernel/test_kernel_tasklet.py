"""Tasklets: once each, never while disabled, and a schedule is never forgotten."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from emu.errors import DeadlinePassed
from guestproc.kernel.actors import Actor, Context
from guestproc.kernel.functions import TASKLET_FUNCTIONS
from guestproc.kernel.tasklet import (
    PASSES,
    Tasklet,
    TaskletQueue,
    tasklet_disable,
    tasklet_disable_nosync,
    tasklet_enable,
    tasklet_kill,
)
from guestproc.kernel.wait import WaitQueue
from tests.guestproc.kernel.fakes import FREE_GPA, SECOND_NS, Crowd, Lone, ProcessHooks

IDLE_GPA = FREE_GPA + 256
CALL_OWNER = 901
COUNT_RUNS = 902


@TASKLET_FUNCTIONS.register(CALL_OWNER, "test: call the owner")
def call_owner(owner: Callable[[int], None], argument: int) -> None:
    """The owner of these queues is what the test wants to happen."""
    owner(argument)


class World:
    """Processors 0 and 1, in one process, and one tasklet."""

    def __init__(self) -> None:
        self.lone = Lone()
        self.idle = WaitQueue(self.lone.ram, IDLE_GPA, "tasklets")
        self.ran: list[int] = []
        self.inside: Callable[[], object] = lambda: None
        self.cpus = [self.lone.new_actor(10 + cpu, is_vcpu=True, cpu=cpu) for cpu in range(2)]
        self.queues = [TaskletQueue(actor, self.idle, self.run_one) for actor in self.cpus]
        self.worker = self.lone.actor
        self.tasklet = self.new_tasklet(0)

    def new_tasklet(self, number: int) -> Tasklet:
        tasklet = Tasklet(self.lone.ram, FREE_GPA + 16 * number, f"tasklet {number}")
        tasklet.init(CALL_OWNER, number)
        return tasklet

    def run_one(self, argument: int) -> None:
        self.ran.append(argument)
        self.inside()


def test_a_tasklet_scheduled_twice_runs_once() -> None:
    """The second schedule finds it pending, also from another processor."""
    world = World()

    assert world.queues[0].schedule(world.tasklet)
    assert not world.queues[0].schedule(world.tasklet)
    assert not world.queues[1].schedule(world.tasklet)

    assert not world.queues[0].run()
    assert world.ran == [0]
    assert not world.queues[1].pending() and not world.queues[0].pending()


def test_tasklets_run_in_the_order_of_scheduling() -> None:
    """And each with its own argument."""
    world = World()
    for number in (2, 0, 1):
        world.queues[0].schedule(world.new_tasklet(number))

    world.queues[0].run()

    assert world.ran == [2, 0, 1]


def test_a_schedule_during_the_run_runs_it_again() -> None:
    """SCHED is cleared before the function starts: news that comes meanwhile is not lost."""
    world = World()
    world.queues[0].schedule(world.tasklet)

    def news() -> None:
        world.inside = lambda: None
        assert world.tasklet.running
        assert world.queues[0].schedule(world.tasklet)
        assert not world.queues[0].run(), "an ISR on top of a tasklet only schedules"

    world.inside = news
    world.queues[0].run()

    assert world.ran == [0, 0]


def test_a_tasklet_that_always_schedules_itself_does_not_keep_the_processor() -> None:
    """After a bounded number of passes `run` returns and says that there is more."""
    world = World()
    world.inside = lambda: world.queues[0].schedule(world.tasklet)
    world.queues[0].schedule(world.tasklet)

    assert world.queues[0].run()

    assert len(world.ran) == PASSES
    assert world.queues[0].runnable()


def test_a_disabled_tasklet_stays_pending_and_runs_after_enable() -> None:
    """Enabling it kicks the processor on whose list it is, which may have halted meanwhile."""
    world = World()
    tasklet_disable(world.worker, world.tasklet, world.idle)
    world.queues[1].schedule(world.tasklet)

    assert not world.queues[1].run()
    assert (world.ran, world.queues[1].pending(), world.queues[1].runnable()) == ([], 1, False)

    tasklet_enable(world.worker, world.tasklet)
    assert world.lone.hooks.kicked == [1]
    assert world.queues[1].runnable()
    world.queues[1].run()
    assert world.ran == [0]


def test_disables_are_counted() -> None:
    """Only the last enable lets it run, and an enable too many is our bug."""
    world = World()
    tasklet_disable(world.worker, world.tasklet, world.idle)
    tasklet_disable_nosync(world.tasklet)
    world.queues[0].schedule(world.tasklet)

    tasklet_enable(world.worker, world.tasklet)
    assert (world.tasklet.disable_count, world.lone.hooks.kicked) == (1, [])
    world.queues[0].run()
    assert world.ran == []

    tasklet_enable(world.worker, world.tasklet)
    assert world.lone.hooks.kicked == [0]
    with pytest.raises(AssertionError, match="enabled more often"):
        tasklet_enable(world.worker, world.tasklet)


def test_enabling_an_idle_tasklet_kicks_nobody() -> None:
    """There is nothing to look at."""
    world = World()
    tasklet_disable(world.worker, world.tasklet, world.idle)

    tasklet_enable(world.worker, world.tasklet)

    assert world.lone.hooks.kicked == []


def test_disable_waits_for_a_running_function() -> None:
    """The function's end wakes who sleeps in `tasklet_disable`; no second run starts behind it."""
    world = World()
    world.queues[0].schedule(world.tasklet)
    after: list[bool] = []

    def disable_from_elsewhere() -> None:
        # The worker sleeps in its wait; what happens meanwhile is the end of this very function, which a
        # single process cannot show: so the wait runs into its deadline, and the tasklet into WAITED.
        with pytest.raises(DeadlinePassed, match="tasklet 0 to be idle"):
            tasklet_disable(world.worker, world.tasklet, world.idle, SECOND_NS)
        after.append(world.tasklet.running)
        world.queues[0].schedule(world.tasklet)

    world.inside = disable_from_elsewhere
    world.queues[0].run()

    assert (after, world.ran, world.tasklet.running) == ([True], [0], False)
    tasklet_disable(world.worker, world.tasklet, world.idle)


def test_a_tasklet_never_runs_on_two_processors_at_once() -> None:
    """Scheduled elsewhere while it runs it stays pending there; the end of the run kicks that processor."""
    world = World()
    world.queues[0].schedule(world.tasklet)

    def scheduled_elsewhere() -> None:
        world.inside = lambda: None
        assert world.queues[1].schedule(world.tasklet)
        assert not world.queues[1].run()
        assert not world.queues[1].runnable()

    world.inside = scheduled_elsewhere
    world.queues[0].run()

    assert (world.ran, world.lone.hooks.kicked) == ([0], [1])
    world.queues[1].run()
    assert world.ran == [0, 0]


def test_kill_waits_until_it_is_neither_pending_nor_running() -> None:
    """The processor runs it to its end first; its record may be freed then."""
    world = World()
    world.queues[0].schedule(world.tasklet)
    world.lone.hooks.meanwhile.append(lambda: world.queues[0].run())

    tasklet_kill(world.worker, world.tasklet, world.idle)

    assert world.ran == [0]
    assert world.lone.hooks.woken == [world.worker.number]
    assert world.lone.waiters.in_use == 0


def test_killing_a_tasklet_that_stays_disabled_is_reported() -> None:
    """It would never run: the wait ends at its deadline, by name."""
    world = World()
    tasklet_disable(world.worker, world.tasklet, world.idle)
    world.queues[0].schedule(world.tasklet)

    with pytest.raises(DeadlinePassed, match="tasklet 0"):
        tasklet_kill(world.worker, world.tasklet, world.idle, SECOND_NS)


@pytest.mark.parametrize("call", [tasklet_disable, tasklet_kill])
def test_nobody_waits_for_a_tasklet_in_an_interrupt(call: Callable[..., None]) -> None:
    """It might be the one that was interrupted."""
    world = World()
    world.lone.hooks.where = Context.HARDIRQ

    with pytest.raises(AssertionError, match="waits for tasklet 0 in HARDIRQ"):
        call(world.worker, world.tasklet, world.idle)


@TASKLET_FUNCTIONS.register(COUNT_RUNS, "test: count runs")
def count_runs(owner: tuple[Crowd, Actor], argument: int) -> None:
    """Adds one to a plain word while it marks itself as inside; two at once would be seen."""
    crowd, actor = owner
    inside = crowd.ram.u32(argument)
    assert inside.exchange(actor.number) == 0, "the tasklet runs twice at once"
    assert crowd.ram.u32(argument + 4).load() == 0, "it runs while disabled"
    crowd.ram.words64(argument + 8, 1)[0] += 1
    assert inside.exchange(0) == actor.number


def disable_and_run(rounds: int) -> None:
    """Two processors schedule and run one tasklet, a worker disables and enables it all the time."""
    crowd = Crowd(3)
    state = FREE_GPA + 512
    tasklet = Tasklet(crowd.ram, FREE_GPA, "tasklet")
    tasklet.init(COUNT_RUNS, state)
    idle = WaitQueue(crowd.ram, IDLE_GPA, "tasklets")
    disabled, stop, runs = (
        crowd.ram.u32(state + 4),
        crowd.ram.u32(state + 16),
        crowd.ram.words64(state + 8, 1),
    )

    def processor(actor: Actor) -> None:
        vcpu = crowd.actor(actor.cpu, is_vcpu=True)
        queue = TaskletQueue(vcpu, idle, (crowd, vcpu))
        hooks = vcpu.hooks
        assert isinstance(hooks, ProcessHooks)
        hooks.tasklets = queue
        while not stop.load():
            queue.schedule(tasklet)
            if not queue.run():
                vcpu.yield_processor()
        # Whatever is pending when the last enable comes still runs: halted, woken by the kick alone.
        while queue.pending():
            assert vcpu.block(vcpu.now() + 20 * SECOND_NS)

    def worker(actor: Actor) -> None:
        for _ in range(rounds):
            tasklet_disable(actor, tasklet, idle, 20 * SECOND_NS)
            disabled.store(1)
            seen = runs[0]
            actor.yield_processor()
            assert runs[0] == seen
            disabled.store(0)
            tasklet_enable(actor, tasklet)
        # On busy cores a processor may not have met it enabled even once; `run` below has a deadline for all.
        while not runs[0]:
            actor.yield_processor()
        tasklet_disable(actor, tasklet, idle)
        stop.store(1)
        for _ in range(100):
            actor.yield_processor()
        tasklet_enable(actor, tasklet)
        tasklet_kill(actor, tasklet, idle, 20 * SECOND_NS)
        assert not tasklet.scheduled

    crowd.run(processor, processor, worker)
    assert runs[0] > 0
    assert crowd.waiters.in_use == 0


def test_a_tasklet_is_one_at_a_time_across_processes() -> None:
    """Never twice at once, never while disabled, and never forgotten while it is pending."""
    disable_and_run(300)


@pytest.mark.soak
def test_a_tasklet_is_one_at_a_time_across_processes_for_long() -> None:
    """The same, long enough for the rare orders."""
    disable_and_run(20_000)
