"""The world of the explorer's guest, whose state can be kept and put back while nobody is in the middle of something.

A thread that waits keeps part of the guest's state on its stack, which nothing can copy. Here a processor or a
worker that has nothing to do waits outside the guest: it holds no record, and its stack says nothing. So when all
of them do, guest RAM is the whole state. Of that only the pages exist that were ever touched, some thirty.

Where threads take turns (`stepping`), each stops at every sync point it comes to, and goes on in a turn of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from emu.ipc.segments import Segment
from emu.memory import PAGE_SIZE
from emu.syncpoint import BY_TEXT, Point
from emu.wire.synic import (
    HV_X64_MSR_GUEST_OS_ID,
    HV_X64_MSR_HYPERCALL,
    HV_X64_MSR_SCONTROL,
    HV_X64_MSR_SIEFP,
    HV_X64_MSR_SIMP,
    HV_X64_MSR_SINT0,
    VMBUS_MESSAGE_SINT,
    page_register_gpa,
)
from guestproc import workqueue_main
from guestproc.current import Current
from guestproc.kernel.actors import Context
from guestproc.kernel.workqueue import QueueNumber
from guestproc.vcpu import Vcpu
from tools.guest_world import NEVER_NS, Lane, World

# In the order in which they have to be written.
REGISTERS: Final = (
    HV_X64_MSR_GUEST_OS_ID,
    HV_X64_MSR_HYPERCALL,
    HV_X64_MSR_SIMP,
    HV_X64_MSR_SIEFP,
    HV_X64_MSR_SINT0 + VMBUS_MESSAGE_SINT,
    HV_X64_MSR_SCONTROL,
)
PAGE_REGISTERS: Final = (HV_X64_MSR_SIMP, HV_X64_MSR_SIEFP)
ZEROS: Final = bytes(PAGE_SIZE)
POINT_NAMES: Final = {int(point): name for name, point in BY_TEXT.items()}
EVERY_POINT: Final = bytes(point != Point.TURN for point in range(max(Point) + 1))
"""Armed for who takes turns. A turn itself is none of them: who comes out of a sleep has one anyway."""

Pages = Mapping[int, bytes]
"""Content of a segment by offset; what is not in it was never touched."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A state of a world, after its boot, in which nobody was in the middle of something."""

    ram: Pages
    vps: Pages
    registers: tuple[tuple[int, ...], ...]
    """Of each VP, as `REGISTERS`."""
    time_ns: int


class CopiedWorld(World):
    """A world that can be saved and put back; nothing is recorded in it."""

    records = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._idle: set[Lane] = set()
        self._held: dict[Lane, int] = {}
        self._may_go: set[Lane] = set()
        self.stepping = False
        super().__init__(*arguments, **options)
        for current in (*self.currents, *self.workers.values()):
            one: Any = current
            one.armed = EVERY_POINT
            one.reach = lambda point, _relid=0, current=current: self._reach(current, point)

    def boot_bus(self) -> None:
        """As any world; what an unload takes from a processor's process is kept."""
        super().boot_bus()
        self._booted = [
            (dict(cpu.vectors), current.percpu, current.tasklets)
            for cpu, current in zip(self.cpus, self.currents, strict=True)
        ]

    # -- what the actors run ------------------------------------------------------------------------------

    def _serve(self, cpu: Vcpu, current: Current) -> None:
        tasks = self._tasks[cpu.cpu]

        def due() -> bool:
            return bool(tasks or cpu.lapic.deliverable() or cpu.softirq_pending())

        while not self.stopping:
            cpu.safe_point()
            if tasks:
                tasks.popleft().run(current)
            elif not due():
                self._rest(due)

    def _work(self, current: Current, queue: QueueNumber, worker: int) -> None:
        queues, record = self.tables.work_queues, self.tables.queues.at(queue)
        record.worker_actors[worker] = current.actor.number
        while True:
            item = queues.try_take(current.actor, queue, worker)
            if item is None:
                self._rest(lambda: record.head != 0)
                continue
            workqueue_main.carry_out(current, queue, item, worker)

    def _rest(self, due: Callable[[], bool]) -> None:
        """Wait, without anything on the stack that matters, until there is something to do."""
        lane = self._lane
        assert lane is not None
        self._idle.add(lane)
        self.wait_turn(due, NEVER_NS)
        self._idle.discard(lane)

    def wait_turn(self, ready: Callable[[], bool], deadline_ns: int) -> None:
        """As any world; who does not want to wait at all keeps its turn."""
        if deadline_ns > self.clock.time_ns or self.stopping:
            super().wait_turn(ready, deadline_ns)

    # -- turns --------------------------------------------------------------------------------------------

    def runnable(self) -> list[str]:
        """Names of the actors that can go on: they are at a sync point, or what they waited for has come."""
        return [lane.name for lane in self.lanes if lane in self._held or lane.ready()]

    def held(self) -> dict[str, str]:
        """Who is at a sync point, and at which."""
        return {lane.name: POINT_NAMES[point] for lane, point in self._held.items()}

    def go_on(self, name: str) -> None:
        """Let one actor run until it waits, or comes to the next sync point."""
        lane = self.lane(name)
        if lane in self._held:
            self._may_go.add(lane)
        self._switch(lane)

    def interrupt(self, name: str) -> None:
        """Let a processor take its interrupts, and then do what it has to, if it is not at a sync point."""
        lane = self.lane(name)
        while lane.ready():
            self._switch(lane)
            if lane in self._held:
                return

    def _reach(self, current: Current, point: int) -> None:
        """An actor comes to a sync point. One that holds a spinlock, or has interrupts off, goes on."""
        actor, lane = current.actor, self._lane
        assert lane is not None
        if not self.stepping or actor.spinning or actor.context() != Context.TASK or actor.irqs_disabled():
            return
        self._held[lane] = point
        hooks = current.hooks
        due = hooks.lapic.deliverable if isinstance(hooks, Vcpu) else _never
        while lane not in self._may_go:
            self.wait_turn(due, NEVER_NS)
            if isinstance(hooks, Vcpu):
                hooks.safe_point()
        self._may_go.discard(lane)
        del self._held[lane]

    # -- keeping and putting back -------------------------------------------------------------------------

    def save(self) -> Saved | None:
        """The state, if nobody is in the middle of something."""
        if len(self._idle) != len(self.lanes) or self.runnable():
            return None
        self._forget_tokens()
        return Saved(
            _pages(self.machine.ram),
            _pages(self.machine.vps),
            tuple(tuple(self.partition.read_msr(vp, msr) for msr in REGISTERS) for vp in range(len(self.cpus))),
            self.clock.time_ns,
        )

    def restore(self, saved: Saved) -> None:
        """Put a state of this or another such world back; whoever is in the middle of something ends first."""
        self.stopping = True
        for number, lane in enumerate(self.lanes):
            if lane in self._idle:
                continue
            self._lane = lane
            while not lane.finished:
                lane.switch()
            self.lanes[number] = Lane(self, lane.name, lane.body)
        self._lane, self.stopping = None, False
        self._held.clear()
        self._may_go.clear()
        for tasks in self._tasks.values():
            tasks.clear()
        for position, values in enumerate(saved.registers):
            self._write_registers(position, values)
        _put_back(self.machine.ram, saved.ram)
        _put_back(self.machine.vps, saved.vps)
        for cpu, current, own in zip(self.cpus, self.currents, self._booted, strict=True):
            vectors, current.percpu, current.tasklets = own
            cpu.vectors = dict(vectors)
        for current in (*self.currents, *self.workers.values()):
            # What a process has mapped or looked up belongs to the records that were.
            current.rings.close()
            current.bells.clear()
            current.senders.clear()
            current.refused.clear()
        self.clock.time_ns = saved.time_ns
        self._forget_tokens()
        self.settle()

    def _write_registers(self, position: int, values: tuple[int, ...]) -> None:
        """Make a VP's registers what they were (they differ after an unload); RAM comes afterwards."""
        partition = self.partition
        if values == tuple(partition.read_msr(position, msr) for msr in REGISTERS):
            return
        partition.synics[position].reset()
        for msr, value in zip(REGISTERS, values, strict=True):
            if msr in PAGE_REGISTERS:
                gpa = page_register_gpa(value)
                self.machine.ram.memory[gpa : gpa + PAGE_SIZE] = ZEROS
            partition.write_msr(position, msr, value)

    def _forget_tokens(self) -> None:
        """A token that nobody waits for would wake somebody later for nothing."""
        for wakeup in self.machine.fakes():
            wakeup.tokens = 0


def _never() -> bool:
    return False


def _extents(segment: Segment) -> Iterator[int]:
    """Offsets of the pages of a segment that exist."""
    at = 0
    while at < segment.size:
        try:
            begin = os.lseek(segment.fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: only holes from here on
            return
        at = os.lseek(segment.fd, begin, os.SEEK_HOLE)
        yield from range(begin, at, PAGE_SIZE)


def _pages(segment: Segment) -> Pages:
    memory = segment.memory
    return {gpa: memory[gpa : gpa + PAGE_SIZE] for gpa in _extents(segment)}


def _put_back(segment: Segment, pages: Pages) -> None:
    memory = segment.memory
    for gpa in _extents(segment):
        if gpa not in pages:
            memory[gpa : gpa + PAGE_SIZE] = ZEROS
    for gpa, content in pages.items():
        memory[gpa : gpa + PAGE_SIZE] = content
