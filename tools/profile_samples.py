"""What the processes of a machine cost over time: samples of each of them, and the machine's own counters beside.

Processor time comes from the scheduler's nanoseconds (/proc/PID/schedstat), not from ticks; user and system are told
apart by the ticks. PSS and USS walk a process's page tables, so they are looked at ten times less often.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil

from emu.control import ActorKind, ActorState
from emu.errors import UserError
from emu.ipc.segments import SHM, object_name
from emu.machine import Machine

MEMORY_EVERY: Final = 10
KINDS: Final = {
    ActorKind.LAUNCHER: "launcher",
    ActorKind.ZYGOTE: "zygote",
    ActorKind.HYPERVISOR: "hypervisor",
    ActorKind.VCPU: "vcpu",
    ActorKind.WORKQUEUE: "workqueue",
    ActorKind.FOREIGN: "guest",
}
"""Rows of the process table that are processes; the others are their threads."""


@dataclass(slots=True)
class ThreadCost:
    """One thread: its name, and its processor time in seconds as the kernel's ticks have it."""

    name: str
    user_s: float = 0.0
    system_s: float = 0.0


@dataclass(slots=True)
class ProcessCost:
    """One process while it was watched: memory (bytes) is the newest, everything else what was added meanwhile."""

    name: str
    kind: str
    pid: int
    cpu_ns: int = 0
    user_s: float = 0.0
    system_s: float = 0.0
    rss: int = 0
    pss: int = 0
    uss: int = 0
    voluntary: int = 0
    involuntary: int = 0
    minor_faults: int = 0
    major_faults: int = 0
    cores: dict[int, int] = field(default_factory=dict)
    """How many samples found it on each core: its first thread, the only one but in the workqueue."""
    threads: dict[int, ThreadCost] = field(default_factory=dict)
    timeline: list[tuple[float, float, float]] = field(default_factory=list)
    """From, to (seconds since the beginning), and the share of a core in between."""
    machine: int = 1
    """Which of the machines that were watched it is of, from 1; a launcher is of its first one."""


class Watched:
    """One process being watched: where its counts stood when that began (`from_birth`: at nothing)."""

    def __init__(self, name: str, kind: str, pid: int, now_s: float, *, from_birth: bool) -> None:
        self.cost = ProcessCost(name, kind, pid)
        self._process = psutil.Process(pid)
        self._of_threads: dict[str, tuple[int, int, int]] = {}
        counts = self._counts()
        self._first = tuple(0.0 for _ in counts) if from_birth else counts
        self._threads: dict[int, tuple[float, float]] = {}
        if not from_birth:
            self._threads = {one.id: (one.user_time, one.system_time) for one in self._process.threads()}
        self._cpu_ns, self._at_s = counts[0], now_s
        if from_birth:
            # What it did before this first look belongs to the time since its birth, or the picture would lack it.
            self._cpu_ns, self._at_s = 0.0, min(now_s, max(0.0, now_s - (time.time() - self._process.create_time())))
        self._samples = 0

    def sample(self, now_s: float) -> None:
        """Look once; psutil.Error or OSError when the process has gone."""
        counts = self._counts()
        cost = self.cost
        elapsed_s = now_s - self._at_s
        if elapsed_s > 0:
            cost.timeline.append((self._at_s, now_s, (counts[0] - self._cpu_ns) / 1e9 / elapsed_s))
        self._cpu_ns, self._at_s = counts[0], now_s
        differences = [now - then for now, then in zip(counts, self._first, strict=True)]
        cost.cpu_ns = int(differences[0])
        cost.user_s, cost.system_s = differences[1:3]
        cost.voluntary, cost.involuntary, cost.minor_faults, cost.major_faults = (int(one) for one in differences[3:])
        core = self._process.cpu_num()
        cost.cores[core] = cost.cores.get(core, 0) + 1
        for one in self._process.threads():
            user, system = self._threads.get(one.id, (0.0, 0.0))
            thread = cost.threads.setdefault(one.id, ThreadCost(_thread_name(cost.pid, one.id)))
            thread.user_s, thread.system_s = one.user_time - user, one.system_time - system
        if self._samples % MEMORY_EVERY == 0:
            memory = self._process.memory_full_info()
            if memory.uss:  # one that is just ending has none left
                cost.pss, cost.uss = int(memory.pss), int(memory.uss)
                # Read a moment before the others, of a process that may grow.
                cost.rss = max(int(memory.rss), cost.pss)
        self._samples += 1

    def _counts(self) -> tuple[float, ...]:
        """ns run, user s, system s, switches of both kinds, faults of both kinds; all since the process began."""
        pid = self._process.pid
        # A thread that has ended takes its figure with it, and what it cost was spent all the same.
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                run_ns = int((task / "schedstat").read_text().split()[0])
                self._of_threads[task.name] = run_ns, *_switches((task / "status").read_text())
        times = self._process.cpu_times()
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        run_ns, voluntary, involuntary = (sum(one[which] for one in self._of_threads.values()) for which in range(3))
        return (run_ns, times.user, times.system, voluntary, involuntary, int(fields[7]), int(fields[9]))


class MachineWatch:
    """All processes of one machine, and its counters, from the first look (or its beginning) to the newest look.

    `launchers` (by pid) are shared by the watches of one command: it launches one machine after the other, and what it
    cost is told once.
    """

    def __init__(
        self,
        machine: Machine,
        began_s: float,
        launchers: dict[int, Watched],
        number: int = 1,
        *,
        from_birth: bool = False,
    ) -> None:
        self.machine = machine
        self.number = number
        self._launchers = launchers
        self._began_s = began_s
        self._from_birth = from_birth
        self._ended = False
        self._processes: dict[tuple[str, int], Watched] = {}
        self._last = machine.control.counter_totals()
        self._first = dict.fromkeys(self._last, 0) if from_birth else self._last

    def sample(self) -> None:
        """Look at every process that is there; those that have gone keep what they had."""
        if self._ended:
            return
        now_s = time.monotonic() - self._began_s
        for row in self.machine.control.rows():
            if row.state != ActorState.ALIVE or row.kind not in KINDS:
                continue
            with contextlib.suppress(psutil.Error, OSError):
                watched = self._launchers.get(row.pid) or self._processes.get((row.name, row.pid))
                if watched is None:
                    watched = Watched(row.name, KINDS[row.kind], row.pid, now_s, from_birth=self._from_birth)
                    watched.cost.machine = self.number
                    self._processes[row.name, row.pid] = watched
                    if row.kind == ActorKind.LAUNCHER:
                        self._launchers[row.pid] = watched
                watched.sample(now_s)
        self._last = self.machine.control.counter_totals()

    def end(self) -> None:
        """Let go of it once it has gone, which somebody may wait for; its counters say now what they said last."""
        if not self._ended:
            self._ended = True
            self._last = self.machine.control.counter_totals()
            self.machine.close()

    @property
    def counters(self) -> dict[str, int]:
        """What the machine counted meanwhile."""
        return {name: self._last[name] - self._first[name] for name in self._last}

    @property
    def processes(self) -> list[ProcessCost]:
        """What each process cost."""
        return [one.cost for one in self._processes.values()]


@dataclass(frozen=True, slots=True)
class Profile:
    """What was measured, of all machines that were watched."""

    seconds: float
    processes: list[ProcessCost]
    counters: dict[str, int]

    @property
    def machine_ns(self) -> int:
        """Processor time of host and guest together, without launcher and zygote."""
        return sum(one.cpu_ns for one in self.processes if one.kind not in ("launcher", "zygote"))

    def label(self, one: ProcessCost) -> str:
        """What a process is called among all of them: with the number of its machine, if there were several."""
        several = any(other.machine != one.machine for other in self.processes) and one.kind != "launcher"
        return f"{one.name} #{one.machine}" if several else one.name

    def per(self, counter: str) -> float | None:
        """Processor time of the machine for each of what a counter counts, in ns; None when there was none."""
        count = self.counters.get(counter, 0)
        return self.machine_ns / count if count else None


def merged(seconds: float, watches: Iterable[MachineWatch]) -> Profile:
    """Put several machines' figures together: a command may run one after the other."""
    processes: list[ProcessCost] = []
    counters: dict[str, int] = {}
    for watch in watches:
        processes += watch.processes
        for name, count in watch.counters.items():
            counters[name] = counters.get(name, 0) + count
    return Profile(seconds, processes, counters)


def attach_machine(name: str) -> Machine | None:
    """The machine, None while it is being made, or when it has gone."""
    try:
        return Machine.attach(name)
    except UserError:
        return None


def identity_of(name: str) -> tuple[str, int]:
    """Tells a machine from a later one of the same name; 0 when there is none."""
    try:
        return name, (SHM / object_name(name, "control").lstrip("/")).stat().st_ino
    except OSError:
        return name, 0


def _switches(status: str) -> tuple[int, int]:
    """Context switches of one thread, voluntary and not; a process's `status` has those of its first thread alone."""
    voluntary, involuntary = (line.split()[1] for line in status.splitlines() if "voluntary_ctxt_switches:" in line)
    return int(voluntary), int(involuntary)


def _thread_name(pid: int, thread: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/task/{thread}/comm").read_text().strip()
    return str(thread)
