"""`vmbus-emu top`: a running machine's channels, processors and processes, live."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from typing import Any, Final

import click

from emu.control import ActorKind
from emu.machine import Machine
from tools.crash_records import newest_crash
from tools.exit_status import ExitStatus
from tools.keyboard import keyboard
from tools.machines import chosen_machine, runs
from tools.options import Seconds, json_option, machine_option
from tools.output import console, print_json, print_plain, say
from tools.top_sample import Frame, Sampler, rows_between
from tools.top_view import (
    CHANNEL_COLUMNS,
    HELP,
    PROCESS_COLUMNS,
    SORT_KEYS,
    VP_COLUMNS,
    Wishes,
    channel_cells,
    chosen_channels,
    percent,
    process_cells,
    screen,
    scrolled,
    vp_cells,
    wished,
)

FIRST_LOOK_S: Final = 0.3
"""The first rates are those of this time, so that nobody looks at an empty screen."""


@click.command(epilog=f"Keys: {HELP}.")
@machine_option
@click.option(
    "--interval",
    "interval_s",
    type=Seconds(0.1, 60),
    default=1.0,
    show_default=True,
    help="Seconds between two looks.",
)
@click.option(
    "--sort",
    type=click.Choice(list(SORT_KEYS)),
    default="relid",
    show_default=True,
    help="What channels are sorted by.",
)
@click.option("--filter", "text", default="", help="Only channels with this in their relid, class, state or cpuN.")
@click.option("--once", is_flag=True, help="Print one sample as plain tables, as through a pipe.")
@json_option
def top(machine_name: str | None, interval_s: float, sort: str, text: str, once: bool, as_json: bool) -> int:
    """Watch a machine's channels, processors and processes.

    Ring fill is a bar each way, seen from the guest; mask is who asked for no interrupts of a ring (g: guest, h: host);
    open counts requests that nobody has answered, and oldest is how long the first of them waits; so does a packet
    that the host has not read between two looks.

    \b
    Example:
      vmbus-emu top
      vmbus-emu top --sort packets --filter cpu1
      vmbus-emu top --once | sort -k 6 -n
    """
    machine = Machine.attach(chosen_machine(machine_name))
    try:
        wishes = Wishes(sort=sort, filter=text, interval_s=interval_s)
        if once or as_json or not console(sys.stdout).is_terminal or not _can_draw():
            _print_sample(machine, wishes, as_json)
            return ExitStatus.FINE
        if not _watch(machine, wishes):
            return ExitStatus.FINE
        orderly = machine.stopping
    finally:
        machine.close()
    return _farewell(machine.name, orderly=orderly)


def _can_draw() -> bool:
    return not console(sys.stdout).is_dumb_terminal


def _print_sample(machine: Machine, wishes: Wishes, as_json: bool) -> None:
    sampler = Sampler(machine)
    before = sampler.look_published()
    time.sleep(wishes.interval_s)
    frame = rows_between(before, sampler.look_published(before.traffic_ns or 0))
    if as_json:
        print_json("top", 1, report_of(machine.name, frame, wishes))
        return
    shown = (
        (CHANNEL_COLUMNS, [channel_cells(row, percent) for row in chosen_channels(frame, wishes)]),
        (VP_COLUMNS, [vp_cells(row) for row in frame.vps]),
        (PROCESS_COLUMNS, [process_cells(row) for row in frame.processes]),
    )
    for number, (columns, rows) in enumerate(shown):
        if number:
            click.echo()
        print_plain([heading.replace(" ", "_") for heading, _, _ in columns], rows)


def report_of(machine: str, frame: Frame, wishes: Wishes) -> dict[str, Any]:
    """The object that `--json` prints."""
    return {
        "machine": machine,
        "seconds": frame.seconds,
        "channels": [asdict(row) for row in chosen_channels(frame, wishes)],
        "vps": [asdict(row) for row in frame.vps],
        "processes": [asdict(row) for row in frame.processes],
        "packets": frame.packets,
    }


def _watch(machine: Machine, wishes: Wishes) -> bool:
    """Draw until somebody quits (False) or the machine has gone (True)."""
    from rich.live import Live

    drawn = console(sys.stdout)
    sampler = Sampler(machine)
    before = sampler.look()
    # The screen is given back by Live, the keys by `keyboard`, whatever ends this: a key, a signal, an error.
    with keyboard(sys.stdin.fileno()) as keys, Live(console=drawn, screen=True, auto_refresh=False) as live:
        frame = rows_between(before, before)
        next_s = time.monotonic() + min(FIRST_LOOK_S, wishes.interval_s)
        while True:
            wishes = scrolled(wishes, frame, drawn.height)
            live.update(screen(machine.name, frame, wishes, drawn.width, drawn.height), refresh=True)
            for key in keys.wait(next_s - time.monotonic()):
                wishing = wished(wishes, key)
                if wishing is None:
                    return False
                wishes = wishing
            if gone(machine):
                return True
            if time.monotonic() >= next_s:
                after = sampler.look()
                if not wishes.paused:
                    frame = rows_between(before, after)
                before, next_s = after, time.monotonic() + wishes.interval_s


def gone(machine: Machine) -> bool:
    """Whether the machine ends, or who made it was killed and could not say so."""
    launchers = [row for row in machine.control.rows() if row.kind == ActorKind.LAUNCHER]
    return machine.stopping or not any(runs(row) for row in launchers)


def _farewell(name: str, *, orderly: bool) -> int:
    """Say how the machine that was watched ended; `orderly`: its launcher could still say that it stops."""
    crash = newest_crash(name)
    if crash is not None and crash.age_s < 60:
        say(f"vmbus-emu: {crash.told()}")
        return ExitStatus.FAILED
    if not orderly:
        say(f"vmbus-emu: machine {name} ended without a word: its launcher was killed")
        return ExitStatus.FAILED
    say(f"machine {name} has stopped")
    return ExitStatus.FINE
