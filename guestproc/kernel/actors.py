"""An actor is one thread of the guest: a virtual processor, or a worker that may sleep.

Locks and waiters name an actor by its *number*, (slot in the process table, generation) in one u32, so that
the number of a thread that died is never mistaken for that of its successor; 0 is nobody. What an actor can
do beyond memory (sleep, wake another, switch its interrupts off, know the time) are the `ActorHooks` that
its process supplies: nothing in this package opens, waits or reads a clock by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING, Final, Protocol

from emu.tracing import not_recorded
from guestproc.kernel.records import Table

if TYPE_CHECKING:
    from guestproc.kernel.locks import Ranked
    from guestproc.kernel.waiters import Waiter

SLOT_BITS: Final = 12
NOBODY: Final = 0


class Context(IntEnum):
    """Where an actor is: what may wait there differs. Values rise with what interrupts what."""

    TASK = 0
    SOFTIRQ = 1
    HARDIRQ = 2


def actor_number(slot: int, generation: int) -> int:
    """The number of the thread in `slot` of the process table; generations start at 1."""
    assert 0 <= slot < 1 << SLOT_BITS, f"process slot {slot} does not fit {SLOT_BITS} bits"
    number = generation << SLOT_BITS | slot
    assert generation > 0 and number < 1 << 32, f"actor generation {generation}"
    return number


def actor_slot(number: int) -> int:
    """Slot in the process table."""
    return number & (1 << SLOT_BITS) - 1


def actor_generation(number: int) -> int:
    """Generation of that slot."""
    return number >> SLOT_BITS


class ActorHooks(Protocol):
    """What a process does for the actors in it. Times are machine nanoseconds."""

    def block(self, deadline_ns: int) -> bool:
        """Sleep on this actor's own semaphore; False: the deadline passed. May return True for no reason.

        On a processor this is a halt: interrupts are taken meanwhile.
        """

    def wake(self, actor: int) -> None:
        """Post another actor's semaphore (a processor: request the reschedule interrupt). Never waits."""

    def yield_processor(self) -> None:
        """Let another process of this computer run (`sched_yield`)."""

    def now(self) -> int:
        """Machine time."""

    def is_dead(self, actor: int) -> bool:
        """Whether the launcher wrote this actor down as dead (or its slot has a new generation)."""

    def stopping(self) -> bool:
        """Whether the machine's state word says STOPPING."""

    def irq_save(self) -> int:
        """Switch interrupts off and return the former state. A worker has none: nothing to do."""

    def irq_restore(self, flags: int) -> None:
        """Put the former state back; on → pending interrupts are looked for, then taken."""

    def irqs_disabled(self) -> bool:
        """Whether interrupts are off now."""

    def context(self) -> Context:
        """Where this actor is now."""

    def kick_cpu(self, cpu: int) -> None:
        """Request the reschedule interrupt on a processor: it looks at its tasklets again. Never waits."""

    def send_ipi(self, cpu: int) -> None:
        """Request the call-function interrupt on another processor. Never waits."""


class Actor:
    """One thread of the guest as the kernel code sees it; made by its process, used by that thread only.

    `cpu` is what `smp_processor_id()` returns; only an actor with `is_vcpu` *is* that processor. One without interrupts
    (`has_interrupts`: a worker) is always a task, and locks do not ask its hooks to switch any off.
    """

    def __init__(
        self,
        number: int,
        hooks: ActorHooks,
        waiters: Table[Waiter],
        *,
        cpu: int = 0,
        is_vcpu: bool = False,
        has_interrupts: bool = True,
        name: str = "",
        record: Callable[..., None] = not_recorded,
    ) -> None:
        assert number, "actor number 0 is nobody"
        self.number: Final = number
        self.cpu: Final = cpu
        self.is_vcpu: Final = is_vcpu
        self.has_interrupts: Final = has_interrupts
        self.name: Final = name or f"actor {number:#x}"
        self.hooks: Final = hooks
        self.waiters: Final = waiters
        # Bound once: these are called on every lock.
        self.block: Final = hooks.block
        self.wake: Final = hooks.wake
        self.yield_processor: Final = hooks.yield_processor
        self.now: Final = hooks.now
        self.is_dead: Final = hooks.is_dead
        self.stopping: Final = hooks.stopping
        self.irq_save: Final = hooks.irq_save
        self.irq_restore: Final = hooks.irq_restore
        self.irqs_disabled: Final = hooks.irqs_disabled
        self.context: Final = hooks.context
        self.kick_cpu: Final = hooks.kick_cpu
        self.send_ipi: Final = hooks.send_ipi
        self.held: Final[list[tuple[Ranked, int]]] = []
        """Locks held, in the order of taking (so in the order of rank), each with the saved flags."""
        self.record: Final = record
        """Records an event; what is chosen to record calls it, and nothing else."""
        self.spinning: int = 0
        """How many of them are spinlocks."""

    def __repr__(self) -> str:
        return self.name
