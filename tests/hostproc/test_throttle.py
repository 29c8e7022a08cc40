"""The host's count of signals without cause, and what it holds a guest for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from emu.errors import ProtocolViolation
from hostproc.devices.channel import HostChannel
from hostproc.points import NoPoints
from hostproc.throttle import LIMIT, Throttle


@dataclass
class Ring:
    """A channel as the throttle sees it."""

    key: int = 1
    relid: int = 7
    bytes_unread: int = 64
    index: int = 0
    waits: bool = False

    def unread(self) -> tuple[int, int]:
        if self.bytes_unread < 0:
            raise ProtocolViolation("an index that cannot be", rule="ring-index")
        return self.bytes_unread, self.index

    def wants_room(self) -> bool:
        return self.waits


def throttled() -> tuple[Any, list[tuple[int, int]]]:
    """A throttle's `signalled`, and what it froze for."""
    frozen: list[tuple[int, int]] = []
    throttle = Throttle(NoPoints(), lambda relid, count: frozen.append((relid, count)))
    return lambda ring: throttle.signalled(cast(HostChannel, ring)), frozen


def test_signals_one_behind_the_other_are_held_against_the_guest() -> None:
    """Nothing was read in between: each but the first has no cause, and over the limit it freezes, again and again."""
    signalled, frozen = throttled()
    for _ in range(2 * (LIMIT + 1) + 1):
        signalled(Ring())

    assert frozen == [(7, LIMIT + 1)] * 2


def test_signal_behind_a_read_has_a_cause() -> None:
    """A device that reads on, one that waits for room, a ring that is empty or makes no sense: nothing is counted."""
    signalled, frozen = throttled()
    for n in range(20):
        signalled(Ring(index=8 * n))
        signalled(Ring(key=2, waits=True))
        signalled(Ring(key=3, bytes_unread=0))
        signalled(Ring(key=4, bytes_unread=-1))

    assert frozen == []
