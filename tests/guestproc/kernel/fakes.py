"""Actors for tests: one kind that runs alone on a clock of its own, one that lives in a forked process."""

from __future__ import annotations

import mmap
import os
import select
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

from guestproc.kernel.actors import Actor, Context, actor_number
from guestproc.kernel.records import Ram, Table
from guestproc.kernel.tasklet import TaskletQueue
from guestproc.kernel.waiters import Waiter

SECOND_NS = 1_000_000_000
WAITERS_GPA = 0x1000
FREE_GPA = 0x20000
"""Where a test's own objects start; the waiters' table is below."""


READY_GPA = 0x40


class LoneHooks:
    """Hooks of an actor that is alone: what "the others" do while it sleeps is `meanwhile`, in order.

    With nothing left to happen, a sleep lasts until its deadline and the clock stands there afterwards.
    """

    def __init__(self) -> None:
        self.time_ns = 1_000
        self.meanwhile: deque[Callable[[], object]] = deque()
        self.woken: list[int] = []
        self.kicked: list[int] = []
        self.called: list[int] = []
        self.dead: set[int] = set()
        self.stop = False
        self.irqs_off = False
        self.where = Context.TASK
        self.yields = 0
        self.on_yield: Callable[[], None] = lambda: None

    def block(self, deadline_ns: int) -> bool:
        if self.meanwhile:
            self.meanwhile.popleft()()
            return True
        self.time_ns = max(self.time_ns, deadline_ns)
        return False

    def wake(self, actor: int) -> None:
        self.woken.append(actor)

    def yield_processor(self) -> None:
        self.yields += 1
        self.time_ns += SECOND_NS // 100
        self.on_yield()

    def now(self) -> int:
        return self.time_ns

    def is_dead(self, actor: int) -> bool:
        return actor in self.dead

    def stopping(self) -> bool:
        return self.stop

    def irq_save(self) -> int:
        flags, self.irqs_off = int(self.irqs_off), True
        return flags

    def irq_restore(self, flags: int) -> None:
        self.irqs_off = bool(flags)

    def irqs_disabled(self) -> bool:
        return self.irqs_off

    def context(self) -> Context:
        return self.where

    def kick_cpu(self, cpu: int) -> None:
        self.kicked.append(cpu)

    def send_ipi(self, cpu: int) -> None:
        self.called.append(cpu)


class Lone:
    """RAM on a bytearray with a waiters' table, and actors in it that share one set of lone hooks."""

    def __init__(self, size: int = 1 << 20) -> None:
        self.ram = Ram(bytearray(size))
        self.waiters = Table(self.ram, "waiters", Waiter, WAITERS_GPA, 64)
        self.hooks = LoneHooks()
        self.actor = self.new_actor(1)

    def new_actor(self, slot: int, *, is_vcpu: bool = False, cpu: int = 0) -> Actor:
        """Another actor with the same hooks."""
        return Actor(actor_number(slot, 1), self.hooks, self.waiters, cpu=cpu, is_vcpu=is_vcpu, name=f"a{slot}")


class ProcessHooks(LoneHooks):
    """Hooks of one process of a `Crowd`: real time, and an eventfd for a semaphore."""

    def __init__(self, crowd: Crowd, slot: int) -> None:
        super().__init__()
        self._crowd = crowd
        self._token = crowd.tokens[slot]
        self._poll = select.poll()
        self._poll.register(self._token, select.POLLIN)
        self.tasklets: TaskletQueue | None = None

    def block(self, deadline_ns: int) -> bool:
        left = deadline_ns - self.now()
        if left <= 0:
            return False
        if self._poll.poll(left // 1_000_000 + 1):
            os.eventfd_read(self._token)
        if self.tasklets is not None:
            self.tasklets.run()
        return True

    def wake(self, actor: int) -> None:
        os.eventfd_write(self._crowd.tokens[actor & 0xFFF], 1)

    def kick_cpu(self, cpu: int) -> None:
        os.eventfd_write(self._crowd.tokens[cpu], 1)

    send_ipi = kick_cpu

    def yield_processor(self) -> None:
        os.sched_yield()

    def now(self) -> int:
        return time.monotonic_ns()


class Crowd:
    """Shared RAM with a waiters' table, and actors in processes of their own; actor i is CPU i."""

    def __init__(self, actors: int, size: int = 1 << 22) -> None:
        self.buffer = mmap.mmap(-1, size)
        self.ram = Ram(self.buffer)
        self.waiters = Table(self.ram, "waiters", Waiter, WAITERS_GPA, 64)
        self.ready = self.ram.u32(READY_GPA)
        self.tokens = [os.eventfd(0, os.EFD_SEMAPHORE) for _ in range(actors)]

    def actor(self, slot: int, *, is_vcpu: bool = False) -> Actor:
        """The actor of one slot; for use in one process only."""
        return Actor(
            actor_number(slot, 1),
            ProcessHooks(self, slot),
            self.waiters,
            cpu=slot,
            is_vcpu=is_vcpu,
            name=f"p{slot}",
        )

    def run(self, *parts: Callable[[Actor], None], deadline_s: float = 60.0) -> None:
        """Run part i as actor i in a process of its own; fail with what went wrong in any of them."""
        children = {}
        for slot, part in enumerate(parts):
            pid = os.fork()
            if pid == 0:
                self._child(slot, part, len(parts))
            children[os.pidfd_open(pid)] = (pid, slot)
        failed = []
        give_up = time.monotonic() + deadline_s
        for pidfd, (pid, slot) in children.items():
            ready, _, _ = select.select([pidfd], [], [], max(0.0, give_up - time.monotonic()))
            if not ready:
                os.kill(pid, 9)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os.close(pidfd)
            if status:
                failed.append(f"actor {slot} ended with {status}")
        for token in self.tokens:
            os.close(token)
        assert not failed, failed

    def _child(self, slot: int, part: Callable[[Actor], None], parts: int) -> None:
        """Start together with the others: short parts would run one after the other otherwise."""
        status = 1
        try:
            actor = self.actor(slot)
            self.ready.fetch_add(1)
            while self.ready.load() < parts:
                os.sched_yield()
            part(actor)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)


class Meddled:
    """An atomic word before whose first change somebody else gets in: the window between look and swap."""

    def __init__(self, word: Any, meanwhile: Callable[[], object]) -> None:
        self._word = word
        self._meanwhile: Callable[[], object] | None = meanwhile

    def load(self, *order: int) -> int:
        """Looks are let through."""
        value: int = self._word.load(*order)
        return value

    def _get_in(self) -> None:
        meanwhile, self._meanwhile = self._meanwhile, None
        if meanwhile is not None:
            meanwhile()

    def __getattr__(self, operation: str) -> Any:
        self._get_in()
        return getattr(self._word, operation)


def meddle(thing: object, word: str, meanwhile: Callable[[], object]) -> None:
    """Let `meanwhile` happen once, just before `thing` changes its word called `word`."""
    setattr(thing, word, Meddled(getattr(thing, word), meanwhile))


def meddle_with(thing: object, operation: str, meanwhile: Callable[[], object]) -> None:
    """The same where `thing` has an operation of its word at hand, called `operation`."""
    bound = getattr(thing, operation)
    meddled = Meddled(bound.__self__, meanwhile)
    setattr(thing, operation, lambda *words: getattr(meddled, bound.__name__)(*words))
