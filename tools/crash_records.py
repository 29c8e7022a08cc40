"""The records that machines left when they died: where they are, which is whose, and how old.

Only names of files are read here, so that a command that looks for a machine in vain can say where it ended.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tools.paths import state_dir

KEPT: Final = 10
RECENT_S: Final = 3_600.0
"""A death older than this is nobody's news any more, unless somebody asks for that machine by name."""


@dataclass(frozen=True, slots=True)
class CrashFile:
    """One record: the machine that it is of, and when it was written (seconds since 1970)."""

    path: Path
    machine: str
    written: float

    @property
    def age_s(self) -> float:
        """Seconds since it was written."""
        return max(0.0, time.time() - self.written)

    def told(self) -> str:
        """What happened, and how to look at it."""
        return f"{self.machine} died {_ago(self.age_s)} ago; see `vmbus-emu inspect --from {self.path}`"


def crash_dir() -> Path:
    """Where they are."""
    return state_dir() / "crashes"


def crash_files() -> list[CrashFile]:
    """All of them, the newest first."""
    found = []
    for path in crash_dir().glob("*.json"):
        _moment, dash, machine = path.stem.partition("-")
        try:
            written = path.stat().st_mtime
        except OSError:  # another machine that died just now made room for its own
            continue
        if dash:
            found.append(CrashFile(path, machine, written))
    return sorted(found, key=lambda one: (one.written, one.path.name), reverse=True)


def newest_crash(machine: str | None = None) -> CrashFile | None:
    """The newest record of that machine; without a name the newest of all that is recent."""
    for one in crash_files():
        if one.machine == machine or (machine is None and one.age_s < RECENT_S):
            return one
    return None


def _ago(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
