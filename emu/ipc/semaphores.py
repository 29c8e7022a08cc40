"""Named POSIX semaphores: one token for one wake, always with a deadline.

A deadline is one of CLOCK_MONOTONIC, which nobody sets: a wait that only its deadline ends would last an hour longer
where the wall clock is set back by one. `posix_ipc` knows `sem_timedwait` alone, so the C library's `sem_clockwait`
(glibc 2.30) is called beside it, for what really waits. That costs 0.5 us a block.

glibc's `sem_open` makes a semaphore in a file of a random name (`sem.` and six letters) and links that: who is killed
in between would leave a name that says nothing of a machine. So its file is made here, under its own name.

A token is posted only by whoever took a sleeper's announcement away, so a count hardly grows beyond one. A
guest may post any semaphore as often as it likes: a full one has a token for every sleeper, and stays full.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from struct import Struct
from time import CLOCK_MONOTONIC, monotonic_ns
from typing import Final

import posix_ipc

from emu.errors import MissingPrerequisite, NameTaken, UserError
from emu.ipc.segments import SHM
from emu.limits import limit_behind

WATCHDOG_S = 1.0
"""Longest single block; a waiter whose poster was killed between taking and posting looks again by itself."""

_timespec: Final = Struct("qq").pack
_NS: Final = 1_000_000_000
_libc = ctypes.CDLL(None)
_sem_open = _libc.sem_open
_sem_open.restype = ctypes.c_void_p
_sem_open.argtypes = (ctypes.c_char_p, ctypes.c_int)
_sem_close = _libc.sem_close
_sem_close.argtypes = (ctypes.c_void_p,)
_sem_clockwait = getattr(_libc, "sem_clockwait", None)
"""None where the C library has none: then blocks end by the wall clock."""
if _sem_clockwait is not None:
    _sem_clockwait.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)


def _initial_bytes() -> bytes | None:
    """What glibc keeps in the file of a semaphore without a token; None of another C library, or in another place.

    That is a `sem_t` which processes share, as `sem_init` makes it: 32 bytes where a pointer has 8.
    """
    try:
        library = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (ValueError, OSError):
        return None
    semaphore = ctypes.create_string_buffer(64)
    if not library.startswith("glibc") or ctypes.sizeof(ctypes.c_void_p) != 8 or _libc.sem_init(semaphore, 1, 0):
        return None
    return semaphore.raw[:32]


_INITIAL: Final = _initial_bytes()


def _made(name: str) -> posix_ipc.Semaphore:
    """A new semaphore without a token. Nobody opens one by its name before its machine has been made."""
    if _INITIAL is None:
        return posix_ipc.Semaphore(name, posix_ipc.O_CREX, mode=0o600, initial_value=0)
    path = SHM / f"sem.{name[1:]}"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            os.write(descriptor, _INITIAL)
        finally:
            os.close(descriptor)
        return posix_ipc.Semaphore(name)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


class Wakeup:
    """The semaphore that one sleeper blocks on; `post` wakes it, `block` waits for one token."""

    __slots__ = ("_acquire", "_handle", "_release", "name", "semaphore")

    def __init__(self, semaphore: posix_ipc.Semaphore) -> None:
        self.semaphore = semaphore
        self.name = semaphore.name
        self._handle: int | None = None
        """The C library's, of who has blocked; 0 where it gave none."""
        self._release = semaphore.release
        self._acquire = semaphore.acquire

    @classmethod
    def create(cls, name: str) -> Wakeup:
        """Make a semaphore with no token; MissingPrerequisite when the system refuses."""
        try:
            return cls(_made(name))
        except (posix_ipc.ExistentialError, FileExistsError, FileNotFoundError):
            if not SHM.is_dir():
                # posix_ipc has one word for "exists already" and "is nowhere to be made".
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
        """Wait for a token; False when the time passed or a signal handler ran (look again either way).

        `timeout_s` is by a clock that nobody sets.
        """
        if timeout_s > 0:
            handle = self._handle
            if handle is None:
                handle = self._open()
            if handle and _sem_clockwait is not None:
                until = _timespec(*divmod(monotonic_ns() + int(timeout_s * _NS), _NS))
                # Not 0 is the time or a signal: errno may be another call's by now, of the handler that ran.
                taken: bool = _sem_clockwait(handle, CLOCK_MONOTONIC, until) == 0
                return taken
        try:
            self._acquire(timeout_s)
        except (posix_ipc.BusyError, posix_ipc.SignalError):
            return False
        return True

    def _open(self) -> int:
        """A handle of the same semaphore for who waits; 0 where there is none to be had."""
        self._handle = 0
        # A name that is gone is a machine's that ends: its last waits may be any clock's.
        if _sem_clockwait is not None:
            self._handle = _sem_open(self.name.encode(), 0) or 0
        return self._handle

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
        if self._handle:
            _sem_close(self._handle)
            self._handle = 0
        self.semaphore.close()
