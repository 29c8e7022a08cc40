"""`vmbus-emu stop`: ask a machine's launcher to end it, and wait until nothing of it is left."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from typing import Final

import click

from emu.control import ActorRow
from emu.errors import DeadlinePassed, UserError
from emu.ipc.segments import is_held, object_name, objects_of
from tools.machines import Life, chosen_machine, find_machine, find_machines, runs, typed
from tools.options import Seconds, json_option, machine_option
from tools.output import print_json, say

DEADLINE_S: Final = 70.0
"""A guest may take 60 s to unload, a stubborn process 5 s to be killed."""


@click.command()
@click.argument("name", required=False)
@machine_option
@click.option("--all", "stop_all", is_flag=True, help="Stop every machine that runs.")
@click.option(
    "--time-limit",
    "limit_s",
    type=Seconds(min=0.1),
    default=DEADLINE_S,
    show_default=True,
    help="Seconds to wait for its end; exit status 124 behind them.",
)
@json_option
def stop(name: str | None, machine_name: str | None, stop_all: bool, limit_s: float, as_json: bool) -> None:
    """Stop a running machine and wait until nothing of it is left.

    The guest unloads, the processes end, shared memory and semaphores go: as after Ctrl-C where it started.

    \b
    Example:
      vmbus-emu stop
      vmbus-emu stop vm4711
    """
    given = (("--all", stop_all), ("--machine", typed(machine_name) is not None), (str(name), name is not None))
    ways = [way for way, is_given in given if is_given]
    if len(ways) > 1:
        raise UserError(f"{ways[0]} and {ways[1]} exclude each other; leave one of them out")
    if stop_all:
        names = [machine.name for machine in find_machines() if machine.life is not Life.DEAD]
    else:
        names = [chosen_machine(machine_name) if name is None else chosen_machine(name, by="NAME")]
    end = time.monotonic() + limit_s
    for one in names:
        stop_machine(one, end - time.monotonic())
    if as_json:
        print_json("stop", 1, {"stopped": names})
    else:
        for one in names:
            say(f"machine {one} has stopped")


def stop_machine(name: str, limit_s: float) -> None:
    """Send SIGTERM to the launcher, wait for its end and for the machine's objects to go.

    UserError when the machine has no launcher yet; DeadlinePassed when anything is left at the end.
    """
    launcher = find_machine(name).launcher
    if launcher is None:
        raise UserError(f"machine {name} is still being made; try again")
    if not runs(launcher) and is_held(object_name(name, "control")):
        raise UserError(f"machine {name} was launched in another PID namespace, a container's perhaps; stop it there")
    end = time.monotonic() + limit_s
    with contextlib.suppress(ProcessLookupError):
        _terminate(launcher, end, what=f"machine {name} to stop", limit_s=limit_s)
    while objects_of(name):
        if time.monotonic() > end:
            raise DeadlinePassed(f"shared objects of machine {name} to go", int(limit_s * 1e9))
        time.sleep(0.02)


def _terminate(launcher: ActorRow, end: float, *, what: str, limit_s: float) -> None:
    """SIGTERM by pidfd, then wait for the end; ProcessLookupError when it is gone already."""
    pidfd = os.pidfd_open(launcher.pid)
    try:
        # The pidfd names one process for good; only now does a look at its start time prove anything.
        if not runs(launcher):
            return
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(max(0, int((end - time.monotonic()) * 1000))):
            raise DeadlinePassed(what, int(limit_s * 1e9))
    finally:
        os.close(pidfd)
