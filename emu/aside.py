"""Stepping aside: a thread of the guest that has to share the host's core goes to another one.

What a guest does for an opening it does in a chain: worker, host, boot CPU, worker. With two cores that goes fastest
with the host on one of its own. Then the boot CPU, which polls for the host's answer, is on the core of the worker that
waits for it, and hands that core over; where it polls beside the host, the worker's core is idle, and is woken for each
answer, which takes tens of microseconds. The kernel's scheduler cannot know that, and what it comes to by chance
lasts as long as a bring-up.

So who found the host in its way several times in a row looks where both run, and goes. It is a move, not a tie: the
thread may run wherever it could before.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

TIMES: Final = 3
"""So often in a row it is in the way before anybody looks: a move takes 50 us, and an answer on the wrong core 30."""
ROW_NS: Final = 3_000_000
"""What comes later than this is another row."""
_PROCESSOR: Final = 36
"""Where /proc/PID/stat has the core, counted behind the process's name."""


class Aside:
    """One thread's: `cores` says on which cores it and the host ran last, `leave` takes it away from one."""

    def __init__(
        self,
        cores: Callable[[], tuple[int, int]],
        leave: Callable[[int], object],
        now: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._cores = cores
        self._leave = leave
        self._now = now
        self._last_ns = -ROW_NS
        self._times = 0
        self._due = TIMES

    def in_the_way(self) -> None:
        """To be called where this thread has waited for its turn, and perhaps it was the host that had it.

        Looks are the fewer the longer a row gets: somebody else may be in the way, or the kernel put us back.
        """
        now = self._now()
        if now - self._last_ns > ROW_NS:
            self._times, self._due = 0, TIMES
        self._last_ns = now
        self._times += 1
        if self._times < self._due:
            return
        self._due *= 2
        with suppress(OSError):  # the host is gone, or there is no /proc
            own, host = self._cores()
            if own == host:
                self._leave(own)


def leave_core(core: int) -> None:
    """Let this thread go on on another core, if it may run on any."""
    allowed = os.sched_getaffinity(0)
    if others := allowed - {core}:
        os.sched_setaffinity(0, others)
        os.sched_setaffinity(0, allowed)


class Cores:
    """The cores of the calling thread and of the host; `host_pid` is 0 while there is none."""

    def __init__(self, host_pid: Callable[[], int]) -> None:
        self._host_pid = host_pid
        self._files: tuple[int, int] | None = None

    def __call__(self) -> tuple[int, int]:
        """Where they ran last; OSError when that is not to be had."""
        if self._files is None:
            host = os.open(f"/proc/{self._host_pid()}/stat", os.O_RDONLY | os.O_CLOEXEC)
            self._files = os.open("/proc/thread-self/stat", os.O_RDONLY | os.O_CLOEXEC), host
        own, host = self._files
        return _core(own), _core(host)


def _core(stat: int) -> int:
    return int(os.pread(stat, 1024, 0).rpartition(b")")[2].split()[_PROCESSOR])
