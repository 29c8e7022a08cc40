"""`Current`: what a thread of the guest kernel can reach, handed to every kernel-named function first.

It stands for the kernel's `current` and its globals at once: the actor, guest RAM's records, the thread's way
to the hypervisor, and this process's caches of rings. One object a thread; records are shared, this is not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from emu.errors import ProtocolViolation
from emu.fault_plan import Faults
from emu.memory import GuestMemory
from emu.switches import Fix
from emu.syncpoint import NOT_ARMED, Armed, unreachable
from emu.tracing import E_REFUSED, not_recorded, refused_words
from guestproc.kernel.actors import Actor
from guestproc.kernel.layout import Channel, Connection, Cpu, KernelTables
from guestproc.page_trace import record_pages
from guestproc.points import Points
from guestproc.protocol.era import Era
from guestproc.ring_points import EagerProducer, PointedConsumer, has_points
from guestproc.vcpu import Vcpu, WorkerThread

if TYPE_CHECKING:
    from guestproc.kernel.tasklet import TaskletQueue
    from guestproc.run_queue import GuestTask
    from guestproc.vmbus.event_lane import Bell, SendLane
    from guestproc.vmbus.percpu import PerCpuContext
    from guestproc.vmbus.ring_buffer import RingCache


class Current:
    """One thread of the guest kernel. `log` is its printk: text, for the launcher's log."""

    def __init__(
        self,
        hooks: Vcpu | GuestTask | WorkerThread,
        tables: KernelTables,
        era: Era,
        rings: RingCache,
        memory: GuestMemory,
        report: Callable[..., None],
    ) -> None:
        self.hooks: Final = hooks
        self.machine: Final = hooks.machine
        self.tables: Final = tables
        tables.ram.reserve = memory.reserve
        self.era: Final = era
        self.rings: Final = rings
        self.memory: Final = memory
        self.counters: Final = hooks.counters
        self.trace: Final = hooks.trace
        self.record: Final[Callable[..., None]] = self.trace.record if self.trace else not_recorded
        """Record an event; does nothing where this machine does not record, which is decided here."""
        self.actor: Final = Actor(
            hooks.row.number,
            hooks,
            tables.waiters,
            cpu=hooks.cpu,
            is_vcpu=hooks.is_vcpu,
            has_interrupts=hooks.is_vcpu,
            name=hooks.row.name,
            record=self.record,
        )
        self.cpu: Final = hooks.cpu
        self.exit: Final = hooks.exit
        self.fix: Final = Fix.of(self.machine.config)
        """What this machine does wrong on purpose: all right, unless its scenario says so."""
        self.percpu_lists: Final = era.percpu_lists or not self.fix.global_relid_map
        """Whether an interrupt finds its channel on its processor's chan_list: era `seed`, or wrong on purpose (F1)."""
        points = Points(hooks, self.record) if self.machine.races else None
        self.armed: Final[Armed] = NOT_ARMED if points is None else points.armed
        """A byte for each sync point: `if current.armed[POINT]: current.reach(POINT, relid)`."""
        self.reach: Final[Callable[..., None]] = unreachable if points is None else points.reach
        if points is not None and isinstance(hooks, Vcpu):
            hooks.armed, hooks.reach = points.armed, points.reach
        elif points is not None and isinstance(hooks, WorkerThread):
            hooks.stop_at_turns(points.armed, points.reach)
        if has_points(self):
            rings.reader = lambda channel: partial(PointedConsumer, self, channel)
        if not self.fix.signal_on_transition_only:
            rings.writer = lambda channel: partial(EagerProducer, self, channel)
        self.faults: Final = Faults(self.machine.control, self.trace.record if self.trace else None)
        """What is to go wrong in this thread; looked at where a step may fail, never for a packet."""
        if self.trace:
            record_pages(tables.pages, self.trace)
        self._report: Final = report
        self.connection: Final[Connection] = tables.connection
        self.bells: Final[dict[int, Bell]] = {}
        """By handle of a channel."""
        self.senders: Final[dict[int, SendLane]] = {}
        """By handle of a channel: what this thread sends by."""
        self.refused: Final[Counter[str]] = Counter()
        """What this thread refused of the host's, by rule."""
        self.percpu: PerCpuContext | None = None
        """This processor's SynIC pages and tasklets, once they are up (a worker has none)."""
        self.tasklets: TaskletQueue | None = None
        self.serial: int = 0
        """Serial of the message that this thread works for now (0: none); travels beside the data."""

    def cpu_record(self, cpu: int | None = None) -> Cpu:
        """The record of a processor, by default of the one this thread carries."""
        record: Cpu = self.tables.cpus.at(self.cpu if cpu is None else cpu)
        return record

    def channel(self, handle: int) -> Channel:
        """The channel that a handle names; an assertion when it is gone."""
        channel: Channel = self.tables.channels.from_handle(handle)
        return channel

    def log(self, text: object) -> None:
        """printk: a line for the launcher's log."""
        self._report("log", self.hooks.row.name, str(text))

    def refuse(self, violation: ProtocolViolation, what: str = "") -> None:
        """The host broke a rule: count it, record it, go on. `what` says whose bytes they were.

        WARN_ONCE in spirit: the first of a rule is logged, then the tenth, the hundredth, …, since a host that
        floods must not flood the log.
        """
        self.refused[violation.rule] += 1
        count = self.refused[violation.rule]
        value = violation.value if isinstance(violation.value, int) else 0
        self.record(E_REFUSED, *refused_words(violation.rule, value))
        if str(count).strip("0") == "1":
            often = f" ({count} times)" if count > 1 else ""
            self.log(f"{what}{': ' if what else ''}{violation} [{violation.rule}]{often}")
