"""The part of `bench idle` that is not quite idle: many channels that lie open, and a doorbell each 4 ms.

A doorbell comes from the launcher, which is no part of the machine: what is counted is what the machine's own
processes spend on it.
"""

from __future__ import annotations

import time
from typing import Final

from emu.scenario import parse_device
from tools.anchors import Anchor
from tools.bench_idle import run_ns
from tools.bench_machine import bench_scenario
from tools.launch import RunningMachine, launch

VCPUS: Final = 16
CHANNELS: Final = 64
EVERY_S: Final = 0.004
OPEN_GOAL: Final = 0.5
PERIODIC_GOAL: Final = 1.0
SETTLE_S: Final = 6.0
"""Until the watchdogs have backed off."""
WINDOW_S: Final = 4.0


def measure(runs: int, *, short: bool = False) -> list[Anchor]:
    """CPU of all processes of a machine of 16 vCPUs with 64 open channels: left alone, and rung each 4 ms."""
    window_s = 0.2 if short else WINDOW_S
    idle: list[float] = []
    rung: list[float] = []
    scenario = bench_scenario(vcpus=VCPUS, devices=[parse_device(f"echo:{CHANNELS}")])
    with launch(scenario) as running:
        running.wait_ready()
        running.watch(window_s if short else SETTLE_S)
        for _ in range(runs):
            idle.append(_percent(running, window_s, ring=False))
            rung.append(_percent(running, window_s, ring=True))
        running.shut_down_guest()
    name = f"idle: {VCPUS} vCPUs, {CHANNELS} open channels"
    return [
        Anchor.of(name, idle, "% of a core", better="lower", goal=OPEN_GOAL, floor=OPEN_GOAL),
        Anchor.of(
            f"{name}, a doorbell each 4 ms",
            rung,
            "% of a core",
            better="lower",
            goal=PERIODIC_GOAL,
            floor=PERIODIC_GOAL,
        ),
    ]


def _percent(running: RunningMachine, window_s: float, *, ring: bool) -> float:
    """Processor time of the machine's inner processes over a window, in % of one core."""
    pids = [inner.pid for inner in running.inner.values()]
    before, began = sum(map(run_ns, pids)), time.monotonic()
    if not ring:
        running.watch(window_s)
    else:
        due = began
        while (due := due + EVERY_S) < began + window_s:
            running.pump(max(0.0, due - time.monotonic()))
            # A pump that heard something, or is rounded down, is early: the doorbell is not.
            while (left := due - time.monotonic()) > 0:
                time.sleep(left)
            running.nudge(1)
    elapsed_ns = (time.monotonic() - began) * 1e9
    return 100.0 * (sum(map(run_ns, pids)) - before) / elapsed_ns
