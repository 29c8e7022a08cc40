"""What the system lets one process have (`ulimit`, /proc): asked before a machine is made, named if it is too little.

A limit that bites shows as "Cannot allocate memory", "File too large" or "Too many open files" wherever it happens to,
mostly where something else than the limit seems to be full.
"""

from __future__ import annotations

import errno
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from emu.errors import MissingPrerequisite

PROC: Final = Path("/proc/self/stat")
"""There where /proc is mounted: a pid alone says nothing, a process is told by its start time as well."""
ROOM_BYTES: Final = 1 << 30
"""Address space of a process beside guest RAM: interpreter, other segments, stacks and heaps of a worker's threads."""
FILES: Final = 40
FILES_A_VCPU: Final = 4
"""Descriptors: each process of a machine is one in the zygote, and those that kick processors have one of each."""


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit: what it counts, how the shell says it, and the shell's unit in bytes (1: it counts things)."""

    what: str
    option: str
    unit: int

    def said(self, soft: int) -> str:
        """The limit as somebody reads it."""
        name = f"the limit on {self.what} (`ulimit {self.option}`) is {soft // self.unit}"
        return name if self.unit == 1 else f"{name} KiB"


LIMITS: Final[Mapping[int, Limit]] = {
    resource.RLIMIT_AS: Limit("address space", "-v", 1024),
    resource.RLIMIT_DATA: Limit("data", "-d", 1024),
    resource.RLIMIT_FSIZE: Limit("the size of a file", "-f", 1024),
    resource.RLIMIT_NOFILE: Limit("open files", "-n", 1),
}
OF_ERRNO: Final[Mapping[int, tuple[int, ...]]] = {
    errno.ENOMEM: (resource.RLIMIT_AS, resource.RLIMIT_DATA),
    errno.EFBIG: (resource.RLIMIT_FSIZE,),
    errno.EMFILE: (resource.RLIMIT_NOFILE,),
}


def soft_limit(number: int) -> int | None:
    """The soft limit `number` (`resource.RLIMIT_…`) of this process, in bytes or things; None: there is none."""
    soft, _hard = resource.getrlimit(number)
    return None if soft == resource.RLIM_INFINITY else soft


def too_tight() -> bool:
    """Whether no process of any machine can start: not into what one may map, or for want of /proc."""
    soft = soft_limit(resource.RLIMIT_AS)
    return (soft is not None and soft < ROOM_BYTES) or not PROC.exists()


def check_memory_limits(ram_bytes: int, largest_segment: int = 0) -> None:
    """MissingPrerequisite when RAM, or a segment beside it, is larger than one process may map or one file may be."""
    # Guest RAM is mapped twice where somebody looks at the records: the launcher does.
    needs = {
        resource.RLIMIT_AS: 2 * ram_bytes + ROOM_BYTES,
        resource.RLIMIT_FSIZE: max(ram_bytes, largest_segment),
    }
    for number, needed in needs.items():
        _check(number, needed, f"{ram_bytes >> 20} MiB of RAM", "KiB, or ask for less RAM")


def check_limits(ram_bytes: int, largest_segment: int, vcpus: int) -> None:
    """MissingPrerequisite when a machine of this size does not fit into what one of its processes may have."""
    if not PROC.exists():
        raise MissingPrerequisite("no /proc, by which processes are told apart; `mount -t proc proc /proc`")
    check_memory_limits(ram_bytes, largest_segment)
    _check(resource.RLIMIT_NOFILE, FILES + FILES_A_VCPU * vcpus, f"{vcpus} vCPUs", "or more")


def _check(number: int, needed: int, of: str, behind: str) -> None:
    soft = soft_limit(number)
    if soft is not None and soft < needed:
        limit = LIMITS[number]
        cure = f"raise it to {-(-needed // limit.unit)} {behind}"
        raise MissingPrerequisite(f"{limit.said(soft)}, which is too little for a machine with {of}; {cure}")


def limit_behind(error: BaseException) -> str | None:
    """The limit that an error may come of, and its cure, as half a line; None where no limit is set, or none fits."""
    limits = OF_ERRNO.get(_errno_of(error), ())
    said = [LIMITS[one].said(soft) for one in limits if (soft := soft_limit(one)) is not None]
    return f"{' and '.join(said)}: raise it" if said else None


def _errno_of(error: BaseException) -> int:
    """Its errno, also where only words tell it: of posix_ipc, and of the loader of modules written in C."""
    if isinstance(error, MemoryError) or (isinstance(error, ImportError) and "failed to map segment" in str(error)):
        return errno.ENOMEM
    if not isinstance(error, OSError):
        return 0
    if error.errno is None and "files open" in str(error):
        return errno.EMFILE
    return error.errno or 0


def not_started(name: str, why: str | None) -> MissingPrerequisite:
    """What to raise when the system does not give us one process or thread more; `why` is its own word."""
    cure = "a machine needs some 20 processes and threads: see `ulimit -u`, or the container's limit"
    # A thread's stack is memory, too, and the system has one word for both.
    memory = limit_behind(MemoryError())
    return MissingPrerequisite(f"cannot start {name}: {why}; {cure}" + (f"; {memory}" if memory else ""))
