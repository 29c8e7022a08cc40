"""Claims about a processor with several tasks: who runs while another one waits or is held, and who does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest

from emu.memory import GuestMemory
from emu.syncpoint import Point, Tickets, ticket_wakeup
from emu.task_board import Program, TaskBoard, TaskRow, TaskState
from emu.vmexit import ExitClient
from emu.wire.messages import GpadlTeardown, MessageType, OpenChannel
from guestproc.current import Current
from guestproc.kernel.actors import Context
from guestproc.run_queue import MOST_TASKS, Body, GuestTask, RunQueue, SharedVcpu
from guestproc.tasks import CALLERS, PROGRAMS, run_task
from guestproc.vcpu import RESCHEDULE_VECTOR
from guestproc.vcpu_main import _unless_busy
from guestproc.vmbus.connection import vmbus_post_msg
from guestproc.vmbus.ring_buffer import RingCache
from tests.guestproc.world import SECOND_NS, World
from tests.tools.settled_world import publish
from tools.guest_world import DirectExits
from tools.settled import SettleTest

CPU = 1


class SharedWorld(World):
    """A world whose processors have several tasks: programs of `CALLERS`, or whatever function a test orders."""

    VCPU = SharedVcpu

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.functions: list[Callable[[Current], object]] = []
        self.tasks: list[GuestTask] = []
        self.board = TaskBoard(self.machine.control)
        for cpu in self.cpus:
            assert isinstance(cpu, SharedVcpu)
            cpu.run_queue = RunQueue(cpu, TaskBoard(self.machine.control, CALLERS), self._body_of)
        shared = self.cpus[CPU]
        assert isinstance(shared, SharedVcpu) and shared.run_queue is not None
        self.vcpu, self.queue = shared, shared.run_queue
        self.tickets = Tickets(self.machine.control)

    def _body_of(self, task: GuestTask) -> Body:
        task.exits = cast(ExitClient, DirectExits(self, task.position))
        memory = GuestMemory(self.machine.ram.fd, self.machine.ram.memory, self.machine.ram.size)
        own = Current(task, self.tables, self.era, RingCache(memory, lambda: None), memory, self._report)
        self.tasks.append(task)

        def run(row: TaskRow) -> None:
            if row.relid:
                run_task(own, self.cpus[task.cpu], self.board, row)
                return
            self.functions[row.wanted](own)
            self.board.report(row, TaskState.DONE, packets=0, nbytes=0, errors=0)

        return run

    def order(self, function: Callable[[Current], object]) -> int:
        """Order a function as a task of its own on CPU 1; its row."""
        self.functions.append(function)
        return self.order_program(Program.BIND, wanted=len(self.functions) - 1)

    def order_program(self, program: Program, *, relid: int = 0, wanted: int = 0) -> int:
        """Order a program there; its row."""
        index = self.board.order(program, CPU, relid=relid, wanted=wanted)
        self.nudge()
        return index

    def nudge(self) -> None:
        """As the launcher and the director do."""
        self.cpus[0].peers.request(CPU, RESCHEDULE_VECTOR)

    def state(self, index: int) -> TaskState:
        """Of a program."""
        return self.board.row(index).state


@contextmanager
def new_shared_world(**options: Any) -> Iterator[SharedWorld]:
    """Booted."""
    world = SharedWorld(races=True, **options)
    try:
        world.boot()
        yield world
    finally:
        world.close()


@pytest.fixture
def world() -> Iterator[SharedWorld]:
    """As it should be."""
    with new_shared_world() as world:
        yield world


def waits_for(flags: set[str], flag: str, seconds: float = 60.0) -> Callable[[Current], bool]:
    """A function that sleeps in the guest kernel until a flag is up; False: its time was over."""

    def body(current: Current) -> bool:
        wait, timeout_ns = current.connection.state_wait, int(seconds * SECOND_NS)
        return wait.wait_until_timeout(current.actor, lambda: flag in flags, timeout_ns)

    return body


def raises_flag(flags: set[str], flag: str) -> Callable[[Current], None]:
    """A function that puts a flag up and wakes who waits."""

    def body(current: Current) -> None:
        flags.add(flag)
        current.connection.state_wait.wake_all(current.actor)

    return body


def posts(message: OpenChannel | GpadlTeardown) -> Callable[[Current], int]:
    """A function that posts a message and does not wait for an answer."""
    return lambda current: vmbus_post_msg(current, message)


# -- turns ------------------------------------------------------------------------------------------------


def test_another_task_runs_while_one_sleeps(world: SharedWorld) -> None:
    """And wakes it: two tasks of a processor, of which the second ends before the first."""
    flags: set[str] = set()
    first = world.order(waits_for(flags, "up"))
    world.settle()
    assert world.state(first) is TaskState.RUNNING and world.queue.busy
    second = world.order(raises_flag(flags, "up"))
    world.settle()

    assert (world.state(first), world.state(second)) == (TaskState.DONE, TaskState.DONE)
    assert [task.row.name for task in world.tasks] == ["vcpu1/1", "vcpu1/2"] and not world.queue.busy


def test_tasks_and_the_program_on_the_processors_own_stack_wake_each_other(world: SharedWorld) -> None:
    """Neither sleeps through what the other did, although one interrupt is there for both."""
    flags: set[str] = set()

    def own(current: Current) -> bool:
        raises_flag(flags, "begun")(current)
        return waits_for(flags, "up")(current)

    def task(current: Current) -> None:
        waits_for(flags, "begun")(current)
        raises_flag(flags, "up")(current)

    ordered = world.order(task)
    world.settle()
    program = world.start(own, cpu=CPU)
    world.settle()

    assert program.ended() and program.result
    assert world.state(ordered) is TaskState.DONE


def test_a_tasklet_on_a_tasks_stack_wakes_the_processors_own_program(world: SharedWorld) -> None:
    """It is that processor which wakes itself, and all the same its program is asleep meanwhile."""
    flags: set[str] = set()
    program = world.start(waits_for(flags, "up"), cpu=CPU)
    world.settle()
    world.order(lambda _task: raises_flag(flags, "up")(world.currents[CPU]))
    world.settle()

    assert program.ended() and program.result


def test_a_task_is_woken_from_its_processor_and_from_another(world: SharedWorld) -> None:
    """By the reschedule interrupt, like a processor."""
    flags: set[str] = set()
    for waker in ({"cpu": 0}, {"cpu": CPU}):
        ordered = world.order(waits_for(flags, f"up {waker}"))
        world.settle()
        world.start(raises_flag(flags, f"up {waker}"), **waker)
        world.settle()
        assert world.state(ordered) is TaskState.DONE


def test_a_tasks_time_out_ends_its_sleep(world: SharedWorld) -> None:
    """Nobody interrupts its processor: the halt is no longer than the first task's sleep."""
    results: list[bool] = []
    for seconds in (5.0, 2.0):
        wait = waits_for(set(), "never", seconds)
        world.order(lambda current, wait=wait: results.append(wait(current)))  # type: ignore[misc]
    world.settle()
    world.pass_time(3.0)
    assert results == [False] and world.queue.busy
    world.pass_time(3.0)

    assert results == [False, False] and not world.queue.busy


def test_more_tasks_than_there_may_be_wait_on_the_board(world: SharedWorld) -> None:
    """The next one is begun as soon as one has ended, on its stack."""
    flags: set[str] = set()
    rows = [world.order(waits_for(flags, f"up {number}")) for number in range(MOST_TASKS + 1)]
    world.settle()
    states = [world.state(row) for row in rows]
    world.start(raises_flag(flags, "up 2"), cpu=CPU)
    world.settle()

    assert states == [TaskState.RUNNING] * MOST_TASKS + [TaskState.ORDERED]
    assert [world.state(rows[2]), world.state(rows[-1])] == [TaskState.DONE, TaskState.RUNNING]
    assert len(world.tasks) == MOST_TASKS


def test_what_a_task_raises_ends_its_processor(world: SharedWorld) -> None:
    """With its own lines in the traceback."""

    def fails(_current: Current) -> None:
        raise ZeroDivisionError("this one")

    world.order(fails)

    with pytest.raises(AssertionError, match=r"(?s)^vcpu1 died.*in fails.*this one"):
        world.settle()


def test_a_processor_with_a_task_does_not_go_offline(world: SharedWorld) -> None:
    """Not even when nothing runs on its own stack."""
    flags: set[str] = set()
    asked: list[int] = []
    go_offline = _unless_busy(world.queue)
    world.order(waits_for(flags, "up"))
    world.settle()

    assert go_offline(world.currents[CPU], lambda _start: asked.append(1)) is False
    world.start(raises_flag(flags, "up"), cpu=0)
    world.settle()
    assert not world.queue.busy


# -- at a sync point: races.md B4 -------------------------------------------------------------------------

OPEN_7 = OpenChannel(7, 7, 1, 0, 1, bytes(120))
TEARDOWN_5 = GpadlTeardown(5, 1)


@pytest.mark.parametrize("atomic", [False, True], ids=["off", "on"])
def test_a_post_is_pre_empted_between_fill_and_call_only_without_the_fix(atomic: bool) -> None:
    """Without it another task of the processor fills the page, and its message goes out twice."""
    with new_shared_world(switches={} if atomic else {"post_atomic": False}) as world:
        world.host.answer.update(dict.fromkeys((MessageType.OPENCHANNEL, MessageType.GPADL_TEARDOWN), lambda _: []))
        before = len(world.host.posted)
        ticket = world.tickets.arm(Point.POST_AFTER_FILL, cpu=CPU)
        first = world.order(posts(OPEN_7))
        world.settle()
        assert world.tickets.arrived(ticket)[0] == world.tasks[0].row.number
        second = world.order(posts(TEARDOWN_5))
        world.settle()

        assert world.tickets.is_halted(ticket) is not atomic
        assert world.state(second) is (TaskState.ORDERED if atomic else TaskState.DONE)
        publish(world)
        assert SettleTest(world.machine, tables=world.tables).take().settled, "a processor that stands still, too"

        world.tickets.go(ticket)
        world.nudge()
        world.machine.wakeup(ticket_wakeup(ticket)).post()
        world.settle()
        assert (world.state(first), world.state(second)) == (TaskState.DONE, TaskState.DONE)
        sent = [type(message) for message in world.host.posted[before:]]
        assert sent == ([OpenChannel, GpadlTeardown] if atomic else [GpadlTeardown, GpadlTeardown])


def test_tasks_go_on_while_the_processors_own_program_is_held(world: SharedWorld) -> None:
    """A task that is pre-empted there is one of several, whoever's stack it has."""

    def held(current: Current) -> None:
        current.reach(Point.RING_STATS, 3)

    ticket = world.tickets.arm(Point.RING_STATS)
    program = world.start(held, cpu=CPU)
    world.settle()
    ordered = world.order(lambda current: None)
    world.settle()
    assert world.state(ordered) is TaskState.DONE and not program.ended()
    world.tickets.go(ticket)
    world.nudge()
    world.settle()

    assert program.ended()


@pytest.mark.parametrize("left", [False, True])
def test_tasklets_that_come_back_go_on_behind_who_else_wants_the_core(
    world: SharedWorld, monkeypatch: pytest.MonkeyPatch, left: bool
) -> None:
    """As ksoftirqd does; a core is given away only where something is left to run."""
    given_away: list[bool] = []
    monkeypatch.setattr(world.vcpu, "softirqs", lambda: left)
    monkeypatch.setattr(world.vcpu, "yield_processor", lambda: given_away.append(world.vcpu._softirq))

    world.vcpu.run_softirqs()

    assert given_away == [False] * left


def test_a_tasklet_that_is_held_keeps_the_processor(world: SharedWorld) -> None:
    """It runs on the stack of whoever was interrupted, and no task is switched beneath it."""
    seen: list[Context] = []

    def held(current: Current) -> None:
        world.vcpu._softirq = True
        seen.append(current.actor.context())
        world.currents[CPU].reach(Point.RING_STATS)
        world.vcpu._softirq = False

    ticket = world.tickets.arm(Point.RING_STATS)
    first = world.order(held)
    world.settle()
    second = world.order(lambda current: None)
    world.settle()
    assert seen == [Context.SOFTIRQ]
    assert (world.state(first), world.state(second)) == (TaskState.RUNNING, TaskState.ORDERED)
    world.tickets.go(ticket)
    world.nudge()
    world.settle()

    assert (world.state(first), world.state(second)) == (TaskState.DONE, TaskState.DONE)


# -- BIND and UNBIND --------------------------------------------------------------------------------------


def test_bind_and_unbind_open_and_close_a_channel(world: SharedWorld) -> None:
    """A shell on that processor: the driver's remove, then the probe of the driver that fits; each a task."""
    world.host.device(9)
    world.settle()
    rows = []
    for program in (Program.UNBIND, Program.BIND):
        rows.append(world.order_program(program, relid=9))
        world.settle()

    assert [world.state(row) for row in rows] == [TaskState.DONE, TaskState.DONE]
    assert world.host.channels[9].opens == 2
    names = [event.name for event in world.events if event.actor == "vcpu1" and event.name in ("task_run", "task_done")]
    assert names == ["task_run", "task_done"] * 2
    assert {Program.BIND, Program.UNBIND} <= PROGRAMS.keys() & CALLERS


def test_a_call_that_fails_is_told(world: SharedWorld) -> None:
    """The program failed, and the log says why."""
    row = world.order_program(Program.UNBIND, relid=9)
    world.settle()

    assert world.state(row) is TaskState.FAILED
    assert any("unbind of relid 9: -ENODEV" in line for line in world.log)
