"""A guest that dies and is followed by another one, in the same session of the host (`guest.die`).

Its processes are killed where they are, without UNLOAD and without a word to the host, and new ones are forked. The
new guest attaches, lays RAM out anew and connects; the host finds out by that. So this is the power button of a
machine whose host goes on, and what a crash kernel does.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from typing import Final

from emu.control import ACTORS
from emu.errors import UserError
from emu.fault_plan import Faults
from emu.faults import FaultKind
from emu.ipc.segments import Segment
from emu.scenario import Scenario
from tools.launch import BOOT_TIMEOUT_S, STOP_TIMEOUT_S, RunningMachine, process_names

LOOK_S: Final = 0.02
_ROWS_OF_ONE: Final = 32
"""Rows of the process table that a guest takes beside its vCPUs, at most."""


def refuse_guest_deaths(scenario: Scenario, command: str) -> None:
    """UserError where a scenario wants its guest to die and the command cannot go on without it."""
    if any(fault.spec.kind is FaultKind.GUEST_DIE for fault in scenario.faults):
        raise UserError(f"{command}: guest.die would end what is measured; give it to `vmbus-emu run`")


class GuestDeaths:
    """When the guest of a machine is to die."""

    def __init__(self, running: RunningMachine) -> None:
        self._running = running
        self._faults = Faults(running.machine.control)

    def look(self) -> bool:
        """Let the guest die if it is due, and wait until the next one has opened its channels; whether it did."""
        control = self._running.machine.control
        if not self._faults.hit(FaultKind.GUEST_DIE, most=control.clock.now() - control.booted_ns):
            return False
        replace_guest(self._running)
        self._running.wait_ready()
        return True

    def watch(self, duration_s: float | None) -> None:
        """As `RunningMachine.watch`, with the deaths that come due meanwhile."""
        if not self._faults.on(FaultKind.GUEST_DIE):
            self._running.watch(duration_s)
            return
        clock = self._running.machine.clock
        end_ns = None if duration_s is None else clock.now() + int(duration_s * 1e9)
        while end_ns is None or clock.now() < end_ns:
            self._running.watch(LOOK_S)
            self.look()


def replace_guest(running: RunningMachine) -> None:
    """Kill the guest's processes, then start new ones; returns while the new guest boots.

    UserError when the process table has no room for another guest.
    """
    control = running.machine.control
    names = {name: what for name, what in process_names(running.machine.vp_count).items() if name != "hypervisor"}
    if sum(1 for _ in control.rows()) + len(names) + _ROWS_OF_ONE > ACTORS:
        raise UserError("guest.die: the process table has no room for one more guest; let it die less often")
    dying = {inner.pid for name, inner in running.inner.items() if name in names and not inner.exited}
    running.expected_deaths |= dying
    for pid in dying:
        os.kill(pid, signal.SIGKILL)
    running.wait_until(
        lambda: all(running.inner[name].exited for name in names), STOP_TIMEOUT_S, "the guest's processes to be gone"
    )
    control.forget_guest()
    _clear(running.machine.ram)
    for name in names:
        del running.inner[name]
    running.start_all(names)
    running.wait_until(lambda: control.guest_formatted, BOOT_TIMEOUT_S, "the next guest to begin")


def _clear(ram: Segment) -> None:
    """RAM as at power-on. Written, not given back: the host has reserved pages that it touches without asking."""
    for begin, end in list(_extents(ram)):
        ram.memory[begin:end] = bytes(end - begin)


def _extents(ram: Segment) -> Iterator[tuple[int, int]]:
    """Where RAM has memory behind it."""
    at = 0
    while at < ram.size:
        try:
            begin = os.lseek(ram.fd, at, os.SEEK_DATA)
        except OSError as error:
            assert error.errno == errno.ENXIO, error  # nothing more
            return
        at = os.lseek(ram.fd, begin, os.SEEK_HOLE)
        yield begin, at
