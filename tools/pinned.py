"""Processes of a machine tied to cores of this computer, so that two figures are of the same placement.

An unpinned pair of processes is bistable: on one core they hand over in a few microseconds, on two they wake a halted
core each time, and the scheduler decides which it is. A comparison ties both sides down in the same way.
"""

from __future__ import annotations

import os

from emu.errors import MissingPrerequisite
from tools.launch import RunningMachine


def two_cores() -> tuple[int, int]:
    """Two cores that this process may use; MissingPrerequisite when there is one only."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise MissingPrerequisite("two ends that are compared across cores need two of them; there is one")
    return cores[0], cores[1]


def pin(running: RunningMachine, host: int, guest: int) -> None:
    """The hypervisor on one core, every vCPU on another."""
    for name, inner in running.inner.items():
        if name == "hypervisor" or name.startswith("vcpu"):
            os.sched_setaffinity(inner.pid, {host if name == "hypervisor" else guest})
