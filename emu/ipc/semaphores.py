"""Named POSIX semaphores: one token for one wake, always with a deadline.

A token is posted only by whoever took a sleeper's announcement away, so a count hardly grows beyond one. A
guest may post any semaphore as often as it likes: a full one has a token for every sleeper, and stays full.
"""

from __future__ import annotations

import errno
from pathlib import Path

import posix_ipc

from emu.errors import MissingPrerequisite, NameTaken, UserError
from emu.limits import limit_behind

WATCHDOG_S = 1.0
"""Longest single block; a waiter whose poster was killed between taking and posting looks again by itself."""


class Wakeup:
    """The semaphore that one sleeper blocks on; `post` wakes it, `block` waits for one token."""

    __slots__ = ("_acquire", "_release", "name", "semaphore")

    def __init__(self, semaphore: posix_ipc.Semaphore) -> None:
        self.semaphore = semaphore
        self.name = semaphore.name
        self._release = semaphore.release
        self._acquire = semaphore.acquire

    @classmethod
    def create(cls, name: str) -> Wakeup:
        """Make a semaphore with no token; MissingPrerequisite when the system refuses."""
        try:
            return cls(posix_ipc.Semaphore(name, posix_ipc.O_CREX, mode=0o600, initial_value=0))
        except posix_ipc.ExistentialError:
            if not Path("/dev/shm").is_dir():
                # The library's one word for "exists already" and "is nowhere to be made".
                raise MissingPrerequisite(f"no /dev/shm for semaphore {name}; mount a tmpfs there") from None
            cure = "`vmbus-emu clean` removes what a dead machine left"
            raise NameTaken(f"semaphore {name} exists already; {cure}") from None
        except (OSError, posix_ipc.Error) as error:
            cure = limit_behind(error) or "is /dev/shm writable and not full?"
            raise MissingPrerequisite(f"cannot create semaphore {name}: {error}; {cure}") from None

    @classmethod
    def attach(cls, name: str) -> Wakeup:
        """Open an existing semaphore; UserError when there is none."""
        try:
            return cls(posix_ipc.Semaphore(name))
        except posix_ipc.ExistentialError:
            cure = "no such machine is running; `vmbus-emu ps` lists them"
            raise UserError(f"no semaphore {name}: {cure}") from None
        except posix_ipc.PermissionsError:
            raise NameTaken(f"semaphore {name} is another user's") from None

    def post(self) -> None:
        """Post one token; a semaphore that somebody filled up (2^31 - 1 tokens) stays as it is."""
        try:
            self._release()
        except OSError as error:
            if error.errno != errno.EOVERFLOW:
                raise

    def block(self, timeout_s: float = WATCHDOG_S) -> bool:
        """Wait for a token; False when the time passed or a signal handler ran (look again either way)."""
        try:
            self._acquire(timeout_s)
        except (posix_ipc.BusyError, posix_ipc.SignalError):
            return False
        return True

    def try_take(self) -> bool:
        """Take a token if there is one now."""
        return self.block(0)

    @property
    def tokens(self) -> int:
        """How many tokens lie there now (for reports)."""
        count: int = self.semaphore.value
        return count

    def close(self) -> None:
        """Close this handle; the name stays."""
        self.semaphore.close()
