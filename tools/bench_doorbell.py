"""`bench doorbell`: from the host's signal to the first line of the guest's interrupt routine.

Real machines: a back end (`tools/bench_caller.py`) rings one channel after the other, and a program on each vCPU
(`guestproc.listen`) notes when its interrupt routine began. Hypervisor on one core, vCPUs on the other, as the two C
processes are that wake each other by semaphores in the same run; half of their round trip is one wake-up.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from typing import Final

from emu.errors import DeadlinePassed, VmbusError
from emu.scenario import DeviceSpec
from emu.task_board import Program, TaskState
from guestproc.listen import Listening
from tools.anchors import Against, Anchor
from tools.bench_machine import bench_scenario
from tools.device_list import list_devices
from tools.launch import RunningMachine, launch
from tools.nameless_file import nameless_file
from tools.pinned import pin, two_cores
from tools.sem_pair import NAME, SemPair, sem_pair
from tools.sysfs_namespace import die_with_parent

CALLER: Final = Path(__file__).parent / "bench_caller.py"
RINGS: Final = 3_000
SHORT_RINGS: Final = 60
WARM_UP: Final = 30
HOT: Final = {1: (1 / 25, 1 / 12), 4: (1 / 12, 1 / 8), 8: (1 / 5, 1 / 3)}
"""vCPUs rung in turn -> goal and floor, as shares of half the C pair's round trip."""
BUSY_GOAL: Final = 1.3
_TIMEOUT_S: Final = 60.0


def measure(runs: int, *, short: bool = False) -> list[Anchor]:
    """Hot with 1, 4 and 8 vCPUs (1 in short), and one that is busy: at a safe point, and by signal."""
    cores = two_cores()
    rings = SHORT_RINGS if short else RINGS
    pair, reason = sem_pair()
    wakeup = _Wakeup(pair, rings, cores)
    anchors: list[Anchor] = []
    for vcpus in (1,) if short else HOT:
        figures: dict[Listening, list[list[float]]] = {how: [] for how in Listening}
        bare: list[float] = []
        with called_machine(vcpus, cores) as running:
            for _ in range(runs):
                wakeup.measure()
                for how in Listening if vcpus == 1 else (Listening.HALTED,):
                    figures[how].append(ring_in_turn(running, rings, how))
                if vcpus == 1:
                    bare.append(median(bare_signals(rings, cores)))
        anchors += _hot(vcpus, figures[Listening.HALTED], wakeup.against(), reason)
        if vcpus == 1:
            anchors += _busy(figures, bare)
    return anchors


class _Wakeup:
    """Half the C pair's round trip, measured in turn with ours."""

    def __init__(self, pair: SemPair | None, rings: int, cores: tuple[int, int]) -> None:
        self._pair = pair
        self._rings = rings
        self._cores = cores
        self._runs: list[float] = []

    def measure(self) -> None:
        if self._pair is not None:
            self._runs.append(self._pair.run(self._rings, self._cores).p50_ns / 2_000)

    def against(self) -> Against:
        """The median of what was measured since the last time."""
        runs, self._runs = self._runs, []
        return Against(f"half a round trip of the {NAME}", median(runs) if runs else None)


def _hot(vcpus: int, runs: list[list[float]], against: Against, reason: str | None) -> list[Anchor]:
    goal, floor = HOT[vcpus]
    name = f"doorbell-hot-{vcpus}vcpu"
    p50, p99 = [median(run) for run in runs], [_p99(run) for run in runs]
    return [
        Anchor.of(f"{name}-p50", p50, "us", better="lower", against=against, goal=goal, floor=floor, reason=reason),
        Anchor.of(f"{name}-p99", p99, "us", better="lower", against=against, goal=1.0, reason=reason),
    ]


def _busy(figures: dict[Listening, list[list[float]]], bare: list[float]) -> list[Anchor]:
    """A vCPU that computes: with safe points against one that polls, by signal against a bare Python handler."""
    polled, at_safe_points, by_signal = ([median(run) for run in figures[how]] for how in Listening)
    against = Against("doorbell to a polling vCPU", median(polled))
    handler = Against("os.kill to a bare Python handler", median(bare))
    name = "doorbell-busy"
    return [
        Anchor.of(f"{name}-safe-point-p50", at_safe_points, "us", better="lower", against=against, goal=BUSY_GOAL),
        Anchor.of(f"{name}-signal-p50", by_signal, "us", better="lower", against=handler, goal=BUSY_GOAL),
    ]


def _p99(values: list[float]) -> float:
    return quantiles(values, n=100)[98]


# -- the machine that is rung -----------------------------------------------------------------------------


@contextmanager
def called_machine(vcpus: int, cores: tuple[int, int], poll: str = "adaptive") -> Iterator[RunningMachine]:
    """A machine with a channel for each vCPU behind the calling back end; hypervisor and vCPUs on these cores."""
    devices = [DeviceSpec("echo", "caller", count=vcpus)]
    scenario = bench_scenario(vcpus=vcpus, poll=poll, devices=devices, plugins=[CALLER])
    with launch(scenario) as running:
        running.wait_ready()
        pin(running, *cores)
        yield running
        running.shut_down_guest()


def ring_in_turn(running: RunningMachine, rings: int, how: Listening) -> list[float]:
    """Ring every vCPU so often, one after the other; microseconds from each ring to its ISR."""
    channels = {one.cpu: one.relid for device in list_devices(running.machine) for one in device.channels}
    rings += WARM_UP
    with ExitStack() as stack:
        paths = {cpu: stack.enter_context(nameless_file()) for cpu in channels}
        rows = [
            running.order(
                Program.LISTEN, cpu, relid=relid, wanted=rings, size=how, rate=len(channels), path=str(paths[cpu])
            )
            for cpu, relid in channels.items()
        ]
        tasks = running.take_tasks(rows, _TIMEOUT_S)
        if any(task.state == TaskState.FAILED for task in tasks):
            raise VmbusError("bench doorbell: a program that was to be rung failed")
        return [delay for path in paths.values() for delay in _delays(path)]


def _delays(path: Path) -> list[float]:
    pairs = array("Q", path.read_bytes())
    return [(began - rung) / 1e3 for rung, began in zip(pairs[::2], pairs[1::2], strict=True)][WARM_UP:]


# -- a bare handler ---------------------------------------------------------------------------------------


def bare_signals(count: int, cores: tuple[int, int]) -> list[float]:
    """Microseconds from `os.kill` to the first line of a handler in a process that does nothing but compute."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    target = context.Process(target=_be_interrupted, args=(theirs, cores[1], os.getpid()), daemon=True)
    before = os.sched_getaffinity(0)
    target.start()
    try:
        os.sched_setaffinity(0, {cores[0]})
        _expect(ours, b"ready")
        delays = []
        for _ in range(count + WARM_UP):
            rung = time.monotonic_ns()
            os.kill(target.pid or 0, signal.SIGRTMIN)
            delays.append((int.from_bytes(_expect(ours), "little") - rung) / 1e3)
        return delays[WARM_UP:]
    finally:
        os.sched_setaffinity(0, before)
        target.kill()
        target.join()


def _expect(ours: Connection, wanted: bytes | None = None) -> bytes:
    if not ours.poll(_TIMEOUT_S):
        raise DeadlinePassed("a bare signal handler", int(_TIMEOUT_S * 1e9))
    told = ours.recv_bytes()
    assert wanted is None or told == wanted, told
    return told


def _be_interrupted(theirs: Connection, core: int, parent: int) -> None:
    """Compute for as long as the parent lives; tell when each handler began."""
    die_with_parent(signal.SIGKILL, parent)
    os.sched_setaffinity(0, {core})
    now = time.monotonic_ns
    began = 0

    def handler(_number: int, _frame: object) -> None:
        nonlocal began
        began = now()

    signal.signal(signal.SIGRTMIN, handler)
    theirs.send_bytes(b"ready")
    total = 0
    while True:
        for number in range(1_000_000):
            if began:
                break
            total += number
        else:
            continue
        told, began = began, 0
        theirs.send_bytes(told.to_bytes(8, "little"))
