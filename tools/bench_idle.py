"""`bench idle`: what a machine costs that does nothing, in processor time and in private memory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

import psutil

from emu.scenario import parse_device
from tools.anchors import Anchor
from tools.bench_machine import bench_scenario
from tools.launch import RunningMachine, launch

VCPUS: Final = 8
CPU_GOAL_PERCENT: Final = 0.5
PRIVATE_GOAL_MB: Final = 2.0
PRIVATE_FLOOR_MB: Final = 4.0
SETTLE_S: Final = 1.0
WINDOW_S: Final = 4.0


def measure(runs: int, *, short: bool = False) -> list[Anchor]:
    """CPU of all processes of an idle machine with 8 vCPUs, and the private memory of a vCPU process."""
    percents: list[float] = []
    private: list[float] = []
    scenario = bench_scenario(vcpus=VCPUS, devices=[parse_device("echo:8")])
    with launch(scenario) as running:
        running.wait_ready()
        running.watch(SETTLE_S)
        for _ in range(runs):
            percents.append(cpu_percent(running, WINDOW_S / 4 if short else WINDOW_S))
        private = [uss_mb(running.inner[f"vcpu{cpu}"].pid) for cpu in range(1, VCPUS)]
        running.shut_down_guest()
    return [
        Anchor.of(
            "idle: machine of 8 vCPUs, all processes",
            percents,
            "% of a core",
            better="lower",
            goal=CPU_GOAL_PERCENT,
            floor=CPU_GOAL_PERCENT,
        ),
        Anchor.of(
            "idle: one more vCPU process, private memory",
            private,
            "MB",
            better="lower",
            goal=PRIVATE_GOAL_MB,
            floor=PRIVATE_FLOOR_MB,
        ),
    ]


def cpu_percent(running: RunningMachine, window_s: float) -> float:
    """Processor time of launcher, zygote, sweeper and inner processes over a window, in % of one core."""
    pids = [running.link.process.pid, *(inner.pid for inner in running.inner.values())]
    before, launcher = sum(map(run_ns, pids)), time.thread_time_ns()
    started = time.monotonic_ns()
    running.watch(window_s)
    elapsed = time.monotonic_ns() - started
    return 100.0 * (sum(map(run_ns, pids)) - before + time.thread_time_ns() - launcher) / elapsed


def run_ns(pid: int) -> int:
    """Nanoseconds that all threads of a process have run (/proc/PID/task/*/schedstat: finer than ticks)."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        total += int((task / "schedstat").read_text().split()[0])
    return total


def uss_mb(pid: int) -> float:
    """Memory that only this process has, in MB."""
    return float(psutil.Process(pid).memory_full_info().uss) / 1e6
