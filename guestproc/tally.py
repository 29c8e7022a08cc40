"""What a guest program reports, where it writes what it measured, and why one ends early."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from emu.errors import MissingPrerequisite

STALL_NS: Final = 10_000_000_000
"""A program gives up when nothing moves for this long."""
IDLE_NS: Final = 50_000_000


class ChannelGone(Exception):
    """The host, or an unload, takes the channel away."""


class Stalled(Exception):
    """Nothing moves, for `STALL_NS` or because the host broke the ring."""


@dataclass(slots=True)
class Tally:
    """What a program has to report."""

    packets: int = 0
    nbytes: int = 0
    errors: int = 0
    digest: bytes = b""


def write_report(path: str, report: bytes) -> None:
    """Add it to a file of the launcher's; MissingPrerequisite where there is no room for it.

    All CPUs may write into one: what goes into one system call (2 GB) stays together.
    """
    left = memoryview(report)
    try:
        with Path(path).open("ab", buffering=0) as out:
            while left:
                left = left[out.write(left) :]
    except OSError as error:
        raise MissingPrerequisite(
            f"no room for what was measured: {error.strerror}; free some in the temporary directory, or set TMPDIR"
        ) from None
