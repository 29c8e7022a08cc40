"""Is a machine settled: will nothing more happen in it unless somebody from outside does something?

It is when everybody is blocked or parked and nothing is under way that would wake anybody by itself. What merely lies
there is not under way: a message that waits while its slot is empty, a flag that nobody takes. With everybody asleep
that is a finding (`tools.invariants_settled`), not a reason to wait.

One look is a list of reasons why not. It is valid if no actor did a step meanwhile, so it is taken between two
looks at the count of all steps: records in the trace rings, and what actors publish before they block. A wait for it
looks again and again, with `sched_yield` in between, until its deadline; then it says who still runs. Whoever is dead
is named at once. Waits of the guest that will end by a deadline of their own are no reason: that is minutes away.

Whether a worker is inside its semaphore it says itself in a machine that runs schedules (`emu.blocked`);
elsewhere one that has announced that it sleeps is taken for asleep, so that a settled machine of that kind is
almost certainly so, and no more. One whose wait is over by machine time is about to run, wherever it sleeps:
an `advance` wakes everybody, but a thread needs a core to notice.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Final

from emu.blocked import Blocked
from emu.control import ActorKind, ActorRow, ActorState, is_asleep, slot_of
from emu.layout import ExitOperation, RunState
from emu.machine import Machine
from emu.orders import OrderDesk, OrderState
from emu.syncpoint import Tickets
from emu.task_board import TaskBoard, TaskState
from emu.tracing import recorded_so_far
from guestproc.kernel.layout import KernelTables
from guestproc.kernel.workqueue import WORKERS
from guestproc.user_threads import SHELLS
from tools.live_view import LiveView
from tools.waits import Wait, over, waits, woken

Parked = Callable[[], Collection[int]]
"""Slots (in the process table) of the actors that stand still because somebody holds them."""

USER: Final = "user"
"""How the threads of the guest's user space are called: `user` takes letters, `user/1` and `user/2` make calls."""


@dataclass(frozen=True, slots=True)
class Settlement:
    """What a look, or the wait for it, came to: `moving` says why not, `dead` who is dead; both empty if settled."""

    moving: tuple[str, ...] = ()
    dead: tuple[str, ...] = ()

    @property
    def settled(self) -> bool:
        """Whether it is."""
        return not (self.moving or self.dead)

    def text(self) -> str:
        """One line."""
        if self.dead:
            return f"dead: {'; '.join(self.dead)}"
        return f"not settled: {'; '.join(self.moving)}" if self.moving else "settled"


def parked_at_points(machine: Machine) -> Parked:
    """Those who wait at a sync point."""
    tickets = Tickets(machine.control)
    return lambda: {slot_of(number) for number in tickets.parked().values()} if machine.races else ()


class SettleTest:
    """The test, for one machine.

    `asleep` says of a process whether the kernel has it asleep. `parked` names the actors that somebody holds; by
    default those who wait at a sync point. One that is held there with interrupts on takes them, and has to come to
    rest again. Of the hypervisor only tasks are ever held: its loop goes on, so it is looked at all the same.
    """

    def __init__(
        self,
        machine: Machine,
        parked: Parked | None = None,
        tables: KernelTables | None = None,
        asleep: Callable[[int], bool] = is_asleep,
    ) -> None:
        self.view: Final = LiveView(machine, tables)
        self._machine: Final = machine
        self._tickets: Final = Tickets(machine.control)
        self._parked: Final = parked or parked_at_points(machine)
        self._tells: Final = machine.races
        self._asleep: Final = asleep
        self._board: Final = TaskBoard(machine.control)
        self._orders: Final = OrderDesk(machine.control)

    # -- asking --------------------------------------------------------------------------------------

    def wait(self, timeout_s: float, pump: Callable[[float], object] | None = None) -> Settlement:
        """Look until it is settled, somebody is dead, or the (real) time has passed.

        `pump(0)` is called after each look, for whoever has to drain a recording or hear of deaths meanwhile.
        """
        end = time.monotonic() + timeout_s
        while True:
            found = self.take()
            if pump is not None:
                pump(0.0)
            if found.settled or found.dead or time.monotonic() >= end:
                return found
            os.sched_yield()

    def take(self) -> Settlement:
        """One look between two counts of steps."""
        before = self.steps()
        dead = tuple(self._dead())
        try:
            moving = tuple(self.moving())
        except (AssertionError, IndexError, ValueError):
            # A record was given back between the look that found it and the one at what is in it: its generation is
            # another one, or what was read is poison, which is no index and no member of an enum.
            moving = ("a record went while it was looked at",)
        if not (dead or moving) and self.steps() != before:
            moving = ("somebody did a step while it was looked at",)
        return Settlement(moving, dead)

    def steps(self) -> tuple[int, ...]:
        """What rises with whatever anybody does: equal twice, and nothing happened in between."""
        trace, control = self._machine.trace, self._machine.control
        records = recorded_so_far(trace) if control.recording else 0
        counted = sum(sum(control.counter_values(row.slot).values()) for row in self.view.actors())
        return records, counted, self.view.mirror.head().sequence

    def moving(self) -> Iterator[str]:
        """Every reason why something will still happen."""
        parked = frozenset(self._parked()) | self._held_still()
        yield from self._host()
        yield from self._held_with_interrupts()
        rows = [row for row in self.view.actors() if row.state == ActorState.ALIVE and row.slot not in parked]
        tables = self.view.tables
        waiting = {} if tables is None else waits(tables)
        about_to_run = set() if tables is None else woken(tables)
        out_of_time = set() if tables is None else over(tables, self._machine.clock.now())
        for row in rows:
            if row.number in about_to_run:
                yield f"{row.name} was woken"
            elif row.number in out_of_time:
                yield f"{row.name} has not noticed yet that its wait is over"
            elif row.kind == ActorKind.VCPU:
                yield from self._processor(row)
            elif row.kind == ActorKind.WORKER:
                yield from self._worker(row, waiting)
        if tables is not None and self._has_workers():
            yield from _not_begun(tables)
        yield from self._exits(parked)
        yield from self._letters(parked, waiting)
        yield from self._tasks(parked)

    # -- one after the other -------------------------------------------------------------------------

    def _dead(self) -> Iterator[str]:
        for row in self.view.actors():
            if row.state == ActorState.DEAD:
                yield f"{row.name} (wait status {row.status})"

    def _held_still(self) -> frozenset[int]:
        """Slots of processors that stand still because a task of theirs is held with interrupts off."""
        held = self._tickets.parked() if self._tells else {}
        still = {slot_of(number) for ticket, number in held.items() if not self._tickets.is_halted(ticket)}
        rows = self.view.actors()
        cpus = {row.cpu for row in rows if row.kind == ActorKind.TASK and row.slot in still}
        return frozenset(row.slot for row in rows if row.kind == ActorKind.VCPU and row.cpu in cpus)

    def _held_with_interrupts(self) -> Iterator[str]:
        """Processors that are held with interrupts on: what is requested they take."""
        held = self._tickets.parked() if self._tells else {}
        halted = {number for ticket, number in held.items() if self._tickets.is_halted(ticket)}
        for row in self.view.actors():
            if row.kind == ActorKind.VCPU and row.number in halted:
                yield from self._processor(row)

    def _host(self) -> Iterator[str]:
        """The loop halted, nothing announced to it, no timer of its due."""
        host = next((row for row in self.view.actors() if row.kind == ActorKind.HYPERVISOR), None)
        if host is None:
            return
        if not self.view.host_halted:
            yield f"{host.name} runs"
        elif self.view.bells():
            yield f"{host.name} was rung for"
        elif self._tells and self._machine.clock.now() >= self._machine.control.host_wakes_ns.load():
            yield f"a timer of {host.name} is due"

    def _processor(self, row: ActorRow) -> Iterator[str]:
        position = self.view.position_of(row.cpu)
        state = self.view.run_state(position)
        if state == RunState.OFFLINE:
            return
        if state != RunState.HALTED:
            name = RunState(state).name if state in set(RunState) else str(state)
            yield f"{row.name} is {name}"
        elif (vector := self.view.deliverable(position)) and self._was_kicked(row, position):
            yield f"{row.name} has vector {vector:#x} to take"

    def _was_kicked(self, row: ActorRow, position: int) -> bool:
        """A token that it has not seen; or it took it and has not come to say that it is awake: it waits for a core."""
        return self._machine.wakeup(f"vp.{position}").tokens > 0 or not self._asleep(row.pid)

    def _worker(self, row: ActorRow, waiting: dict[int, Wait]) -> Iterator[str]:
        # The threads of user space wait for letters, which are looked at apart.
        announced = row.number in waiting or row.name.startswith(USER)
        asleep = self._word(row) != Blocked.RUNS if self._tells else announced
        if not asleep:
            yield f"{row.name} runs{self._work_of(row.number)}"

    def _has_workers(self) -> bool:
        """Whether a process is there whose threads take the work."""
        rows = self._machine.control.rows()
        return any(row.kind == ActorKind.WORKQUEUE and row.state == ActorState.ALIVE for row in rows)

    def _work_of(self, number: int) -> str:
        """What a worker has in hand, for people."""
        texts = [one.text for one in self.view.work() if one.worker == number]
        return f" ({texts[0]})" if texts else ""

    def _exits(self, parked: Collection[int]) -> Iterator[str]:
        for one in self.view.exits():
            if slot_of(one.claimer) in parked:
                continue
            known = one.operation in set(ExitOperation)
            what = ExitOperation(one.operation).name if known else str(one.operation)
            who = self.view.name_of(one.claimer)
            yield f"{who} is in an exit ({what}, slot {one.slot} of VP {self._machine.vp_index(one.position)})"

    def _letters(self, parked: Collection[int], waiting: dict[int, Wait]) -> Iterator[str]:
        """A letter on its way, or one that was taken while a thread that makes calls has none."""
        states = self._orders.states()
        if any(state in (OrderState.FILLING, OrderState.POSTED) for state in states):
            yield "a letter was posted"
        taken = sum(state in (OrderState.TAKEN, OrderState.ABANDONED) for state in states)
        callers = [row for row in self.view.actors() if row.name.startswith(f"{USER}/")]
        idle = sum(self._waits_for_a_call(row, waiting) for row in callers if row.slot not in parked)
        # One that has not enlisted yet will look for a letter first of all.
        coming = max(0, SHELLS - len(callers))
        if idle + coming and taken > len(callers) - idle:
            yield "a letter was taken and nobody works on it yet"

    def _waits_for_a_call(self, row: ActorRow, waiting: dict[int, Wait]) -> bool:
        return self._word(row) == Blocked.IDLE if self._tells else row.number not in waiting

    def _word(self, row: ActorRow) -> int:
        return self._machine.control.blocked_word(row.slot).load()

    def _tasks(self, parked: Collection[int]) -> Iterator[str]:
        """A program that was ordered on a processor that runs none."""
        rows = self._board.rows()
        busy = {row.cpu for row in rows if row.state == TaskState.RUNNING}
        held = {row.cpu for row in self.view.actors() if row.kind == ActorKind.VCPU and row.slot in parked}
        for row in rows:
            if row.state in (TaskState.FILLING, TaskState.ORDERED) and row.cpu not in busy | held:
                yield f"{row.program.name} was ordered on vcpu{row.cpu}"


def _not_begun(tables: KernelTables) -> Iterator[str]:
    """Work that waits for a thread which has not come to its queue yet, on a loaded computer long after the boot."""
    for number, workers in WORKERS.items():
        queue = tables.queues.at(number)
        if queue.head and not all(queue.worker_actors[worker] for worker in range(workers)):
            yield f"work waits on queue {number.name}, and a worker of it has not begun"
