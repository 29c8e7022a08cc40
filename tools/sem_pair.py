"""Two C processes that wake each other by semaphores across two cores: what a blocking hand-off costs here.

`tools/c/sem_pair.c` is compiled on the spot, once for each version of it, and kept in the cache. Half of its round
trip is what one wake-up of a halted core costs, which no interrupt of ours that has to wake one can beat by much.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from emu.errors import MissingPrerequisite
from tools.paths import cache_dir, made

NAME: Final = "C pair of sem_post/sem_wait"
_SOURCE: Final = Path(__file__).parent / "c" / "sem_pair.c"
_TIMEOUT_S: Final = 60


@dataclass(frozen=True, slots=True)
class RoundTrips:
    """Round trips of one run, in ns."""

    p50_ns: int
    p90_ns: int
    p99_ns: int
    max_ns: int


def sem_pair() -> tuple[SemPair | None, str | None]:
    """The pair, or why there is none: a figure without its comparison is still a figure."""
    try:
        return SemPair(), None
    except MissingPrerequisite as error:
        return None, str(error)


class SemPair:
    """The compiled program; MissingPrerequisite says what lacks."""

    def __init__(self) -> None:
        self._program: Final = _built()

    def run(self, round_trips: int, cpus: tuple[int, int]) -> RoundTrips:
        """Make so many round trips between two cores (or on one, if both are the same)."""
        arguments = [str(number) for number in (round_trips, *cpus)]
        done = subprocess.run(
            [self._program, *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
        )
        return RoundTrips(*map(int, done.stdout.split()))


def _built() -> Path:
    if not _SOURCE.is_file():
        raise MissingPrerequisite(f"{_SOURCE} was not installed: run from a clone of the sources")
    program = made(cache_dir() / "sem-pair") / hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:16]
    if not program.is_file():
        with tempfile.TemporaryDirectory(prefix="building-", dir=program.parent) as name:
            fresh = Path(name) / "sem_pair"
            _compile(fresh)
            fresh.rename(program)
    return program


def _compile(program: Path) -> None:
    compiler = os.environ.get("CC") or "gcc"
    command = [compiler, "-O2", "-pthread", "-o", str(program), str(_SOURCE)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise MissingPrerequisite(f"no C compiler {compiler}: apt install gcc libc6-dev") from None
    if done.returncode:
        raise MissingPrerequisite(f"{compiler} cannot compile {NAME}: {(done.stderr.splitlines() or ['?'])[0]}")
