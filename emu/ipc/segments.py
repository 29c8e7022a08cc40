"""POSIX shared memory segments: one owner creates and unlinks, everybody else attaches by name.

`multiprocessing.shared_memory` is not used: in Python 3.11 an attaching process unlinks the owner's segment
when it exits. Creation is refused when the name exists, and leaves nothing behind when it fails.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from pathlib import Path
from typing import Final

import posix_ipc

from emu.errors import MissingPrerequisite, NameTaken, UserError
from emu.ipc.atomics import AtomicView
from emu.limits import limit_behind

PREFIX: Final = "/vmbus-emu."
SHM: Final = Path("/dev/shm")
"""Where Linux keeps the objects: a segment under its name, a semaphore under `sem.` and its name."""
LEAST_FREE: Final = 64 << 10
"""Bytes: a guest asks for a few pages at a time, and what it does not get it leaves free."""


def object_name(machine: str, part: str) -> str:
    """Name of a machine's shared object (`part` is `ram`, `host`, `vp.0`, …), as every process forms it."""
    return f"{PREFIX}{machine}.{part}"


class Segment:
    """A mapped segment: `memory` (mmap of `size` bytes), `view` (atomic access to it), `fd`."""

    __slots__ = ("_apart", "fd", "memory", "name", "size", "view")

    def __init__(self, name: str, fd: int, size: int) -> None:
        self.name = name
        self.fd = fd
        self.size = size
        self.memory = mmap.mmap(fd, size)
        self.view = AtomicView(self.memory)
        self._apart: mmap.mmap | None = None

    @classmethod
    def create(cls, name: str, size: int, *, first: int = 0, reserved: int = 0) -> Segment:
        """Make a sparse segment of `size` zero bytes, or say in one line why that is not possible.

        `reserved` bytes from `first` on get their memory now: a first touch of a full tmpfs is SIGBUS.
        """
        try:
            shm = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600)
        except posix_ipc.ExistentialError:
            # posix_ipc says the same of a name that exists and of a directory that does not.
            if SHM.is_dir():
                cure = "`vmbus-emu clean` removes what a dead machine left"
                raise NameTaken(f"shared memory {name} exists already; {cure}") from None
            raise MissingPrerequisite(f"no {SHM} for shared memory {name}; mount a tmpfs there") from None
        except (OSError, posix_ipc.Error) as error:
            cure = limit_behind(error) or f"is {SHM} mounted and writable?"
            raise MissingPrerequisite(f"cannot create shared memory {name}: {error}; {cure}") from None
        try:
            os.ftruncate(shm.fd, size)
            if reserved:
                os.posix_fallocate(shm.fd, first, reserved)
            return cls(name, shm.fd, size)
        except BaseException as error:
            shm.close_fd()
            unlink_segment(name)
            if not isinstance(error, OSError):
                raise
            raise refused_memory(name, reserved if error.errno == errno.ENOSPC else size, error) from None

    @classmethod
    def attach(cls, name: str) -> Segment:
        """Map an existing segment whole; UserError when no machine has one of that name."""
        try:
            shm = posix_ipc.SharedMemory(name)
        except (posix_ipc.ExistentialError, ValueError):  # also a name that no machine can have
            cure = "no such machine is running; `vmbus-emu ps` lists them"
            raise UserError(f"no shared memory {name}: {cure}") from None
        except posix_ipc.PermissionsError:
            raise UserError(f"shared memory {name} is another user's") from None
        except OSError as error:
            raise _not_mapped(name, error) from None
        try:
            size = os.fstat(shm.fd).st_size
            if size == 0:
                raise UserError(f"shared memory {name} is still being made; try again")
            return cls(name, shm.fd, size)
        except OSError as error:
            shm.close_fd()
            raise _not_mapped(name, error) from None
        except BaseException:
            shm.close_fd()
            raise

    @property
    def apart(self) -> mmap.mmap:
        """A second mapping, one for all who ask, that `close` leaves alone.

        It is for tables that hold views of it for as long as they live: nobody waits for them, nor for the collector.
        """
        if self._apart is None:
            self._apart = mmap.mmap(self.fd, self.size)
        return self._apart

    def reserve(self, offset: int, nbytes: int) -> None:
        """Make sure these bytes have memory behind them; OSError(ENOSPC) instead of a later SIGBUS."""
        os.posix_fallocate(self.fd, offset, nbytes)

    def hold(self) -> None:
        """Show, until this process ends, that who made it lives: to `is_held`, which no PID namespace stops."""
        fcntl.flock(self.fd, fcntl.LOCK_EX)

    def close(self) -> None:
        """Unmap and close; views that were handed out must be released before, but for those of `apart`."""
        self._apart = None
        self.view.close()
        self.memory.close()
        os.close(self.fd)


def free_shared_memory() -> int:
    """Bytes that are free where machines have their memory; 0 where there is none."""
    try:
        space = os.statvfs(SHM)
    except OSError:
        return 0
    return space.f_bavail * space.f_frsize


def too_full(what: str) -> MissingPrerequisite | None:
    """What to raise where `what` may be for want of memory; None where some is free.

    A guest goes on without what it finds no memory for, as a kernel does: nobody else says it.
    """
    if free_shared_memory() >= LEAST_FREE:
        return None
    return MissingPrerequisite(f"{SHM} is full: {what}; free some of it, or ask for fewer or smaller devices")


def refused_memory(name: str, nbytes: int, error: OSError) -> MissingPrerequisite:
    """What to say when a segment does not get `nbytes` of memory, or of addresses."""
    asked = f"{nbytes} bytes" if nbytes < 1 << 20 else f"{nbytes / (1 << 20):.0f} MiB"
    if error.errno == errno.ENOSPC:
        cure = "free some of it, or ask for fewer or smaller rings" if name.endswith(".ram") else "free some of it"
        return MissingPrerequisite(f"{SHM} is full, it has no room for {asked} ({name}); {cure}")
    cure = limit_behind(error) or "ask for less RAM"
    return MissingPrerequisite(f"{SHM} refused {asked}: {error.strerror} ({name}); {cure}")


def _not_mapped(name: str, error: OSError) -> MissingPrerequisite:
    cure = limit_behind(error) or "is this computer out of memory?"
    return MissingPrerequisite(f"cannot map shared memory {name}: {error.strerror or error}; {cure}")


def is_held(name: str) -> bool:
    """Whether somebody who lives holds the segment (`Segment.hold`): perhaps as a process that is no pid here."""
    try:
        with (SHM / name[1:]).open("rb") as segment:
            fcntl.flock(segment, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # it is gone, or somebody else's
        return False
    return False


def unlink_segment(name: str) -> bool:
    """Remove a segment's name; False when it was gone already."""
    try:
        posix_ipc.unlink_shared_memory(name)
    except posix_ipc.ExistentialError:
        return False
    return True


def unlink_semaphore(name: str) -> bool:
    """Remove a semaphore's name; False when it was gone already."""
    try:
        posix_ipc.unlink_semaphore(name)
    except posix_ipc.ExistentialError:
        return False
    return True


def objects_of(machine: str) -> list[str]:
    """Every shared object (segments and `sem.` files) of a machine that exists now, as /dev/shm names."""
    wanted = (f"vmbus-emu.{machine}.", f"sem.vmbus-emu.{machine}.")
    # Where nobody may look nobody has made anything either: whoever tries is told.
    with contextlib.suppress(FileNotFoundError, PermissionError):
        return sorted(entry.name for entry in SHM.iterdir() if entry.name.startswith(wanted))
    return []


def unlink_objects(machine: str) -> int:
    """Unlink every object of a machine; how many there were."""
    count = 0
    # `control` last: its name is what keeps a new machine from taking this one's half-removed names.
    for entry in sorted(objects_of(machine), key=lambda entry: entry.endswith(".control")):
        name = "/" + entry.removeprefix("sem.")
        count += unlink_semaphore(name) if entry.startswith("sem.") else unlink_segment(name)
    return count


def unlink_unheld(machine: str) -> int:
    """As `unlink_objects`, unless somebody lives who holds the machine: he was quicker with a dead one's name."""
    return 0 if is_held(object_name(machine, "control")) else unlink_objects(machine)


def machines() -> list[str]:
    """Names of all machines that have a control segment, sorted."""
    with contextlib.suppress(FileNotFoundError):
        entries = (entry.name for entry in SHM.glob("vmbus-emu.*.control"))
        return sorted(entry.removeprefix("vmbus-emu.").removesuffix(".control") for entry in entries)
    return []
