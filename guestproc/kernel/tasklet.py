"""Tasklets: functions that run on a processor after its interrupts, one at a time each, and can be held off.

The whole state of a tasklet is one u32 word, so every step is one atomic operation:

    SCHED     it is on the pending list of processor `cpu`
    RUN       its function runs, on some processor
    WAITED    somebody sleeps until it is idle (or not running): whoever clears RUN wakes them
    count     how often it is disabled; while that is not 0 it does not start, and stays pending

The pending list is local to the processor that scheduled it. So what ends a hindrance (enabling it, or the
end of its run on another processor) kicks the processor where it is pending: a processor halts only when
nothing on its list may run, and looks again at every kick.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final

from guestproc.kernel.actors import Actor
from guestproc.kernel.functions import TASKLET_FUNCTIONS
from guestproc.kernel.records import Part, Ram
from guestproc.kernel.wait import DEFAULT_TIMEOUT_NS, WaitQueue, assert_may_wait

SCHED: Final = 1
RUN: Final = 2
WAITED: Final = 4
CPU_SHIFT: Final = 8
CPU_MASK: Final = 0xFF
_CPU_BITS: Final = CPU_MASK << CPU_SHIFT
_BUT_CPU: Final = ~_CPU_BITS
_NOT_SCHED: Final = ~SCHED
_RUN_IS_OVER: Final = ~(RUN | WAITED) & 0xFFFFFFFF
DISABLED_ONE: Final = 1 << 16
LOOKS_BEFORE_SLEEP: Final = 3
PASSES: Final = 10
"""How often one `run` begins anew when tasklets schedule tasklets (the kernel's MAX_SOFTIRQ_RESTART)."""


class Tasklet:
    """State word u32, function number u32 (TASKLET_FUNCTIONS), argument u64."""

    SIZE: Final = 16

    __slots__ = ("_argument", "_function", "cas", "load", "load_argument", "load_function", "name", "word")

    def __init__(self, ram: Ram, gpa: int, name: str) -> None:
        self.word: Final = ram.u32(gpa)
        self.load: Final = self.word.load
        self.cas: Final = self.word.cas
        self._function: Final = ram.u32(gpa + 4)
        self._argument: Final = ram.u64(gpa + 8)
        self.load_function: Final = self._function.load
        self.load_argument: Final = self._argument.load
        self.name: Final = name

    def init(self, function: int, argument: int) -> None:
        """`tasklet_init`: idle, enabled."""
        self._function.store(function)
        self._argument.store(argument)
        self.word.store(0)

    @property
    def function(self) -> int:
        """Number of its function."""
        return self._function.load()

    @property
    def argument(self) -> int:
        """What the function is given."""
        return self._argument.load()

    @property
    def scheduled(self) -> bool:
        """Whether it is pending somewhere."""
        return bool(self.word.load() & SCHED)

    @property
    def running(self) -> bool:
        """Whether its function runs now."""
        return bool(self.word.load() & RUN)

    @property
    def disable_count(self) -> int:
        """How often it is disabled now."""
        return self.word.load() >> 16

    def may_start(self) -> bool:
        """Enabled and not running: the processor it is pending on may start it."""
        word = self.word.load()
        return not word & RUN and word < DISABLED_ONE


def tasklet_disable(actor: Actor, tasklet: Tasklet, idle: WaitQueue, timeout_ns: int = DEFAULT_TIMEOUT_NS) -> None:
    """It does not start any more, and does not run now: waits for a running function to return."""
    assert_may_wait(actor, tasklet.name)
    tasklet.word.fetch_add(DISABLED_ONE)
    _wait_for(actor, tasklet, RUN, idle, timeout_ns)


def tasklet_disable_nosync(tasklet: Tasklet) -> None:
    """It does not start any more; it may be running still."""
    tasklet.word.fetch_add(DISABLED_ONE)


def tasklet_enable(actor: Actor, tasklet: Tasklet) -> None:
    """Take one disable back; if it was the last and the tasklet is pending, its processor looks again."""
    word = tasklet.word.fetch_sub(DISABLED_ONE)
    assert word >= DISABLED_ONE, f"{tasklet.name} is enabled more often than it was disabled"
    if word < 2 * DISABLED_ONE and word & SCHED:
        actor.kick_cpu(word >> CPU_SHIFT & CPU_MASK)


def tasklet_kill(actor: Actor, tasklet: Tasklet, idle: WaitQueue, timeout_ns: int = DEFAULT_TIMEOUT_NS) -> None:
    """Wait until it is neither pending nor running; nobody may schedule it any more."""
    assert_may_wait(actor, tasklet.name)
    _wait_for(actor, tasklet, SCHED | RUN, idle, timeout_ns)


def _wait_for(actor: Actor, tasklet: Tasklet, bits: int, idle: WaitQueue, timeout_ns: int) -> None:
    """Look a few times (most functions are short), then sleep until none of `bits` is set."""
    word = tasklet.word

    def clear_or_announced() -> bool:
        while (seen := word.load()) & bits:
            # WAITED goes in only while the bit is there: who clears the bit finds it in the same operation.
            if seen & WAITED or word.cas(seen, seen | WAITED) == seen:
                return False
        return True

    for _ in range(LOOKS_BEFORE_SLEEP):
        if not word.load() & bits:
            return
        actor.yield_processor()
    idle.wait_until(actor, clear_or_announced, timeout_ns, f"{tasklet.name} to be idle")


class TaskletQueue:
    """The pending list of one processor; used by that processor only, also from its ISR.

    `owner` is the first argument of every tasklet function, the tasklet's argument the second.
    """

    def __init__(self, actor: Actor, idle: WaitQueue, owner: Any = None) -> None:
        assert actor.is_vcpu
        self._actor: Final = actor
        self._idle: Final = idle
        self._owner = owner
        self.queue: Final[deque[Tasklet]] = deque()
        """The pending list itself, for a look whether there is any."""
        self._here: Final = SCHED | actor.cpu << CPU_SHIFT
        self._running = False
        self.runs = 0

    def schedule(self, tasklet: Tasklet) -> bool:
        """`tasklet_schedule`: pending here now; False if it was pending already, here or elsewhere."""
        while True:
            seen = tasklet.load()
            if seen & SCHED:
                return False
            if tasklet.cas(seen, seen & _BUT_CPU | self._here) == seen:
                self.queue.append(tasklet)
                return True

    def runnable(self) -> bool:
        """Whether something may run now: look before a halt, after having announced it."""
        if not self.queue:  # nearly always, and asked at every look of a halting processor
            return False
        pending = self.queue
        first = pending[0].load()  # `may_start`, without the call
        if not first & RUN and first < DISABLED_ONE:
            return True
        return any(pending[position].may_start() for position in range(1, len(pending)))

    def pending(self) -> int:
        """How many are pending here, disabled ones included."""
        return len(self.queue)

    def run(self) -> bool:
        """On the way out of an interrupt, interrupts on: run what may run. True: some is left, call again.

        Called from inside a tasklet (by an ISR on top of it) it does nothing: the outer call goes on.
        """
        if self._running:
            return False
        self._running = True
        pending = self.queue
        try:
            for _ in range(PASSES):
                if not self._pass(pending):
                    return False
                if not pending:
                    return False
            return self.runnable()
        finally:
            self._running = False

    def _pass(self, pending: deque[Tasklet]) -> bool:
        """Try everything that is pending once; whether something ran."""
        ran = False
        for _ in range(len(pending)):
            tasklet = pending.popleft()
            while True:
                seen = tasklet.load()
                if seen & RUN or seen >= DISABLED_ONE:
                    # Disabled, or running elsewhere: it stays pending, and what ends that kicks us.
                    pending.append(tasklet)
                    break
                # SCHED becomes RUN in one step.
                if tasklet.cas(seen, seen & _NOT_SCHED | RUN) == seen:
                    ran = True
                    self.runs += 1
                    self._call(tasklet)
                    break
        return ran

    def _call(self, tasklet: Tasklet) -> None:
        number = tasklet.load_function()
        function: Callable[..., None] = TASKLET_FUNCTIONS.known.get(number) or TASKLET_FUNCTIONS.lookup(number)
        function(self._owner, tasklet.load_argument())
        # The tasklet may be killed and its record freed right after this operation: touch it no more.
        seen = tasklet.word.fetch_and(_RUN_IS_OVER)
        if seen & WAITED:
            self._idle.wake_all(self._actor)
        if seen & SCHED and seen & _CPU_BITS != self._here & _CPU_BITS:
            self._actor.kick_cpu(seen >> CPU_SHIFT & CPU_MASK)


def tasklet(lock: str = "atomic: its word") -> Part[Tasklet]:
    """A `Tasklet` as a field of a record."""
    return Part(Tasklet, Tasklet.SIZE, lock)
