"""Two C processes that wake each other by semaphores across two cores: what a blocking hand-off costs here.

`tools/c/sem_pair.c` is compiled on the spot, once for each version of it, and kept in the cache. Half of its round
trip is what one wake-up of a halted core costs, which no interrupt of ours that has to wake one can beat by much.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import Final

from emu.errors import MissingPrerequisite
from tools.c_programs import C_SOURCES, built

NAME: Final = "C pair of sem_post/sem_wait"
_SOURCE: Final = C_SOURCES / "sem_pair.c"
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
        self._program: Final = built(NAME, [_SOURCE])

    def run(self, round_trips: int, cpus: tuple[int, int]) -> RoundTrips:
        """Make so many round trips between two cores (or on one, if both are the same)."""
        arguments = [str(number) for number in (round_trips, *cpus)]
        done = subprocess.run(
            [self._program, *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
        )
        return RoundTrips(*map(int, done.stdout.split()))
