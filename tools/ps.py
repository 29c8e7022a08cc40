"""`vmbus-emu ps`: the machines of this user, and how each is."""

from __future__ import annotations

from typing import Any

import click

from emu.wire.versions import version_text
from tools.crash_records import RECENT_S, crash_files
from tools.machines import FoundMachine, Life, find_machines
from tools.options import json_option
from tools.output import print_json, print_table, say


@click.command()
@json_option
def ps(as_json: bool) -> None:
    """List the machines that run, and those that died and left something.

    \b
    Example:
      vmbus-emu ps
      vmbus-emu ps --json | jq -r '.machines[].name'
    """
    rows = [report(machine) for machine in find_machines()]
    there = {row["name"] for row in rows if row["state"] != Life.DEAD.value}
    crashes = [one for one in crash_files() if one.age_s < RECENT_S and one.machine not in there]
    if as_json:
        died = [{"machine": one.machine, "crash_record": str(one.path), "age_s": one.age_s} for one in crashes]
        print_json("ps", 1, {"machines": rows, "died": died})
        return
    table = [
        (
            row["name"],
            row["state"],
            row["pid"] or "-",
            row["vcpus"] or "-",
            row["version"] or "-",
            f"{row['channels_open']}/{row['offers']}",
            "-" if row["up_s"] is None else f"{row['up_s']:.0f} s",
        )
        for row in rows
    ]
    print_table(("name", "state", "pid", "vcpus", "version", "channels", "up"), table)
    if crashes:
        say(crashes[0].told())


def report(machine: FoundMachine) -> dict[str, Any]:
    """One machine as JSON has it: `version` is None while no guest is connected, `pid` is the launcher's."""
    bus = machine.bus
    return {
        "name": machine.name,
        "state": machine.life.value,
        "ready": machine.ready.name.lower(),
        "pid": machine.launcher.pid if machine.launcher else None,
        "vcpus": machine.vcpus,
        "version": version_text(bus.version) if bus and bus.version else None,
        "offers": bus.offers if bus else 0,
        "channels_open": bus.open if bus else 0,
        "up_s": machine.up_s,
    }
