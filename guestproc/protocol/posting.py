"""How `vmbus_post_msg` goes on after a hypercall's status, and how long it waits before it tries again.

What may pass (no buffers, no connection yet) is tried up to 100 times; the pause doubles from 1 us until the
22nd failure, and then stays at 2.1 s: 168 s in all (reference 1.6).
"""

from __future__ import annotations

import errno
from enum import Enum, auto
from typing import Final

from emu.wire.hypercalls import HvStatus
from emu.wire.messages import MessageType

_SUCCESS: Final = int(HvStatus.SUCCESS)
_INVALID_CONNECTION_ID: Final = int(HvStatus.INVALID_CONNECTION_ID)
_NO_ROOM: Final = (int(HvStatus.INSUFFICIENT_MEMORY), int(HvStatus.INSUFFICIENT_BUFFERS))
RETRIES: Final = 100
DOUBLING_STOPS: Final = 22


class Retry(Enum):
    """A post that did not succeed and may be tried again."""

    AGAIN = auto()
    """INVALID_CONNECTION_ID: "we could get this if we send messages too frequently"."""
    NO_BUFFERS = auto()

    @property
    def error(self) -> int:
        """What it comes to if it was the last try."""
        return -errno.EAGAIN if self is Retry.AGAIN else -errno.ENOBUFS


def outcome(status: int, msgtype: int) -> int | Retry:
    """0, a negative errno for what will not pass, or that it is to be tried again."""
    if status == _SUCCESS:
        return 0
    if status == _INVALID_CONNECTION_ID:
        # A host below 5.0 has no connection 4: no use to wait for it.
        return -errno.ENXIO if msgtype == MessageType.INITIATE_CONTACT else Retry.AGAIN
    if status in _NO_ROOM:
        return Retry.NO_BUFFERS
    return -errno.EINVAL


def pause_us(failures: int) -> int:
    """Microseconds to wait after that many failures, from 1."""
    return 1 << min(failures, DOUBLING_STOPS) - 1
