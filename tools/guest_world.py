"""A whole guest in one process, one step at a time: real processors and workers, and a host that a test scripts.

Each actor (a vCPU, a worker thread) is a greenlet: a stack of its own, of which one at a time runs, until it
blocks, and then the next one that has something to do. So a test is the same each time, and what it looks at
stands still; a turn costs about a microsecond, where threads would need the kernel twice. Semaphores, the clock
and VM exits are fakes; an exit is carried out by the host's real partition on the spot. The protocol's
other end is whatever `make_host` makes: a script of a test's, or the explorer's queues.

    world.call(f)          run f(current) as a task of CPU 0, to its end
    world.start(f)         the same, but it may block; `settle` until nothing moves any more, then look
    world.pass_time(s)     let machine time pass while everybody waits
"""

from __future__ import annotations

import mmap
import os
import signal
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType, SimpleNamespace
from typing import Any, Generic, NoReturn, Protocol, TypeVar, cast

from greenlet import getcurrent, greenlet

from emu import cpuid
from emu.control import CONTROL_BYTES, ActorKind, Control
from emu.counters import Counters
from emu.errors import MachineStopping
from emu.interrupts import InterruptRequester
from emu.ipc.segments import Segment
from emu.ipc.semaphores import Wakeup
from emu.layout import DOORBELLS, VP_AUTO_EOI, VP_INDEX, MachineState, vp_page_offset, vps_bytes
from emu.machine import KICK_SIGNAL, Machine
from emu.memory import GuestMemory
from emu.tracing import EVENTS, OneByOne, Recorder
from emu.tracing import Context as TraceContext
from emu.vmexit import ExitClient
from guestproc import vcpu_main, workqueue_main
from guestproc.current import Current
from guestproc.kernel.layout import Channel, KernelTables
from guestproc.kernel.workqueue import WORKERS, QueueNumber
from guestproc.protocol.era import ERAS
from guestproc.vcpu import Vcpu, WorkerThread
from guestproc.vmbus.bus import vmbus_bus_init, vmbus_exit, vmbus_start
from guestproc.vmbus.cpu_hotplug import cpuhp_thread_fun
from guestproc.vmbus.ring_buffer import RingCache
from guestproc.vmbus.vector import Gate
from hostproc.partition import Partition

T = TypeVar("T")


class OtherEnd(Protocol):
    """The host of a world: it is asked for a step in every round."""

    def step(self) -> bool:
        """Do what there is to do; whether there was anything."""


RAM_BYTES = 24 << 20
SECOND_NS = 1_000_000_000
MOST_STEPS = 200_000
NEVER_NS = 1 << 62


class FakeClock:
    """Machine time that only passes when it is looked at (1 us) or when the test says so."""

    def __init__(self) -> None:
        self.time_ns = 1_000_000

    def now(self) -> int:
        self.time_ns += 1_000
        return self.time_ns

    def reference_time(self) -> int:
        return self.time_ns // 100

    def hold(self) -> None:
        """Somebody is held at a sync point; nothing passes by itself here anyway."""

    def release(self) -> None:
        """And goes on."""


class FakeRecorder(OneByOne):
    """Keeps what an actor records, with its name and context, in the world's one list."""

    keeps_bytes = False

    def __init__(self, world: World, context: int) -> None:
        self._world = world
        self.context = context

    def start(self, pid: int, kind: int, cpu: int, name: str) -> None:
        """Nobody here is interested."""

    def stop(self, pid: int, name: str, status: int = 0) -> None:
        """Nor here."""

    def record(self, event: int, *arguments: int) -> None:
        name = NAMES[event]
        if name not in BENEATH:
            self._world.events.append(Event(name, arguments, self._world.running, TraceContext(self.context)))


NAMES = {spec.number: name for name, spec in EVENTS.items()}
BENEATH = {"halt", "halt_end", "poll", "vmexit", "irq_raise", "kick", "page_alloc", "page_free"}
"""What a processor does beneath the guest kernel, which is what these tests are about."""


class Event(tuple[str, tuple[int, ...], str, TraceContext]):
    """One record: event name, arguments, actor, context."""

    def __new__(cls, name: str, arguments: tuple[int, ...], actor: str, context: TraceContext) -> Event:
        return super().__new__(cls, (name, arguments, actor, context))

    name = property(lambda self: self[0])
    arguments = property(lambda self: self[1])
    actor = property(lambda self: self[2])
    context = property(lambda self: self[3])


class FakeWakeup:
    """A semaphore: blocking on it hands the turn back until there is a token, or time has passed."""

    def __init__(self, world: World, part: str) -> None:
        self.world = world
        self.part = part
        self.tokens = 0

    def post(self) -> None:
        self.tokens += 1

    def block(self, timeout_s: float = 1.0) -> bool:
        clock = self.world.clock
        self.world.wait_turn(lambda: self.tokens > 0, clock.time_ns + int(timeout_s * SECOND_NS))
        if self.tokens:
            self.tokens -= 1
            return True
        return False

    def try_take(self) -> bool:
        return False

    def close(self) -> None:
        pass


class FakeMachine(Machine):
    """A machine on memory that has no name."""

    world: World

    def wakeup(self, part: str) -> Wakeup:
        wakeup = self._wakeups.get(part)
        if wakeup is None:
            wakeup = self._wakeups[part] = cast(Wakeup, FakeWakeup(self.world, part))
        return wakeup

    def fakes(self) -> Iterator[FakeWakeup]:
        """Every semaphore."""
        return (cast(FakeWakeup, wakeup) for wakeup in self._wakeups.values())

    def recorder(self, row: Any, *, vp: int = 255, context: int = TraceContext.HOST) -> Recorder | None:
        if not self.world.records:
            return None
        return cast(Recorder, FakeRecorder(self.world, context))


class DirectExits:
    """VM exits that the partition carries out on the spot; `refuse_next` makes one fail."""

    def __init__(self, world: World, position: int) -> None:
        self._world = world
        self._position = position

    def exit(self, operation: int, a0: int = 0, a1: int = 0, a2: int = 0) -> tuple[int, int]:
        if self._world.stopping:
            raise MachineStopping("the test is over")
        if self._world.exit_errors:
            raise self._world.exit_errors.popleft()
        result, fault = self._world.partition.execute(self._position, operation, (a0, a1, a2))
        assert not fault, f"exit {operation} ({a0:#x}, {a1:#x}) ended with fault {fault}"
        return result


class Lane:
    """One actor's stack; it has the turn from `switch` until it waits again, or is finished."""

    def __init__(self, world: World, name: str, body: Callable[[], None]) -> None:
        self.world = world
        self.name = name
        self.body = body
        self.ready: Callable[[], bool] = _at_once
        self.deadline_ns = NEVER_NS
        self.finished = False
        self.error = ""
        self._stack = greenlet(self._run)
        # Where it waits: its own stack, or that of a task that runs on it (`guestproc.run_queue`).
        self._at = self._stack

    @property
    def frame(self) -> FrameType | None:
        """Where it waits; None before its first turn and after its last."""
        frame: FrameType | None = self._at.gr_frame
        return frame

    def switch(self) -> None:
        """Give it the turn; returns when it waits, or is finished."""
        self._stack.parent = getcurrent()
        self._at.switch()

    def wait(self) -> None:
        """Give the turn back; called by the lane itself."""
        assert self._stack.parent is not None
        self._at = getcurrent()
        self._stack.parent.switch()

    def _run(self) -> None:
        try:
            self.body()
        except MachineStopping:
            pass
        except BaseException:
            self.error = traceback.format_exc()
        self.finished = True


class Task(Generic[T]):
    """Something that runs on a CPU: its result once it has ended."""

    def __init__(self, function: Callable[[Current], T]) -> None:
        self.function = function
        self._results: list[T] = []

    def run(self, current: Current) -> None:
        self._results.append(self.function(current))

    def ended(self) -> bool:
        """Whether the function has returned."""
        return bool(self._results)

    @property
    def result(self) -> T:
        assert self._results, "the task has not ended"
        return self._results[0]


class World:
    """The machine, its guest and its host; see the module's docstring."""

    VCPU: type[Vcpu] = Vcpu
    records = True
    """Whether what happens is kept in `events`."""

    def __init__(
        self,
        make_host: Callable[[Partition, Machine], OtherEnd],
        *,
        cpus: int = 2,
        perf_map: int = 1,
        ring_memory: str = "contiguous",
        era: str = "current",
        deprecate_auto_eoi: bool = True,
        devices: Sequence[Mapping[str, Any]] = (),
        first_vp: int = 10,
        races: bool = False,
        switches: Mapping[str, Any] | None = None,
    ) -> None:
        self._races = races
        self._first_vp = first_vp
        self._switches = dict(switches or {})
        self.era = ERAS[era]
        self._deprecate_auto_eoi = deprecate_auto_eoi
        self.clock = FakeClock()
        self.events: list[Event] = []
        self.log: list[str] = []
        self.reports: list[tuple[Any, ...]] = []
        self.exit_errors: deque[BaseException] = deque()
        self.running = "test"
        self.stopping = False
        self.lanes: list[Lane] = []
        self._lane: Lane | None = None
        self._tasks: dict[int, deque[Task[Any]]] = {cpu: deque() for cpu in range(cpus)}
        self._fds: list[int] = []
        self.machine = self._make_machine(cpus, ring_memory, perf_map, devices)
        self.partition = self._make_partition()
        self.host = make_host(self.partition, self.machine)
        self._handler = signal.getsignal(KICK_SIGNAL)
        self.cpus = [self.VCPU(self.machine, cpu, self._report) for cpu in range(cpus)]
        for cpu in self.cpus:
            cpu.begin()
        for cpu in self.cpus:
            cpu.exits = cast(ExitClient, DirectExits(self, cpu.position))
            cpu._die_of_isr = _raise_again  # type: ignore[method-assign]
        vp_indices = [self.machine.vp_index(cpu.position) for cpu in self.cpus]
        self.tables = KernelTables.format(self.machine.ram.memory, cpus, self.era.number, vp_indices)
        vcpu_main._note_numa(self.machine, self.tables)
        self.currents = [vcpu_main._current(cpu, self.tables, self._report) for cpu in self.cpus]
        for cpu, current in zip(self.cpus, self.currents, strict=True):
            self._lane_for(f"vcpu{cpu.cpu}", lambda cpu=cpu, current=current: self._serve(cpu, current))  # type: ignore[misc]
        self.workers: dict[str, Current] = {}
        self._make_workers()

    # -- parts ------------------------------------------------------------------------------------------

    def _segment(self, part: str, size: int) -> Segment:
        fd = os.memfd_create(part)
        os.ftruncate(fd, size)
        self._fds.append(fd)
        return Segment(part, fd, size)

    def _make_machine(
        self, cpus: int, ring_memory: str, nodes: int, devices: Sequence[Mapping[str, Any]]
    ) -> FakeMachine:
        control = Control(self._segment("control", CONTROL_BYTES))
        control.clock = cast(Any, self.clock)
        positions = list(reversed(range(cpus)))  # CPU number, page position and VP index are three things
        config = {
            "machine": {
                "poll": "off",
                "exit_deadline_s": 5,
                "era": self.era.name,
                "numa": nodes,
                "ring_memory": ring_memory,
            },
            "device": [dict(one) for one in devices],
            "cpu_positions": positions,
            "seed": 1,
            "races": self._races,
            "switches": self._switches,
        }
        control.config = lambda: config  # type: ignore[method-assign]
        segments = {
            "ram": self._segment("ram", RAM_BYTES),
            "vps": self._segment("vps", vps_bytes(cpus)),
            "doorbells": self._segment("doorbells", DOORBELLS.size),
            "trace": self._segment("trace", mmap.PAGESIZE),
        }
        for position in range(cpus):
            segments["vps"].view.store_u32(vp_page_offset(position) + VP_INDEX, self._first_vp + position)
        machine = FakeMachine("world", segments, control)
        machine.world = self
        control.state_word.store(MachineState.RUNNING)
        return machine

    def _make_partition(self) -> Partition:
        machine = self.machine
        memory = GuestMemory(machine.ram.fd, machine.ram.memory, machine.ram.size)
        row, counters = machine.enlist(ActorKind.HYPERVISOR, "hypervisor")
        requesters = [self._requester(position, counters) for position in range(machine.vp_count)]
        view = machine.vps.view

        def set_auto_eoi(position: int, vectors: list[int]) -> None:
            for word in range(4):
                bits = sum(1 << (vector & 63) for vector in vectors if vector >> 6 == word)
                view.store_u64(vp_page_offset(position) + VP_AUTO_EOI + 8 * word, bits)

        return Partition(
            memory,
            [machine.vp_index(position) for position in range(machine.vp_count)],
            cpuid=cpuid.leaves(deprecate_auto_eoi=self._deprecate_auto_eoi),
            reference_time=self.clock.reference_time,
            request_interrupt=lambda position, vector: requesters[position].request(vector),
            set_auto_eoi=set_auto_eoi,
            reset_words=lambda position: None,
            note_serial=lambda position, sint, serial: machine.control.view.store_u64(
                machine.control.serial_offset(position, sint), serial
            ),
            attached=lambda pid: 1,
            detached=lambda: None,
        )

    def _requester(self, position: int, counters: Counters) -> InterruptRequester:
        kick = SimpleNamespace(post=self.machine.wakeup(f"vp.{position}").post, interrupt=lambda: False)
        return InterruptRequester(self.machine.vps.view, position, kick, counters)

    def _make_workers(self) -> None:
        semaphore = 1
        # Whoever takes rescinds has its turn before those that probe, whatever queue that is.
        for queue in sorted(QueueNumber, key=lambda one: (one != QueueNumber.WORK, one != self.era.rescind_queue)):
            for worker in range(WORKERS[queue]):
                name = queue.name if WORKERS[queue] == 1 else f"{queue.name}/{worker}"
                hooks = WorkerThread(self.machine, name, semaphore)
                hooks.exits = cast(ExitClient, DirectExits(self, hooks.position))
                memory = GuestMemory(self.machine.ram.fd, self.machine.ram.memory, self.machine.ram.size)
                rings = RingCache(memory, lambda: None)
                current = Current(hooks, self.tables, self.era, rings, memory, self._report)
                self.workers[name] = current
                self._lane_for(name, lambda c=current, q=queue, w=worker: self._work(c, q, w))  # type: ignore[misc]
                semaphore += 1

    def _lane_for(self, name: str, body: Callable[[], None]) -> None:
        self.lanes.append(Lane(self, name, body))

    def _report(self, *message: Any) -> None:
        self.reports.append(message)
        if message[0] == "log":
            self.log.append(message[2])

    # -- what the actors run ------------------------------------------------------------------------------

    def _serve(self, cpu: Vcpu, current: Current) -> None:
        """A processor: interrupts, tasks, nothing else."""
        while not self.stopping:
            cpu.safe_point()
            if self._tasks[cpu.cpu]:
                self._tasks[cpu.cpu].popleft().run(current)
            elif not cpuhp_thread_fun(current, cpu.play_dead):
                cpu.idle(SECOND_NS)

    def _work(self, current: Current, queue: QueueNumber, worker: int) -> None:
        """A worker: as in the workqueue process."""
        queues = self.tables.work_queues
        while (item := queues.take(current.actor, queue, worker)) is not None:
            workqueue_main.carry_out(current, queue, item, worker)

    def wait_turn(self, ready: Callable[[], bool], deadline_ns: int) -> None:
        """Called by the actor that has the turn: let the others run until `ready`, or until that time."""
        lane = self._lane
        assert lane is not None, "the test itself has nobody to wait for"
        if self.stopping:
            raise MachineStopping("the test is over")
        lane.ready, lane.deadline_ns = ready, deadline_ns
        lane.wait()
        # Also for who was switched to for this alone: it ends here, and not at its next wait.
        if self.stopping:
            raise MachineStopping("the test is over")

    # -- for the test -------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Let everybody run until nobody has anything to do at this moment of machine time."""
        for _ in range(MOST_STEPS):
            if not self._step():
                return
        raise AssertionError("this does not settle")

    def _step(self) -> bool:
        # Both have their turn in every round.
        moved = self.partition.timers.run_due() | self.host.step()
        for lane in self.lanes:
            if not lane.finished and (lane.ready() or lane.deadline_ns <= self.clock.time_ns):
                self._switch(lane)
                moved = True
        return moved

    def _switch(self, lane: Lane) -> None:
        self._lane, self.running = lane, lane.name
        lane.switch()
        self._lane, self.running = None, "test"
        if lane.error:
            error, lane.error = lane.error, ""
            raise AssertionError(f"{lane.name} died:\n{error}")

    def lane(self, name: str) -> Lane:
        """An actor by its name."""
        return next(lane for lane in self.lanes if lane.name == name)

    def turn(self, name: str) -> None:
        """Let one actor run until it waits; an assertion when it has nothing to do."""
        lane = self.lane(name)
        assert lane.ready(), f"{name} has nothing to do"
        self._switch(lane)

    def pass_time(self, seconds: float) -> None:
        """Let machine time pass, waking everybody whose time comes."""
        end = self.clock.time_ns + int(seconds * SECOND_NS)
        self.settle()
        while self.clock.time_ns < end:
            waits = [lane.deadline_ns for lane in self.lanes if not lane.finished]
            waits.append(self.partition.timers.next_expiration * 100)
            self.clock.time_ns = max(self.clock.time_ns, min([end, *waits]))
            self.settle()

    def start(self, function: Callable[[Current], T], *, cpu: int = 0) -> Task[T]:
        """Order a task on a CPU; `settle` runs it."""
        task = Task(function)
        self._tasks[cpu].append(task)
        self.machine.wakeup(f"vp.{self.cpus[cpu].position}").post()
        return task

    def call(self, function: Callable[[Current], T], *, cpu: int = 0) -> T:
        """Run a task on a CPU to its end."""
        task = self.start(function, cpu=cpu)
        self.settle()
        return task.result

    def close(self) -> None:
        """End every actor."""
        self.stopping = True
        self.machine.control.state_word.store(MachineState.STOPPING)
        for lane in self.lanes:
            while not lane.finished:
                self._lane = lane
                lane.switch()
        signal.signal(KICK_SIGNAL, self._handler)
        while self._fds:
            os.close(self._fds.pop())

    # -- a guest on it ------------------------------------------------------------------------------------

    def boot_bus(self) -> None:
        """Everything up to the connection: handler, drivers, pages, each CPU's SynIC."""
        assert self.call(lambda current: vmbus_bus_init(current, len(self.cpus))) == 0
        for cpu in self.cpus:
            self.call(lambda current, cpu=cpu: vcpu_main._synic_online(current, Gate(current, cpu)), cpu=cpu.cpu)  # type: ignore[misc]

    def boot(self) -> None:
        """Connected, offers asked for."""
        self.boot_bus()
        assert self.call(vmbus_start) == 0

    def shut_down(self) -> dict[str, int]:
        """Unload; what was not given back."""
        self.call(vmbus_exit)
        assert self.tables.damage() == []
        return self.tables.leaks()

    def channel(self, relid: int) -> Channel:
        """The channel that has this relid."""
        channel = self.tables.relids.lookup(relid)
        assert channel is not None, f"no channel has relid {relid}"
        return channel

    @property
    def rescind_worker(self) -> str:
        """The actor that takes a rescind when none is under way."""
        name = self.era.rescind_queue.name
        return name if name in self.workers else f"{name}/0"

    def everybody(self) -> Iterator[Current]:
        """Every processor and worker."""
        yield from self.currents
        yield from self.workers.values()

    def refused(self) -> Counter[str]:
        """What the guest refused of the host's, by rule."""
        total: Counter[str] = Counter()
        for current in self.everybody():
            total.update(current.refused)
        return total

    def event_names(self) -> list[str]:
        """What happened, by name."""
        return [event.name for event in self.events]


def _at_once() -> bool:
    return True


def _raise_again() -> NoReturn:
    """Instead of the end of the process: the error of an ISR is the test's."""
    raise  # noqa: PLE0704
