"""The host's defence against interrupt storms: who signals too often without cause has its processors held for a while.

A guest signals a device whose ring was empty. So between two signals the device has read something, unless the second
had no cause; the first of those may still be a signal that came late. Whoever goes on is held: its processors run no
further, wherever they are, until the time is over (the kernel's "VMBus interrupts" documentation tells of that).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from emu.errors import ProtocolViolation
from emu.syncpoint import Point
from hostproc.devices.channel import HostChannel
from hostproc.points import NoPoints

LIMIT: Final = 4
"""Signals without cause, one behind the other, on one channel."""
FREEZE_NS: Final = 40_000_000
_THROTTLE: Final = int(Point.HOST_THROTTLE)


class Throttle:
    """Counts a guest's signals without cause, by channel; `freeze(relid, count)` holds the guest."""

    def __init__(self, points: NoPoints, freeze: Callable[[int, int], None]) -> None:
        self._points: Final = points
        self._freeze: Final = freeze
        # By key: where the device stood at the last signal with something unread, and how many came since.
        self._seen: Final[dict[int, tuple[int, int]]] = {}
        self.spurious = 0

    def signalled(self, channel: HostChannel) -> None:
        """The guest has signalled this channel."""
        key = channel.key
        try:
            unread, at = channel.unread()
        except ProtocolViolation:
            return  # the device finds that out itself
        if not unread or channel.wants_room():
            self._seen.pop(key, None)
            return
        before, count = self._seen.get(key, (-1, 0))
        count = count + 1 if before == at else 0
        self._seen[key] = at, count
        if not count:
            return
        self.spurious += 1
        if count > LIMIT:
            self._seen[key] = at, 0
            relid = channel.relid
            if not self._points.armed[_THROTTLE] or not self._points.hold(
                _THROTTLE, relid, lambda: self._freeze(relid, count)
            ):
                self._freeze(relid, count)
