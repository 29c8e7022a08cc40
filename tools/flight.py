"""The flight recorder: a machine's last seconds, out of its actors' rings, saved when something went wrong.

A machine that records and whose rings nobody drains keeps the newest 16,382 records of each actor. That costs what
recording costs and nothing more; no file is written until there is something to tell. Flights lie below
`$XDG_STATE_HOME/vmbus-emu/flights`, the newest ten of them, and are recordings like others, that begin late.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from emu.errors import DeadlinePassed, OwnLimit, UserError
from emu.ipc.segments import free_shared_memory
from emu.machine import Machine
from emu.recording import RecordingWriter
from tools.launch import RunningMachine
from tools.output import say
from tools.paths import made, state_dir

KEPT: Final = 10
DEFAULT_S: Final = 10.0
LEAST_FREE: Final = 256 << 20
"""Bytes of shared memory that must be free for a flight that nobody asked for: rings take up to 1 MB an actor."""


def usual_s(recording: bool) -> float:
    """How long a flight is where nobody said: none beside a recording, nor where shared memory is scarce."""
    if recording or free_shared_memory() < LEAST_FREE:
        return 0.0
    return DEFAULT_S


def save_flight(machine: Machine, seconds: float, reason: str) -> Path | None:
    """Save the last seconds of a machine that records; None if it does not. `reason` goes into the file's head."""
    if not seconds or not machine.control.recording:
        return None
    now = time.monotonic_ns()
    try:
        directory = made(state_dir() / "flights")
        path = directory / f"{time.strftime('%Y%m%dT%H%M%S')}-{machine.name}.rec"
        writer = RecordingWriter(path, machine, flight=reason, since_ns=now - int(seconds * 1e9))
        writer.close()
    except UserError as error:
        # Whatever else there is to say of this machine shall still be said.
        say(f"vmbus-emu: no flight recording: {error}")
        return None
    for old in sorted(directory.glob("*.rec"))[:-KEPT]:
        old.unlink(missing_ok=True)
    return path


@contextmanager
def saved_if_it_hangs(running: RunningMachine, seconds: float) -> Iterator[None]:
    """A wait in the block that passes its deadline leaves a flight, and says where.

    Its seconds count from when the wait began: what it waited for has stood still since.
    """
    try:
        yield
    except DeadlinePassed as late:
        reach_s = seconds and seconds + late.timeout_ns / 1e9
        reason = str(late) if isinstance(late, OwnLimit) else f"hang: {late}"
        if path := save_flight(running.machine, reach_s, reason):
            say(f"vmbus-emu: flight recording: {path}")
            late.recording = path
        raise
