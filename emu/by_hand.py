"""Inner processes started by hand on a machine's name: what their `__main__` modules share."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import Any

from emu.assertions import keep_assertions
from emu.control import ActorState, is_over
from emu.errors import MissingPrerequisite, UserError
from emu.machine import KICK_SIGNAL, Machine


def attach_and_run(machine_name: str, name: str, body: Callable[[Machine, Callable[..., None]], int]) -> int:
    """Attach to a machine and run its inner process `name` in this one; its exit status.

    What it reports goes to stderr; so does what is the matter with the machine (status 2) or this computer (3), a line.
    """
    keep_assertions()
    signal.signal(KICK_SIGNAL, signal.SIG_IGN)
    sys.setswitchinterval(0.0005)
    try:
        machine = Machine.attach(machine_name)
        _check_wanted(machine, name)
        return body(machine, _report)
    except UserError as error:  # also a plugin that is not what it was
        sys.stderr.write(f"{error}\n")
        return 2
    except MissingPrerequisite as error:
        sys.stderr.write(f"{error}\n")
        return 3


def _check_wanted(machine: Machine, name: str) -> None:
    """UserError when the machine has no such process, or has it already: two of them would share its one state."""
    number = name.removeprefix("vcpu")
    if number != name and int(number) not in range(machine.vp_count):
        raise UserError(f"machine {machine.name} has no {name}; its CPUs are 0 to {machine.vp_count - 1}")
    for row in machine.control.rows():
        if row.name == name and row.state == ActorState.ALIVE and not is_over(row.pid):
            cure = f"`vmbus-emu run --without {name}` leaves it to you"
            raise UserError(f"machine {machine.name} has its {name} already (pid {row.pid}); {cure}")


def _report(*message: Any) -> None:
    """What the launcher would have been told."""
    sys.stderr.write(" ".join(map(str, message)) + "\n")
