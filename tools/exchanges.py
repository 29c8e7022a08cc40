"""Machines whose processors exchange batches with echo devices, for the benches of scale and of recording."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Final

from emu.errors import VmbusError
from emu.scenario import DeviceSpec
from emu.task_board import Program, TaskState
from tools.bench_machine import bench_scenario
from tools.draining import recording
from tools.launch import RunningMachine, launch
from tools.nameless_file import nameless_file

RING_PAGES: Final = 16
"""A ring of 64 KiB, with the page of its indices."""
SIZE: Final = 64
_TIMEOUT_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Exchanged:
    """What all processors moved: `per_packet_ns` is the time of one of them, `per_second` the sum of all."""

    per_packet_ns: float
    per_second: float


@contextmanager
def exchanging_machine(
    vcpus: int, channels: int, *, poll: str | None = None, record: bool = False, races: bool = False
) -> Iterator[RunningMachine]:
    """A machine with so many echo channels in all; one that records is drained while it is watched.

    `races`: one that may run schedules, and so has sync points.
    """
    devices = [DeviceSpec("echo", count=channels, ring_pages=RING_PAGES)]
    scenario = bench_scenario(vcpus=vcpus, poll=poll, devices=devices)
    with ExitStack() as stack:
        running = stack.enter_context(launch(scenario, record=record, races=races))
        if record:
            stack.enter_context(recording(running, stack.enter_context(nameless_file())))
        running.wait_ready()
        yield running
        running.shut_down_guest()


def exchanged(running: RunningMachine, seconds: float) -> Exchanged:
    """Let every processor exchange batches on all its channels for so long."""
    with nameless_file() as path:
        rows = [
            running.order(Program.EXCHANGE, cpu, wanted=int(seconds * 1e9), size=SIZE, path=str(path))
            for cpu in range(running.scenario.machine.vcpus)
        ]
        tasks = running.take_tasks(rows, seconds + _TIMEOUT_S)
        if any(task.state == TaskState.FAILED for task in tasks):
            raise VmbusError("an exchange of batches failed")
        moved = array("Q", path.read_bytes())
    packets, elapsed = moved[::2], moved[1::2]
    per_second = sum(count * 1e9 / took for count, took in zip(packets, elapsed, strict=True))
    return Exchanged(sum(elapsed) / sum(packets), per_second)
