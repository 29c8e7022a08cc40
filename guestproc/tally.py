"""What a guest program reports, and why one ends early."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

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
