"""Inner processes started by hand on a machine's name: what their `__main__` modules share."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import Any

from emu.errors import UserError, VmbusError
from emu.machine import KICK_SIGNAL, Machine


def attach_and_run(machine_name: str, body: Callable[[Machine, Callable[..., None]], int]) -> int:
    """Attach to a machine and run an inner process in this one; what it reports goes to stderr."""
    signal.signal(KICK_SIGNAL, signal.SIG_IGN)
    sys.setswitchinterval(0.0005)
    try:
        machine = Machine.attach(machine_name)
    except VmbusError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    try:
        return body(machine, _report)
    except UserError as error:  # a plugin that is not what it was
        sys.stderr.write(f"{error}\n")
        return 2


def _report(*message: Any) -> None:
    """What the launcher would have been told."""
    sys.stderr.write(" ".join(map(str, message)) + "\n")
