r"""Calling a function on another processor: `smp_call_function_single`, as a record and an interrupt.

Each processor has one call record. A caller claims it, fills it, posts it, requests the call-function
interrupt, and sleeps; the processor runs the function in that interrupt and wakes it. The caller waits only
with interrupts on and no spinlock held, so two processors that call each other both go on; a target that is
offline or dead ends the wait with an error instead.

    FREE -> CLAIMED (a caller) -> POSTED (it) -> RUNNING (the target) -> DONE (it) -> FREE (the caller)
                                                         \-> ABANDONED (the caller) -> FREE (the target)
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any, Final

from emu.errors import DeadlinePassed, VmbusError
from guestproc.kernel.actors import Actor
from guestproc.kernel.functions import IPI_FUNCTIONS
from guestproc.kernel.records import Part, Ram
from guestproc.kernel.wait import SECOND_NS, WaitQueue, assert_may_wait

IPI_TIMEOUT_NS: Final = 10 * SECOND_NS


class CallState(IntEnum):
    """State word of a call record."""

    FREE = 0
    CLAIMED = 1
    POSTED = 2
    RUNNING = 3
    DONE = 4
    ABANDONED = 5


class ProcessorGone(VmbusError):
    """The processor to call is offline or dead, so the call cannot be made, or was not answered."""


class CallRecord:
    """State u32, function number u32 (IPI_FUNCTIONS), argument u64, wait queue u64."""

    SIZE: Final = 24

    __slots__ = ("_argument", "_function", "_state", "_wait", "name")

    def __init__(self, ram: Ram, gpa: int, name: str) -> None:
        self._state: Final = ram.u32(gpa)
        self._function: Final = ram.u32(gpa + 4)
        self._argument: Final = ram.u64(gpa + 8)
        self._wait: Final = WaitQueue(ram, gpa + 16, name)
        self.name: Final = name

    @classmethod
    def field(cls) -> Part[CallRecord]:
        """A call record as a field of a processor's record."""
        return Part(cls, cls.SIZE, "atomic: its state word hands the rest on")

    def call(
        self,
        actor: Actor,
        cpu: int,
        function: int,
        argument: int,
        online: Callable[[], bool],
        timeout_ns: int = IPI_TIMEOUT_NS,
    ) -> None:
        """Run the function on processor `cpu`, whose record this is, and wait until it returned.

        Raises ProcessorGone when `online()` says no, also in the middle; DeadlinePassed; MachineStopping.
        """
        assert not (actor.is_vcpu and actor.cpu == cpu), f"{actor} calls itself"
        assert_may_wait(actor, f"call of function {function} on CPU {cpu}")
        deadline_ns = actor.now() + timeout_ns
        self._until(actor, self._claim, cpu, online, deadline_ns)
        self._function.store(function)
        self._argument.store(argument)
        self._state.store(CallState.POSTED)
        actor.send_ipi(cpu)
        try:
            self._until(actor, lambda: self._state.load() == CallState.DONE, cpu, online, deadline_ns)
        finally:
            self._give_back(actor)

    def run(self, actor: Actor, owner: Any) -> bool:
        """In the call-function interrupt: run `function(owner, argument)`. False: nothing was posted."""
        if self._state.cas(CallState.POSTED, CallState.RUNNING) != CallState.POSTED:
            return False
        IPI_FUNCTIONS.lookup(self._function.load())(owner, self._argument.load())
        if self._state.cas(CallState.RUNNING, CallState.DONE) == CallState.ABANDONED:
            self._state.store(CallState.FREE)
        self._wait.wake_all(actor)
        return True

    def offline(self, actor: Actor) -> None:
        """The processor went: wake the callers, who look at `online` again."""
        self._wait.wake_all(actor)

    def _give_back(self, actor: Actor) -> None:
        """Free the record; a call that was given up while it runs is freed by the target when it returns."""
        while True:
            state = self._state.load()
            after = CallState.ABANDONED if state == CallState.RUNNING else CallState.FREE
            if self._state.cas(state, after) == state:
                break
        self._wait.wake_all(actor)

    def _claim(self) -> bool:
        return self._state.cas(CallState.FREE, CallState.CLAIMED) == CallState.FREE

    def _until(
        self, actor: Actor, done: Callable[[], bool], cpu: int, online: Callable[[], bool], deadline_ns: int
    ) -> None:
        """Wait for `done()`, or for the processor to go."""
        reached = False

        def look() -> bool:
            nonlocal reached
            reached = reached or done()
            return reached or not online()

        if not self._wait.wait_until_timeout(actor, look, max(0, deadline_ns - actor.now())):
            raise DeadlinePassed(self.name, IPI_TIMEOUT_NS)
        if not reached:
            raise ProcessorGone(f"{self.name}: CPU {cpu} is offline or dead")
