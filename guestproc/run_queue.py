"""A processor with several guest tasks: each has a stack and an actor of its own, and runs while the others wait.

Only machines that run schedules have this: `SharedVcpu` is chosen when a processor attaches. Elsewhere a processor runs
one program after the other, on its own stack. Tasks take turns in two places: where one sleeps in the guest kernel, and
where one is held at a sync point with its interrupts on, as a task that was pre-empted there would be. A task in an
interrupt, a tasklet or a section with interrupts off keeps the processor, and so does one that is held in it.

    the processor's own stack   interrupts, programs that read channels; where it would halt it gives turns
    a task's stack              begun by its own stack, and back to it at each pause (`GuestTask.pause`)

Stacks are greenlets, so one runs at a time and nothing is switched between two bytecodes. A turn is given for any
reason at all (an interrupt came, somebody was woken, a time is over): who waits looks again, as behind every sleep.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from emu.control import ActorKind
from emu.machine import Machine
from emu.task_board import TaskBoard, TaskRow
from emu.tracing import Context as TraceContext
from guestproc.kernel.actors import Context
from guestproc.vcpu import Report, Vcpu, exit_client, exit_of, raise_if_stopping

if TYPE_CHECKING:
    from greenlet import greenlet

MOST_TASKS: Final = 4
"""Of a processor, at once; a program that is ordered beyond that waits on the board."""
NEVER: Final = 1 << 63

Body = Callable[[TaskRow], None]
"""What a task does for a row of the board."""


class SharedVcpu(Vcpu):
    """A processor that lets its other tasks run where it would halt."""

    def __init__(self, machine: Machine, cpu: int, report: Report) -> None:
        super().__init__(machine, cpu, report)
        self.run_queue: RunQueue | None = None
        """Its tasks, once it serves."""
        # How many things came that somebody may wait for, and how many of them every task has had a look at.
        self._changes = 0
        self._looked_at = 0

    def _dispatch(self, vector: int) -> None:
        self._changes += 1
        super()._dispatch(vector)

    def wake(self, actor: int) -> None:
        """Wake another actor; or its own, which may be asleep while the processor runs a task."""
        if actor == self.row.number:
            self._changes += 1
        super().wake(actor)

    def idle(self, timeout_ns: int) -> None:
        """Halt, unless another task has something to look at: then that comes first, and the caller looks again."""
        if self.others_wait():
            self.let_others_run()
            return
        super().idle(timeout_ns if self.run_queue is None else min(timeout_ns, self.run_queue.left_ns()))

    def others_wait(self) -> bool:
        """Whether a task may have something to do, here where tasks may be switched."""
        queue = self.run_queue
        if queue is None or self.context() is not Context.TASK:
            return False
        return self._changes != self._looked_at or queue.left_ns() <= 0

    def let_others_run(self) -> None:
        """Give each task a turn. What comes meanwhile is a reason for another one: it may be for who ran first."""
        if self.run_queue is not None and self.others_wait():
            assert not self.irqs_disabled(), "tasks are switched with interrupts on"
            self._looked_at = self._changes
            self.run_queue.turn()

    def retire(self) -> None:
        """Before the process ends: its tasks end where they are."""
        if self.run_queue is not None:
            self.run_queue.retire()
        super().retire()


class GuestTask:
    """`ActorHooks` of one task: it pauses where a processor with a single one would halt."""

    is_vcpu: Final = True

    def __init__(self, vcpu: SharedVcpu, name: str) -> None:
        machine = vcpu.machine
        self.machine: Final = machine
        self.cpu: Final = vcpu.cpu
        self.position: Final = vcpu.position
        self.vp_index: Final = vcpu.vp_index
        self.row, self.counters = machine.enlist(ActorKind.TASK, name, cpu=vcpu.cpu)
        self.trace: Final = machine.recorder(self.row, vp=self.vp_index, context=TraceContext.TASK)
        if self.trace:
            self.trace.start(self.row.pid, self.row.kind, self.row.cpu, self.row.name)
        self._vcpu: Final = vcpu
        self._stack: greenlet | None = None
        self.until_ns = NEVER
        """Machine time at which its pause ends by itself."""
        self.exits = exit_client(machine, vcpu.position, self.row.number, vcpu.stopping)
        self.now: Final = vcpu.now
        self.yield_processor: Final = vcpu.yield_processor
        self.is_dead: Final = vcpu.is_dead
        self.stopping: Final = vcpu.stopping
        self.irq_save: Final = vcpu.irq_save
        self.irq_restore: Final = vcpu.irq_restore
        self.irqs_disabled: Final = vcpu.irqs_disabled
        self.context: Final = vcpu.context
        self.kick_cpu: Final = vcpu.kick_cpu
        self.send_ipi: Final = vcpu.send_ipi

    # -- its turns -----------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether it has something to run, or in the middle of it."""
        return self._stack is not None

    def begin(self, body: Callable[[], None]) -> None:
        """Run something on a stack of its own, up to its first pause."""
        # Here and not above: no process but a processor with several tasks loads it.
        from greenlet import greenlet

        assert self._stack is None, f"{self.row.name} runs something"
        self._stack = greenlet(body)
        self.go_on()

    def go_on(self) -> None:
        """A turn, on the stack of who gives it: until the next pause, or the end. What is raised comes out here."""
        assert self._stack is not None, f"{self.row.name} runs nothing"
        self.until_ns = NEVER
        self._stack.switch()
        if self._stack.dead:
            self._stack = None

    def pause(self, until_ns: int) -> None:
        """Let the processor do something else; returns at the next turn, for whatever reason."""
        assert self._stack is not None and self._stack.parent is not None
        assert self.context() is Context.TASK and not self.irqs_disabled(), "a task is switched only where it may be"
        self.until_ns = until_ns
        self.counters.flush()
        self._stack.parent.switch()

    # -- what is not the processor's (ActorHooks) ------------------------------------------------------

    def block(self, deadline_ns: int) -> bool:
        """Sleep: the processor runs another task, or halts. May return True for no reason."""
        if deadline_ns <= self.now():
            return False
        self.counters.blocks += 1
        self.pause(deadline_ns)
        return True

    def wait_interruptible(self, over: Callable[[], bool]) -> None:
        """Stand here until `over`, at a sync point with interrupts on: others run meanwhile. MachineStopping."""
        while not over():
            raise_if_stopping(self)
            self.pause(NEVER)

    def wake(self, actor: int) -> None:
        """Wake another actor; one of this processor by an interrupt, too."""
        if actor != self.row.number:
            self._vcpu.peers.wake(actor)

    def exit(self, operation: int, a0: int = 0, a1: int = 0, a2: int = 0) -> tuple[int, int]:
        """A VM exit of this task's: one instruction to the guest, so with interrupts off."""
        return exit_of(self, operation, a0, a1, a2)


class RunQueue:
    """The tasks of one processor, and the programs that are ordered of it and get one each.

    `board` is asked for those programs alone. `body_of(task)` makes what a task runs for a row, once for each task.
    """

    def __init__(self, vcpu: SharedVcpu, board: TaskBoard, body_of: Callable[[GuestTask], Body]) -> None:
        self._vcpu: Final = vcpu
        self._board: Final = board
        self._body_of: Final = body_of
        self._tasks: Final[list[tuple[GuestTask, Body]]] = []

    @property
    def busy(self) -> bool:
        """Whether a task is in the middle of something: then its processor stays."""
        return any(task.busy for task, _body in self._tasks)

    def left_ns(self) -> int:
        """How long until the first pause that ends by itself; 0 or less: one is over."""
        first = min((task.until_ns for task, _body in self._tasks if task.busy), default=NEVER)
        return first - self._vcpu.now()

    def turn(self) -> None:
        """Go on with every task that is in the middle of something, then begin what was ordered."""
        for task, _body in self._tasks:
            if task.busy:
                task.go_on()
        while self._has_room() and (row := self._board.take(self._vcpu.cpu)) is not None:
            task, body = self._free()
            task.begin(partial(body, row))

    def retire(self) -> None:
        """The process ends: nobody goes on."""
        for task, _body in self._tasks:
            if task.trace:
                task.trace.stop(os.getpid(), task.row.name)
            task.counters.flush()

    def _has_room(self) -> bool:
        return len(self._tasks) < MOST_TASKS or not all(task.busy for task, _body in self._tasks)

    def _free(self) -> tuple[GuestTask, Body]:
        """A task that runs nothing; made if there is none, so that a processor has no more than it ever needed."""
        for one in self._tasks:
            if not one[0].busy:
                return one
        task = GuestTask(self._vcpu, f"vcpu{self._vcpu.cpu}/{len(self._tasks) + 1}")
        self._tasks.append((task, self._body_of(task)))
        return self._tasks[-1]
