"""Which machines there are: found by their names in shared memory, told alive from dead by their launcher.

A machine lives as long as the process that stands as launcher in its process table (pid and start time, so
that a reused pid fools nobody), or as a process holds its `control`: a launcher in another PID namespace that
shares /dev/shm with us, as containers may, is no pid here. A machine that is still being made, or never was
finished, has no such row: it lives while any process has one of its objects open.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

import psutil

from emu.control import ActorKind, ActorRow, Control, Ready, start_time_of
from emu.errors import UserError
from emu.ipc.segments import is_held, object_name
from emu.layout import MachineState
from emu.machine import Machine
from emu.mirror import Mirror, MirrorHead
from tools.crash_records import newest_crash

SHM: Final = Path("/dev/shm")
_PREFIX: Final = "vmbus-emu."


MACHINE_VARIABLE: Final = "VMBUS_EMU_MACHINE"


class FromVariable(str):
    """The name of a machine as `$VMBUS_EMU_MACHINE` gave it, so that a complaint names the variable."""

    __slots__ = ()


def typed(name: str | None) -> str | None:
    """The name that somebody typed behind `--machine`; None for the variable's, which whatever is typed beats."""
    return None if isinstance(name, FromVariable) else name


class Life(Enum):
    """How a machine is, as far as one can see from outside."""

    MAKING = "being made"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class FoundMachine:
    """A machine by its name, and its launcher (None when there is no process table to tell)."""

    name: str
    life: Life
    launcher: ActorRow | None = None
    vcpus: int = 0
    ready: Ready = Ready.MADE
    bus: MirrorHead | None = None

    @property
    def up_s(self) -> float | None:
        """Seconds since its launcher started; None for one that is no process here."""
        if self.launcher is None or not runs(self.launcher):
            return None
        with contextlib.suppress(psutil.Error):
            return time.time() - psutil.Process(self.launcher.pid).create_time()
        return None


def machine_names() -> list[str]:
    """Names of all machines of which this user has any object, sorted."""
    names = set()
    for entry in SHM.glob("*vmbus-emu.*"):
        part = entry.name.removeprefix("sem.")
        with contextlib.suppress(FileNotFoundError):
            if part.startswith(_PREFIX) and entry.stat().st_uid == os.getuid():
                names.add(part.removeprefix(_PREFIX).partition(".")[0])
    return sorted(names)


def find_machine(name: str) -> FoundMachine:
    """Look at one machine without touching it."""
    launcher = _launcher(name)
    held = is_held(object_name(name, "control"))
    if launcher is None:
        return FoundMachine(name, Life.MAKING if held or in_use(name) else Life.DEAD)
    if not held and not runs(launcher):
        return FoundMachine(name, Life.DEAD, launcher)
    try:
        machine = Machine.attach(name)
    except UserError:
        return FoundMachine(name, Life.MAKING, launcher)
    try:
        life = {
            MachineState.STARTING: Life.STARTING,
            MachineState.RUNNING: Life.RUNNING,
            MachineState.STOPPING: Life.STOPPING,
        }[machine.state]
        head = Mirror(machine.control).head()
        return FoundMachine(name, life, launcher, machine.vp_count, machine.control.ready, head)
    finally:
        machine.close()


def find_machines() -> Iterator[FoundMachine]:
    """Every machine of this user, dead ones included, by name."""
    for name in machine_names():
        yield find_machine(name)


def chosen_machine(name: str | None, *, by: str = "--machine") -> str:
    """The living machine that `--machine` (or another word, `by`) means: the named one, or the only one.

    UserError otherwise, which says where the name came from.
    """
    found = list(find_machines())
    living = [machine.name for machine in found if machine.life is not Life.DEAD]
    if name is not None:
        if name in living:
            return name
        known = f"running: {', '.join(living)}" if living else "none is running"
        said = f"${MACHINE_VARIABLE}" if isinstance(name, FromVariable) else by
        dead = name in {machine.name for machine in found}
        left = "; it is dead, and `vmbus-emu clean` removes what it left" if dead else ""
        raise UserError(f"{said}: no machine {name}; {known}{left}{_epitaph(name)}")
    if not living:
        raise UserError(f"no machine is running; start one with `vmbus-emu run --detach`{_epitaph(None)}")
    if len(living) > 1:
        names = ", ".join(living)
        raise UserError(f"{len(living)} machines are running: {names}; say which with --machine NAME")
    return living[0]


def _epitaph(name: str | None) -> str:
    """Where to read how it ended: the machine of that name, without one the last that died."""
    crash = newest_crash(name)
    return "" if crash is None else f"; {crash.told()}"


def runs(row: ActorRow) -> bool:
    """Whether the process of a table row is still that process, and no zombie."""
    if start_time_of(row.pid) != row.start_time:
        return False
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(row.pid).status() != psutil.STATUS_ZOMBIE
    return False


def in_use(name: str) -> bool:
    """Whether any process but this one has an object of the machine open or mapped."""
    wanted = (f"{SHM}/{_PREFIX}{name}.", f"{SHM}/sem.{_PREFIX}{name}.")
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            if pid != os.getpid() and any(path.startswith(wanted) for path in _open_paths(pid)):
                return True
    return False


def _open_paths(pid: int) -> Iterator[str]:
    """What a process has open or mapped, as paths; OSError for one that is gone or somebody else's."""
    base = Path("/proc", str(pid))
    for descriptor in (base / "fd").iterdir():
        with contextlib.suppress(OSError):
            yield str(descriptor.readlink())
    for line in (base / "maps").read_text(encoding="utf-8", errors="replace").splitlines():
        yield line.partition("/")[1] + line.partition("/")[2]


def _launcher(name: str) -> ActorRow | None:
    """The launcher's row of the machine's process table; None while, or if ever, there is none."""
    try:
        control = Control.attach(object_name(name, "control"))
    except (UserError, OSError, ValueError, IndexError):
        return None
    try:
        rows = control.rows() if control.made else iter(())
        return next((row for row in rows if row.kind == ActorKind.LAUNCHER), None)
    finally:
        control.close()
