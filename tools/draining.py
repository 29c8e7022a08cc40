"""Draining a machine's recorders into a file while a command does whatever it does.

A thread of its own: a command that waits for a device, or for somebody's key, cannot let the rings run over meanwhile.
It looks every 20 ms, and sooner once half a ring or more fills in that time, so that bursts find room. A stream's
records take it 2 % of a core; where there is another, that is not the core of the process that makes most of them.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from emu.limits import not_started
from emu.recording import RecordingWriter
from tools.launch import RunningMachine

TURN_S: Final = 0.02
"""A ring takes 16,384 records: in this time at most 800,000 a second, and nobody makes half of that."""
LEAST_TURN_S: Final = 0.002
WANTED_SHARE: Final = 0.5
"""How full the fullest ring should be when it is drained: fuller would leave too little for a late look."""
ASIDE_SHARE: Final = 0.1
"""A process that fills so much of its ring in a turn is not to be interrupted by what drains it."""
STOP_TIMEOUT_S: Final = 60.0
_PROCESSOR: Final = 36
"""Where /proc/PID/stat has the core, counted behind the process's name."""


def next_turn_s(turn_s: float, share: float) -> float:
    """How long to wait after a turn in which the fullest ring filled to `share` of it."""
    if share <= 0:
        return TURN_S
    return max(LEAST_TURN_S, min(TURN_S, turn_s * WANTED_SHARE / share))


def drain(writer: RecordingWriter, stopped: Callable[[float], bool]) -> None:
    """Poll the writer again and again; `stopped` waits so many seconds, unless it is to be over."""
    turn_s = TURN_S
    cores = os.sched_getaffinity(0)
    while not stopped(turn_s):
        writer.poll()
        turn_s = next_turn_s(turn_s, writer.share)
        if writer.share >= ASIDE_SHARE:
            step_aside(writer.fullest_pid, cores)


def step_aside(pid: int, cores: set[int]) -> None:
    """Let this thread run on these cores, but not on the one that the process ran on last, unless there is no other."""
    # The process may be gone, the cores taken away from us.
    with contextlib.suppress(OSError):
        stat = Path("/proc", str(pid), "stat").read_bytes()
        others = cores - {int(stat.rpartition(b")")[2].split()[_PROCESSOR])}
        if others:
            os.sched_setaffinity(0, others)


class Drainer:
    """Drains a recording until it is stopped; `check` raises what ended it before that."""

    def __init__(self, writer: RecordingWriter) -> None:
        self._writer: Final = writer
        self._stopped: Final = threading.Event()
        self._error: Exception | None = None
        self._thread: Final = threading.Thread(target=self._run, name="drainer", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise not_started("the thread that drains the recording", str(error)) from None

    def check(self) -> None:
        """Raise what ended the thread, a UserError where the file could not be written; the recording ends there."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def stop(self) -> None:
        """Drain no more; the writer is the caller's again."""
        self._stopped.set()
        self._thread.join(STOP_TIMEOUT_S)

    def _run(self) -> None:
        try:
            drain(self._writer, self._stopped.wait)
        except Exception as error:  # told by `check`: a thread's own traceback would be all that is left of it
            self._error = error


@contextmanager
def drained(running: RunningMachine, writer: RecordingWriter) -> Iterator[RecordingWriter]:
    """Drain the machine's recorders into the writer for as long as the block runs; what is left, `close` takes."""
    drainer = Drainer(writer)
    running.on_pump = drainer.check
    try:
        yield writer
    finally:
        running.on_pump = None
        drainer.stop()
    drainer.check()


@contextmanager
def recording(
    running: RunningMachine, path: Path | None, most_bytes: int | None = None
) -> Iterator[RecordingWriter | None]:
    """Drain what the processes record into a file for as long as the block runs; None: there is no file.

    `most_bytes`: see `RecordingWriter`.
    """
    if path is None:
        yield None
        return
    writer = RecordingWriter(path, running.machine, most_bytes=most_bytes)
    try:
        with drained(running, writer):
            yield writer
    finally:
        writer.close()
