"""Two processes, one on each of two cores, that do something together while nobody else is measured.

They are forked, so whatever was made before is theirs, too. Neither outlives a failure of the other, the deadline, nor
who started them: an end looks again and again, and one that nobody ends takes its core for ever.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection
from multiprocessing.context import ForkProcess
from types import TracebackType

from emu.errors import DeadlinePassed, VmbusError
from emu.ipc.atomics import AtomicView
from tools.sysfs_namespace import die_with_parent

End = Callable[[], None]
Cpus = tuple[int, int]


class Marks:
    """What two ends tell each other and who started them: that the second one is ready, and two times, in ns.

    A context manager, over memory that a fork shares.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._view = AtomicView(self._memory)
        self._ready = self._view.cell_u64(0)
        self._begin = self._view.cell_u64(64)
        self._end = self._view.cell_u64(128)

    def __enter__(self) -> Marks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._view.close()
        self._memory.close()

    def ready(self) -> None:
        """The second end can take something."""
        self._ready.store(1)

    def wait_until_ready(self) -> None:
        """Wait for the second end; whoever started both has the deadline."""
        while not self._ready.load():
            os.sched_yield()

    def warm(self) -> None:
        """The second end has taken something."""
        self._ready.store(2)

    def wait_until_warm(self) -> None:
        """Wait for that."""
        while self._ready.load() < 2:
            os.sched_yield()

    def begin(self) -> None:
        """The first end begins now."""
        self._begin.store(time.monotonic_ns())

    def end(self) -> None:
        """The second end has everything now."""
        self._end.store(time.monotonic_ns())

    @property
    def elapsed_ns(self) -> int:
        """From `begin` to `end`."""
        return self._end.load() - self._begin.load()


def run_both(what: str, first: End, second: End, cpus: Cpus, deadline_s: float) -> None:
    """Fork both ends, each on its core, and wait for them.

    Raises DeadlinePassed (`what` names it) or, when an end fails, VmbusError; both ends are gone then.
    """
    context = multiprocessing.get_context("fork")
    last_words, say = context.Pipe(duplex=False)
    pairs = zip((first, second), cpus, strict=True)
    ends = [context.Process(target=_run, args=(end, cpu, say, os.getpid()), daemon=True) for end, cpu in pairs]
    deadline = time.monotonic() + deadline_s
    try:
        _start(ends)
        waiting = list(ends)
        while waiting:
            left = deadline - time.monotonic()
            done = connection.wait([end.sentinel for end in waiting], timeout=max(left, 0))
            if not done:
                raise DeadlinePassed(what, int(deadline_s * 1e9))
            for end in [end for end in waiting if end.sentinel in done]:
                waiting.remove(end)
                end.join()
                if end.exitcode:
                    why = last_words.recv() if last_words.poll() else f"it left with exit status {end.exitcode}"
                    raise VmbusError(f"{what}: {why}")
    finally:
        say.close()
        last_words.close()
        for end in ends:
            if end.is_alive():
                end.kill()
                end.join()
            if end.pid is not None:
                end.close()


def _start(ends: Sequence[ForkProcess]) -> None:
    """Fork them with Ctrl-C blocked: a terminal sends it to all, but it is for who started them, and ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for end in ends:
            end.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def two_cpus() -> Cpus | None:
    """The two cores to measure on, None if this process may use one only."""
    cpus = sorted(os.sched_getaffinity(0))
    return (cpus[0], cpus[1]) if len(cpus) > 1 else None


def _run(end: End, cpu: int, say: connection.Connection[str, str], parent: int) -> None:
    """One end; what went wrong is told to who started it, in a line."""
    die_with_parent(signal.SIGKILL, parent)
    os.sched_setaffinity(0, {cpu})
    try:
        end()
    except Exception as error:
        say.send(f"{type(error).__name__}: {error}")
        raise SystemExit(1) from None
