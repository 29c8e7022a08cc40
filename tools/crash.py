"""Crash records: what is worth keeping of a machine that died, below `$XDG_STATE_HOME/vmbus-emu/crashes`.

The whole state is in it (`tools.state_tree`), read while shared memory is still there: `inspect --from` shows it.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from emu.control import ActorKind, ActorRow, ActorState, is_over, start_time_of
from emu.errors import DeadlinePassed, NotOpened
from emu.machine import Machine
from tools.crash_records import KEPT, crash_dir
from tools.flight import save_flight
from tools.launch import MachineDied, RunningMachine
from tools.output import say
from tools.paths import made


@contextmanager
def crash_recorded(running: RunningMachine, flight_s: float = 0.0) -> Iterator[None]:
    """Let a death in the block leave a crash record, which its message names, and a flight of so many seconds."""
    try:
        yield
    except MachineDied as death:
        death.crash_record = write_crash_record(running, death, flight_s)
        raise


def failure_report(error: Exception) -> dict[str, Any]:
    """What `--json` tells of a command that this has ended: by the names that `run` has for it, or as `error`.

    `run` counts channels that are `not_open`; why one is not is `unopened` here.
    """
    if not isinstance(error, (MachineDied, DeadlinePassed, NotOpened)):
        return {"interrupted": False, "error": str(error) or type(error).__name__}
    death = error if isinstance(error, MachineDied) else None
    flight = death.flight if death else error.recording if isinstance(error, DeadlinePassed) else None
    return {
        "interrupted": False,
        "unopened": str(error) if isinstance(error, NotOpened) else None,
        "timed_out": str(error) if isinstance(error, DeadlinePassed) else None,
        "deaths": [one.report() for one in death.deaths] if death else [],
        "crash_record": str(death.crash_record) if death and death.crash_record else None,
        "flight": str(flight) if flight else None,
        "finding": str(error.finding) if error.finding else None,
    }


def write_crash_record(running: RunningMachine, death: MachineDied, flight_s: float = 0.0) -> Path | None:
    """Write one JSON file (deaths, process table, counters, the guest's log, all state); the newest ten are kept.

    None, and a line that says why, when it cannot be written: the death itself is still told.

    On a machine that records, the last `flight_s` seconds are saved beside it, and it names them.
    """
    death.flight = save_flight(running.machine, flight_s, f"crash: {death.deaths[0].report().splitlines()[0]}")
    deaths = [
        {"name": one.name, "pid": one.pid, "how": one.how, "traceback": one.traceback, "held": one.held}
        for one in death.deaths
    ]
    return _write(running.machine, deaths, running.log, death.flight)


def write_orphan_record(name: str) -> Path | None:
    """The record of a machine whose launcher was killed, and of nobody's wish: written by who outlives it.

    The flight is as long as the launcher's would have been. UserError when the machine is gone.
    """
    machine = Machine.attach(name)
    try:
        control = machine.control
        gone = [row for row in control.rows() if row.state == ActorState.ALIVE and not _is_there(row)]
        for row in gone:
            control.set_dead(row.slot, signal.SIGKILL)
        launchers = [row for row in gone if row.kind == ActorKind.LAUNCHER]
        how = "gone without a word; its machine went with it"
        deaths = [{"name": row.name, "pid": row.pid, "how": how, "traceback": "", "held": ()} for row in launchers]
        flight = save_flight(machine, float(machine.config.get("flight_s", 0.0)), "crash: the launcher was killed")
        return _write(machine, deaths, [], flight)
    finally:
        machine.close()


def _is_there(row: ActorRow) -> bool:
    """Whether its process runs still; a number may be somebody else's by now."""
    return start_time_of(row.pid) == row.start_time and not is_over(row.pid)


def _write(
    machine: Machine, deaths: Sequence[Mapping[str, Any]], log: Sequence[str], flight: Path | None
) -> Path | None:
    control = machine.control
    record = {
        "schema": {"name": "vmbus-emu.crash", "version": 1},
        "machine": machine.name,
        "config": machine.config,
        "deaths": deaths,
        "actors": [
            {"name": row.name, "pid": row.pid, "state": row.state.name, "counters": control.counter_values(row.slot)}
            for row in control.rows()
        ],
        "refused": control.refusals()[0],
        "log": log,
        "state": state_of(machine),
        "flight": None if flight is None else str(flight),
    }
    try:
        directory = made(crash_dir())
        path = directory / f"{time.strftime('%Y%m%dT%H%M%S')}-{machine.name}.json"
        path.write_text(json.dumps(record, indent=1, default=str))
    except OSError as error:
        say(f"vmbus-emu: no crash record: {error}")
        return None
    for old in sorted(directory.glob("*.json"))[:-KEPT]:
        old.unlink(missing_ok=True)
    return path


def state_of(machine: Machine) -> dict[str, Any]:
    """The whole state as plain values; where it cannot be read it says why, for the rest of the record matters too."""
    from tools.state_node import UNREADABLE, whole
    from tools.state_tree import StateTree

    try:
        state: dict[str, Any] = whole(StateTree(machine).root())
    except Exception as error:  # whatever killed the machine may have left anything in its memory
        return {UNREADABLE: f"{type(error).__name__}: {error}"}
    return state
