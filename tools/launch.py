"""The launcher: makes a machine, starts its processes through the zygote, watches them, stops them.

It knows every name it made and unlinks them on every way out. A process that dies unasked is noticed at
once (the zygote reaps it); the machine then stops and the death is reported: name, signal or traceback, and
the locks it held. `launch` is what `vmbus-emu run` and the tests use.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import msgpack

from emu import cpuid
from emu.control import ActorKind, ActorState, Ready, is_ending, is_over, start_time_of
from emu.counters import Counters
from emu.errors import DeadlinePassed, MissingPrerequisite, NameTaken, UserError, VmbusError
from emu.fault_plan import FaultPlan, PlannedFault
from emu.faults import FaultKind
from emu.faults import parse as parse_fault
from emu.ipc.segments import machines, too_full, unlink_objects
from emu.layout import MachineState
from emu.limits import check_limits
from emu.machine import ACTOR_WAKEUPS, Machine
from emu.mirror import Mirror
from emu.plugin import Plugins
from emu.scenario import MachineSpec, Scenario
from emu.task_board import Program, TaskBoard, TaskRow, TaskState
from emu.tracing import TRACE_BYTES
from emu.vmexit import HostBell
from emu.wire.device_classes import BY_NAME
from emu.wire.messages import ChannelFlags
from guestproc.kernel.layout import boot_pages, compute
from guestproc.kernel.pages import PAGE_SIZE
from guestproc.kernel.report import held_locks
from guestproc.vcpu import RESCHEDULE_VECTOR, Peers
from tools.output import say
from tools.standstill import Standstill
from tools.zygote_start import Link, start_zygote

BOOT_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 5.0
SHUTDOWN_TIMEOUT_S: Final = 60.0
TOLD_TIMEOUT_S: Final = 1.0
"""Much longer than the host takes to write its mirror, which is a few milliseconds."""
DEAF_S: Final = 2.0
"""A zygote that has nothing to do but to tell who ended takes milliseconds."""
TOGETHER_S: Final = 0.005
"""Who dies so soon behind another one is named with it: somebody killed both, or they met the same thing."""
LOG_LINES: Final = 500
BY_HAND_LOOK_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Death:
    """A process that ended unasked: who, how (wait status), its traceback if it wrote one, locks it held."""

    name: str
    pid: int
    status: int
    traceback: str = ""
    held: tuple[str, ...] = ()

    @property
    def how(self) -> str:
        """`killed by SIGKILL` or `exit status 4`."""
        if os.WIFSIGNALED(self.status):
            number = os.WTERMSIG(self.status)
            with contextlib.suppress(ValueError):
                return f"killed by {signal.Signals(number).name}"
            return f"killed by signal {number}"
        return f"exit status {os.WEXITSTATUS(self.status)}"

    def report(self) -> str:
        """A line for the terminal, with the traceback behind it if there is one."""
        holding = f", holding {', '.join(self.held)}" if self.held else ", holding no lock"
        line = f"{self.name} (pid {self.pid}) died: {self.how}{holding}"
        return f"{line}\n{self.traceback.rstrip()}" if self.traceback else line


class MachineDied(VmbusError):
    """Processes of the machine died unasked; `deaths` says which, the first one first."""

    def __init__(self, deaths: list[Death]) -> None:
        super().__init__("\n".join(death.report() for death in deaths))
        self.deaths = deaths
        self.crash_record: Path | None = None
        self.flight: Path | None = None
        self.finding: Path | None = None

    def __str__(self) -> str:
        record = f"\ncrash record: {self.crash_record}" if self.crash_record is not None else ""
        flight = f"\nflight recording: {self.flight}" if self.flight is not None else ""
        return f"{super().__str__()}{flight}{record}"


@dataclass(slots=True)
class Inner:
    """One process forked for this machine."""

    name: str
    pid: int
    exited: bool = False
    traceback: str = ""


@dataclass(slots=True)
class RunningMachine:
    """A launched machine; a context manager that stops it and removes every trace of it."""

    name: str
    scenario: Scenario
    machine: Machine
    link: Link
    launched_at: float
    inner: dict[str, Inner] = field(default_factory=dict)
    deaths: list[Death] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    """The newest lines that processes said, each with who said it; also in `control`, for `inspect log`."""
    _said: int = 0
    """How many lines were ever said."""
    _early: dict[str, str] = field(default_factory=dict)
    """Tracebacks of processes of which the zygote has not yet told that it has forked them."""
    peers: Peers | None = None
    on_pump: Callable[[], object] | None = None
    """Called at each look at the zygote: a recording is drained there, or tells that its file cannot be written."""
    closed: bool = False
    expected_deaths: set[int] = field(default_factory=set)
    """Pids of processes that are being killed on purpose: no deaths to report."""
    by_hand: frozenset[str] = frozenset()
    """Processes that somebody starts by hand (`python -m guestproc …`), or has started."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What its configuration says beside the scenario."""
    _stopping: bool = False
    _counters: Counters | None = None
    """The launcher's own: what it requested through `peers`."""
    _by_hand_looked_at: float = 0.0
    _zygote_gone: bool = False
    _sweeper: int = -1
    """A pidfd of the sweeper: nobody else ends it where the zygote is gone."""
    _lacking: MissingPrerequisite | None = None

    @property
    def faults(self) -> FaultPlan:
        """The machine's fault plan: what is to go wrong, changed while it runs, and what did."""
        return FaultPlan(self.machine.control)

    def turn_on(self, text: str, *, source: str = "fault") -> PlannedFault:
        """Turn a fault on while the machine runs; UserError for one that cannot be meant, or that it was not made for.

        Host and guest see it at their next look. Faults of packets want a machine launched with `faults=True`.
        """
        fault = parse_fault(text, source=source, classes=self.scenario.plugins.classes)
        if fault.spec.packets and not self.machine.config["faults"]:
            raise UserError(
                f"{source}: {text}: this machine was not made for faults of packets; launch it with faults=True"
            )
        planned = self.faults.add(fault)
        self._let_look()
        return planned

    def turn_off(self, planned: PlannedFault) -> None:
        """Turn a fault off: what it held back goes on, what hangs is let go. One that is off already stays so."""
        self.faults.off(planned)
        self._let_look()

    def let_go(self) -> None:
        """Turn off what lasts until somebody does: a guest that waits for it shuts down late, if at all."""
        for planned in self.faults.rows():
            lasting = planned.fault.spec.kind in (FaultKind.REPLY_HOLD, FaultKind.VSP_STALL)
            if planned.on and lasting and planned.fault.until_off:
                self.turn_off(planned)

    def _let_look(self) -> None:
        """Wake the host, and the threads that may hang in something that the plan decides; for nothing is legal."""
        HostBell(self.machine.doorbells.view, self.machine.wakeup("host")).wake()
        for number in range(ACTOR_WAKEUPS):
            self.machine.wakeup(f"actor.{number}").post()

    # -- watching -----------------------------------------------------------------------------------

    def pump(self, timeout_s: float) -> bool:
        """Take what the zygote and its children say, waiting at most `timeout_s`; True if there was any.

        Raises MachineDied when a process ended unasked, MissingPrerequisite when one could not be started.
        """
        if self.on_pump is not None:
            self.on_pump()
        heard = self._listen(timeout_s)
        if self.by_hand and not self._stopping:
            self._look_after_by_hand()
        if self._stopping:
            return heard
        if self.deaths and self._lacking is None:
            self._hear_who_else_died()
        # First, as whoever lacks something ends as well.
        if self._lacking is not None:
            raise self._lacking
        if self.deaths:
            raise MachineDied(self.deaths)
        return heard

    def _listen(self, timeout_s: float) -> bool:
        """Take what there is to hear, waiting for the first word; whether there was any."""
        heard, said = False, self._said
        while self._readable(0.0 if heard else timeout_s):
            heard = True
            try:
                data = self.link.socket.recv(65_536)
            except ConnectionError:
                data = b""
            if not data:
                self._lost_zygote()
                break
            self._hear(*msgpack.unpackb(data))
        if self._said != said:
            self.machine.control.store_log(self.log)
        return heard

    def _hear_who_else_died(self) -> None:
        """Behind a death: wait for the word of everybody whose end has begun by now, or does in a moment."""
        together = time.monotonic() + TOGETHER_S
        end = together + TOLD_TIMEOUT_S
        while not self._zygote_gone and (now := time.monotonic()) < end:
            ending = [name for name in self._alive() if self.inner[name].traceback or is_ending(self.inner[name].pid)]
            if not ending and now >= together:
                return
            self._listen(TOGETHER_S)

    def _readable(self, timeout_s: float) -> bool:
        poll = select.poll()
        poll.register(self.link.socket, select.POLLIN)
        return bool(poll.poll(max(0, int(timeout_s * 1000))))

    def _hear(self, verb: str, *arguments: Any) -> None:
        if verb == "forked":
            name, pid = arguments
            self.inner[name] = Inner(name, pid, traceback=self._early.pop(name, ""))
            if name == "sweeper":
                with contextlib.suppress(OSError):  # it may have died at once, which is heard next
                    self._sweeper = os.pidfd_open(pid)
        elif verb == "lacking":
            self._lacking = MissingPrerequisite(*arguments)
        elif verb == "crashed":
            name, text = arguments
            if name in self.inner:
                self.inner[name].traceback = text
            else:
                self._early[name] = text
        elif verb == "exited":
            self._exited(*arguments)
        elif verb == "log":
            self._said += 1
            self.log.append(f"{arguments[0]}: {arguments[1]}")
            del self.log[:-LOG_LINES]

    def _exited(self, name: str, pid: int, status: int) -> None:
        inner = self.inner.get(name)
        if inner is None or inner.pid != pid:
            return
        inner.exited = True
        held = self._mark_dead(pid, status)
        if not self._stopping and pid not in self.expected_deaths:
            self.deaths.append(Death(name, pid, status, inner.traceback, held))

    def _mark_dead(self, pid: int, status: int) -> tuple[str, ...]:
        """Write the process and its threads off in the process table; the locks they held, by name."""
        numbers = []
        for row in list(self.machine.control.rows()):
            if row.pid == pid and row.state == ActorState.ALIVE:
                self.machine.control.set_dead(row.slot, status)
                numbers.append(row.number)
        if self._stopping or self.machine.config["no_guest"]:
            return ()  # what lies in the RAM of somebody else's guest are no locks of ours
        return tuple(held_locks(self.machine.ram.apart, numbers))

    def _look_after_by_hand(self) -> None:
        """Processes that are not the zygote's children are looked at twice a second."""
        if time.monotonic() - self._by_hand_looked_at < BY_HAND_LOOK_S:
            return
        self._by_hand_looked_at = time.monotonic()
        ours = {inner.pid for inner in self.inner.values()}
        for row in list(self.machine.control.rows()):
            inner = row.kind in (ActorKind.HYPERVISOR, ActorKind.VCPU, ActorKind.WORKQUEUE)
            if not inner or row.state != ActorState.ALIVE or row.pid in ours:
                continue
            if start_time_of(row.pid) != row.start_time:
                held = self._mark_dead(row.pid, 0)
                self.deaths.append(Death(row.name, row.pid, 0, "it was started by hand: its terminal says more", held))

    def tell_zygote(self, *message: Any) -> None:
        """An order to the zygote; MachineDied when it is gone, and with it everybody whom it has forked."""
        try:
            self.link.send(*message)
        except OSError:
            self._stopping = False
            self._lost_zygote()
            raise MachineDied(self.deaths) from None

    def _lost_zygote(self) -> None:
        if not self._zygote_gone:
            self._zygote_gone = True
            self._mark_dead(self.link.process.pid, self._zygote_status())
        if not self._stopping and all(death.name != "zygote" for death in self.deaths):
            self.deaths.append(Death("zygote", self.link.process.pid, self._zygote_status()))

    def _zygote_status(self) -> int:
        """Its wait status, once it has ended. (It is no actor of the guest's, and holds no lock.)"""
        status = self.link.process.wait(timeout=STOP_TIMEOUT_S)
        return -status if status < 0 else status << 8

    def wait_until(self, condition: Callable[[], bool], timeout_s: float, what: str, *, step_s: float = 0.05) -> None:
        """Wait for a condition while watching; DeadlinePassed when it stays false, MachineDied at a death."""
        end = time.monotonic() + timeout_s
        while not condition():
            left = end - time.monotonic()
            if left <= 0:
                raise DeadlinePassed(what, int(timeout_s * 1e9))
            self.pump(min(step_s, left))

    def wait_ready(
        self,
        stage: Ready = Ready.CHANNELS_OPEN,
        timeout_s: float = BOOT_TIMEOUT_S,
        on_look: Callable[[], object] | None = None,
    ) -> None:
        """Wait until the machine has come as far as `stage`, calling `on_look` at each look.

        A boot that stands still says for what it waits (`tools.standstill`), and so does its DeadlinePassed; it is a
        MissingPrerequisite where there is no memory left.
        """
        standstill = Standstill(self.machine, timeout_s)

        def come() -> bool:
            if not self.by_hand:  # who starts its processes himself knows
                standstill.look()
            if on_look is not None:
                on_look()
            return self.machine.control.ready >= stage

        try:
            self.wait_until(come, timeout_s, f"machine {self.name} to reach {stage.name}")
        except DeadlinePassed as late:
            if full := too_full(f"machine {self.name} did not reach {stage.name}"):
                raise full from None
            late.args = (f"{late}; {standstill.awaited()}",)
            raise

    def watch(self, duration_s: float | None = None) -> None:
        """Watch for that long, or until something ends it (a death, an interrupt)."""
        end = None if duration_s is None else time.monotonic() + duration_s
        while end is None or time.monotonic() < end:
            # What happens is heard at once. But a recording has to be taken away before its rings are full, and
            # nobody tells of processes that were started by hand.
            turn_s = 0.05 if self.on_pump is not None else 0.25 if self.by_hand else 5.0
            self.pump(turn_s if end is None else max(0.0, min(turn_s, end - time.monotonic())))

    # -- starting and stopping ----------------------------------------------------------------------

    def start(self, name: str, kind: str, number: int = 0) -> None:
        """Fork one inner process and wait until the zygote has said its pid."""
        self.start_all({name: (kind, number)}, STOP_TIMEOUT_S)

    def start_all(self, names: dict[str, tuple[str, int]], timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """Fork inner processes (name: kind and number), and wait until the zygote has said all their pids."""
        self.tell_zygote("fork", [(name, kind, number) for name, (kind, number) in names.items()])

        def all_told() -> bool:
            return names.keys() <= self.inner.keys()

        try:
            self.wait_until(all_told, timeout_s, f"the zygote to fork {', '.join(names)}")
        except MachineDied:
            # A guest that its host refuses may end while further processors are still made: they are forked all the
            # same, and its end is told to whoever waits next.
            end = time.monotonic() + timeout_s
            while not (all_told() or self._zygote_gone) and time.monotonic() < end:
                self._listen(TOGETHER_S)
            if not all_told():
                raise
        for name in names:  # from here on in the order in which they were asked for
            self.inner[name] = self.inner.pop(name)

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to an inner process (for tests of death)."""
        os.kill(self.inner[name].pid, number)

    def shut_down_guest(self, timeout_s: float = SHUTDOWN_TIMEOUT_S) -> bool:
        """Ask the guest to remove its devices and unload; False when it did not in time, or never was whole."""
        control = self.machine.control
        if control.ready < Ready.HOST_RUNS or self.deaths or self._awaited():
            return False
        control.request_shutdown()
        self.nudge(0)
        with contextlib.suppress(DeadlinePassed):
            self.wait_until(lambda: control.shutdown_done, timeout_s, "the guest to unload")
        return control.shutdown_done

    def leaked(self) -> int:
        """Records, pages and GPADLs that a guest has not given back; call it when that guest has unloaded.

        The host's mirror is a few milliseconds late: one that still shows GPADLs is looked at again for a while.
        """
        mirror = Mirror(self.machine.control)
        with contextlib.suppress(DeadlinePassed):
            self.wait_until(lambda: not mirror.head().gpadls, TOLD_TIMEOUT_S, "the host to tell", step_s=0.002)
        return self.machine.control.leaked + mirror.head().gpadls

    def _awaited(self) -> frozenset[str]:
        """Processes that somebody was to start by hand and has not: a guest that lacks one does nothing."""
        return self.by_hand - {row.name for row in self.machine.control.rows()}

    def order(self, program: Program, cpu: int, **parameters: Any) -> int:
        """Order a guest task on a CPU and wake it; the row's index on the task board (`TaskBoard.order`)."""
        index = TaskBoard(self.machine.control).order(program, cpu, **parameters)
        self.nudge(cpu)
        return index

    def wait_tasks(self, rows: list[int], timeout_s: float) -> list[TaskRow]:
        """Wait until these guest tasks have ended; their rows."""
        board = TaskBoard(self.machine.control)

        def ended() -> bool:
            return all(board.row(index).state in (TaskState.DONE, TaskState.FAILED) for index in rows)

        self.wait_until(ended, timeout_s, "the guest tasks to end", step_s=0.01)
        return [board.row(index) for index in rows]

    def take_tasks(self, rows: list[int], timeout_s: float) -> list[TaskRow]:
        """As `wait_tasks`, and their rows are free for others afterwards: a bench orders more than there are rows."""
        tasks = self.wait_tasks(rows, timeout_s)
        board = TaskBoard(self.machine.control)
        for index in rows:
            board.free(index)
        return tasks

    def nudge(self, cpu: int) -> None:
        """Let a CPU look at the harness's words now."""
        if self.peers is None:
            launcher = next(row for row in self.machine.control.rows() if row.kind == ActorKind.LAUNCHER)
            self._counters = self.machine.control.counters(launcher.slot)
            self.peers = Peers(self.machine, self._counters)
        self.peers.request(cpu, RESCHEDULE_VECTOR)
        if self._counters is not None:
            # At once: it does not block as a processor does, which publishes its counters then.
            self._counters.flush()

    def stop(self) -> None:
        """Stop all processes, deadline and kill included; objects stay until `close`."""
        self._stopping = True
        if self.machine.state != MachineState.STOPPING:
            self.machine.set_state(MachineState.STOPPING)
        # State first, tokens second: whoever wakes sees the state.
        self.machine.wake_everybody()
        if not (late := self._wait_for_ends()):
            return
        if not self._zygote_gone:  # otherwise they are being killed already, as its children
            say(f"vmbus-emu: killed what did not end within {STOP_TIMEOUT_S:g} s: {', '.join(late)}")
        for name in late:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.inner[name].pid, signal.SIGKILL)
        self._wait_for_ends()

    def _wait_for_ends(self) -> list[str]:
        """Wait until the inner processes have ended, with a deadline; the names of those that have not.

        Who has ended without a word of the zygote's is not waited for long: then it is the zygote that does not answer.
        """
        end = time.monotonic() + STOP_TIMEOUT_S
        silent_since: float | None = None
        while True:
            late = [name for name in self._alive() if not is_over(self.inner[name].pid)]
            now = time.monotonic()
            if not self._alive() or self._zygote_gone or (late and now >= end):
                return late
            if late:
                silent_since = None
            elif silent_since is None:
                silent_since = now
            elif now >= silent_since + DEAF_S:
                self._kill_zygote(DEAF_S)
                continue
            if self.pump(0.2):
                silent_since = None

    def _kill_zygote(self, timeout_s: float) -> None:
        """It did not answer for so long; what it did not tell is that its children have ended."""
        self.link.process.kill()
        self._lost_zygote()
        say(f"vmbus-emu: killed the zygote (pid {self.link.process.pid}), which did not answer within {timeout_s:g} s")
        for name in self._alive():
            self.inner[name].exited = True
            self._mark_dead(self.inner[name].pid, 0)

    def power_cycle(self, scenario: Scenario | None = None) -> None:
        """Kill what runs in the machine, forget everything it held, and boot it again (see `wait_ready`).

        For machines whose processes may all be killed: nothing is saved, nobody is asked. A death before that is over.
        `scenario`: with what it says from now on; processors and memory are those that there are.
        """
        self._stopping = True
        for name in self._alive():
            self.tell_zygote("kill", name)
        self.wait_until(
            lambda: self._zygote_gone or not self._alive(), STOP_TIMEOUT_S, "the machine's processes to end"
        )
        self._stopping = False
        self.deaths.clear()
        self._early.clear()
        self.log.clear()
        self.peers = None
        self.inner = {name: inner for name, inner in self.inner.items() if name == "sweeper"}
        if scenario is not None:
            self._configure(scenario)
        self.machine.wipe()
        _plan_faults(self.machine, self.scenario)
        self.machine.set_state(MachineState.RUNNING)
        _fork_all(self, no_guest=self.machine.config["no_guest"])

    def _configure(self, scenario: Scenario) -> None:
        before = self.scenario.machine
        assert _made_alike(scenario.machine, before), "another machine"
        self.scenario = scenario
        self.machine.control.store_config(config_of(scenario, **self.extra))
        self.machine.read_config()
        # Before any fork: the zygote's children have the configuration that it has.
        self.tell_zygote("configured")

    def _alive(self) -> list[str]:
        return [inner.name for inner in self.inner.values() if not inner.exited and inner.name != "sweeper"]

    def close(self) -> None:
        """Stop, unlink every object, send the zygote and the sweeper away. May be called twice."""
        if self.closed:
            return
        self.closed = True
        try:
            self.stop()
        finally:
            unlink_objects(self.name)
            with contextlib.suppress(OSError):
                self.link.send("bye")
            try:
                self.link.process.wait(timeout=STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._kill_zygote(STOP_TIMEOUT_S)
            self.link.socket.close()
            self._end_sweeper()
            self.machine.close()

    def _end_sweeper(self) -> None:
        """By now it has nothing to sweep; its parent, the zygote, has ended it, or is gone itself."""
        if self._sweeper < 0:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._sweeper, signal.SIGKILL)
        poll = select.poll()
        poll.register(self._sweeper, select.POLLIN)
        poll.poll(int(STOP_TIMEOUT_S * 1000))
        os.close(self._sweeper)
        self._sweeper = -1

    def __enter__(self) -> RunningMachine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def unused_name() -> str:
    """A machine name that nobody uses now."""
    taken = set(machines())
    for attempt in range(1, 1_000):
        name = f"vm{os.getpid()}" if attempt == 1 else f"vm{os.getpid()}-{attempt}"
        if name not in taken:
            return name
    raise AssertionError("a thousand machines of this process")


def cpu_positions(scenario: Scenario) -> list[int]:
    """VP page position of each guest CPU: VP index, CPU number and page position are three things."""
    count = scenario.machine.vcpus
    shift = 0 if scenario.machine.vp_order == "identity" else 1
    return [(cpu + shift) % count for cpu in range(count)]


def config_of(scenario: Scenario, **extra: Any) -> dict[str, Any]:
    """What the processes of a machine read from `control`: the scenario and what follows from it."""
    if scenario.plugins:
        extra["plugin_facts"] = scenario.plugins.facts()
    return {
        **scenario.to_config(),
        "vp_indices": scenario.machine.vp_indices(),
        "cpu_positions": cpu_positions(scenario),
        "no_guest": False,
        "seed": 0,
        "exercise": True,
        "faults": bool(scenario.faults),
        "ram_reserved": (0, 0) if extra.get("no_guest") else ring_ram(scenario),
        **extra,
    }


def ring_ram(scenario: Scenario) -> tuple[int, int]:
    """GPA and length of the RAM out of which our guest takes the rings of a scenario's devices.

    It has memory from the launch on: a /dev/shm that is too small for them is said before anything runs, and no device
    waits while the pages of its rings are made (40 us for two of 64 KiB). Others are made when they are needed, also
    those behind the last power of two of a RAM that is none. What a plugin's driver asks for is only known when it
    does: it counts as what the scenario says.
    """
    machine = scenario.machine
    scattered = machine.ring_memory == "scattered"
    blocks: Counter[int] = Counter()
    for spec in scenario.device_specs:
        if not has_driver(spec.class_name, scenario.plugins):
            continue
        channels = spec.channels(machine.vcpus)
        blocks[spec.ring_block(scattered=scattered)] += channels
        if scattered:
            blocks[spec.ring_list_block()] += channels
    if not blocks:
        return 0, 0
    # Behind the pages that are taken at boot. A block is aligned to its size, and the allocator splits a larger one
    # only where no smaller one is free: whatever the order, they reach no farther than those of rising sizes do. The
    # lists of scattered pages are blocks among them: two pages for one may be what splits a block of 2,048.
    boot = compute(machine.ram_bytes, machine.vcpus).first_free_page + boot_pages(machine.vcpus)
    begin = _aligned(boot * PAGE_SIZE, min(blocks))
    end = begin
    for block, count in sorted(blocks.items()):
        end = _aligned(end, block) + count * block
    return begin, max(0, min(end, machine.ram_bytes) - begin)


def has_driver(class_name: str, plugins: Plugins) -> bool:
    """Whether a driver of our guest matches devices of this class at boot.

    Ours take every class that we know but sockets, which nobody takes, nor does a plugin's driver. A test compares
    this with their tables: to import them costs 12 ms, which would be the launch's.
    """
    own = plugins.classes.get(class_name)
    kind = BY_NAME[class_name] if own is None else own
    if kind.chn_flags & ChannelFlags.TLNPI_PROVIDER_OFFER:
        return False
    return own is None or any(kind.guid.bytes_le in one.driver.id_table for one in plugins.drivers)


def _aligned(gpa: int, size: int) -> int:
    return -(-gpa // size) * size


def _in_use(name: str) -> UserError:
    # Here, as it is seldom wanted: what is imported at the top holds up the boot.
    from tools.machines import Life, find_machine, machine_names

    if name not in machine_names():
        return UserError(f"machine name {name} is in use by another user; choose another --name")
    if find_machine(name).life is Life.DEAD:
        return UserError(f"machine name {name} is taken by what a dead machine left; `vmbus-emu clean` removes that")
    return UserError(f"machine name {name} is in use; choose another --name, or `vmbus-emu stop --machine {name}`")


def launch(
    scenario: Scenario,
    *,
    name: str | None = None,
    record: bool = False,
    record_bytes: bool = False,
    no_guest: bool = False,
    without: frozenset[str] = frozenset(),
    **extra: Any,
) -> RunningMachine:
    """Make a machine and start its processes; returns while it boots (see `RunningMachine.wait_ready`).

    `without` names processes that will be started by hand; `extra` goes into the machine's configuration: with
    `faults=True` one may turn on faults of packets and interrupts while it runs, also if the scenario has none.
    Raises UserError for a name in use, MissingPrerequisite when shared memory is not to be had; nothing is left
    behind then.
    """
    launched_at = time.monotonic()
    name = name or scenario.machine.name or unused_name()
    if name in machines():
        raise _in_use(name)
    names = process_names(scenario.machine.vcpus, no_guest=no_guest)
    unknown = without - names.keys()
    if unknown:
        raise UserError(f"--without: no process is called {min(unknown)}; there are {', '.join(names)}")
    check_limits(scenario.machine.ram_bytes, TRACE_BYTES, scenario.machine.vcpus)
    extra.update(no_guest=no_guest, by_hand=bool(without))
    config = config_of(scenario, **extra)
    link = start_zygote()
    running: RunningMachine | None = None
    try:
        # Before there is anything of it: whoever kills us from here on leaves the rest to the zygote.
        with contextlib.suppress(OSError):  # that has died already, which `_start_processes` will say
            link.send("making", name)
        machine = Machine.create(
            name,
            config,
            ram_bytes=scenario.machine.ram_bytes,
            vp_indices=scenario.machine.vp_indices(),
            cpuid=cpuid.leaves(deprecate_auto_eoi=scenario.machine.deprecate_auto_eoi),
        )
        running = RunningMachine(name, scenario, machine, link, launched_at, by_hand=without, extra=extra)
        if record:
            machine.control.set_recording(with_bytes=record_bytes)
        _plan_faults(machine, scenario)
        machine.control.enlist(ActorKind.LAUNCHER, "launcher")
        machine.control.enlist(ActorKind.ZYGOTE, "zygote", pid=link.process.pid)
        _start_processes(running, no_guest=no_guest)
    except NameTaken as taken:
        # By somebody who launched at the same moment: what has this name is his, and nothing of it is unlinked.
        link.discard()
        raise _in_use(name) if name in machines() else taken from None
    except BaseException:
        if running is not None:
            running.close()
        else:
            unlink_objects(name)
            link.discard()
        raise
    return running


def _plan_faults(machine: Machine, scenario: Scenario) -> None:
    """What a scenario wants to go wrong, before any process looks."""
    plan = FaultPlan(machine.control)
    for fault in scenario.faults:
        plan.add(fault)


def _start_processes(running: RunningMachine, *, no_guest: bool) -> None:
    if not running.pump(BOOT_TIMEOUT_S):
        raise MissingPrerequisite("the zygote did not start within 60 s; is this computer overloaded?")
    running.machine.set_state(MachineState.RUNNING)
    running.tell_zygote("attach", running.name)
    running.wait_until(lambda: "sweeper" in running.inner, BOOT_TIMEOUT_S, "the zygote to fork the sweeper")
    _fork_all(running, no_guest=no_guest)


def _made_alike(one: MachineSpec, other: MachineSpec) -> bool:
    """Whether both have the same processors, memory and CPUID: what only a launch lays out."""
    return all(
        getattr(one, name) == getattr(other, name) for name in ("vcpus", "ram_bytes", "vp_order", "deprecate_auto_eoi")
    )


def _fork_all(running: RunningMachine, *, no_guest: bool) -> None:
    names = process_names(running.machine.vp_count, no_guest=no_guest)
    running.start_all({name: what for name, what in names.items() if name not in running.by_hand})


def process_names(vp_count: int, *, no_guest: bool = False) -> dict[str, tuple[str, int]]:
    """Every inner process of a machine: its name, its kind and its CPU number."""
    names: dict[str, tuple[str, int]] = {"hypervisor": ("hypervisor", 0)}
    if not no_guest:
        names.update({f"vcpu{cpu}": ("vcpu", cpu) for cpu in range(vp_count)})
        names["workqueue"] = ("workqueue", 0)
    return names


def by_hand_command(machine: str, name: str) -> str:
    """What to type to start an inner process by hand."""
    if name == "hypervisor":
        return f"python -m hostproc --machine {machine}"
    if name == "workqueue":
        return f"python -m guestproc workqueue --machine {machine}"
    return f"python -m guestproc vcpu {name.removeprefix('vcpu')} --machine {machine}"
