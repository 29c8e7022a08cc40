"""Machines whose processors exchange batches with echo devices, for the benches of scale and of recording."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from emu.errors import VmbusError
from emu.scenario import DeviceSpec
from emu.task_board import Program, TaskState
from tools.bench_machine import bench_scenario
from tools.draining import recording
from tools.launch import RunningMachine, launch

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
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="vmbus-emu-exchange-"))
            stack.enter_context(recording(running, Path(folder, "recording")))
        running.wait_ready()
        yield running
        running.shut_down_guest()


def exchanged(running: RunningMachine, seconds: float) -> Exchanged:
    """Let every processor exchange batches on all its channels for so long."""
    with tempfile.TemporaryDirectory(prefix="vmbus-emu-exchange-") as folder:
        paths = [Path(folder, str(cpu)) for cpu in range(running.scenario.machine.vcpus)]
        rows = [
            running.order(Program.EXCHANGE, cpu, wanted=int(seconds * 1e9), size=SIZE, path=str(path))
            for cpu, path in enumerate(paths)
        ]
        tasks = running.take_tasks(rows, seconds + _TIMEOUT_S)
        if any(task.state == TaskState.FAILED for task in tasks):
            raise VmbusError("an exchange of batches failed")
        moved = [array("Q", path.read_bytes()) for path in paths]
    per_packet = sum(elapsed for _, elapsed in moved) / sum(packets for packets, _ in moved)
    return Exchanged(per_packet, sum(packets * 1e9 / elapsed for packets, elapsed in moved))
