"""`vmbus-emu clean`: remove what machines left behind whose launcher and sweeper were killed at once.

Only machines that are dead are touched, only objects under their names, and only this user's.
"""

from __future__ import annotations

import click

from emu.ipc.segments import objects_of, unlink_objects
from tools.machines import Life, find_machines
from tools.nouns import counted
from tools.options import json_option
from tools.output import print_json, say


@click.command()
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")
@json_option
def clean(dry_run: bool, as_json: bool) -> None:
    """Remove what killed machines left behind; running machines are not touched.

    \b
    Example:
      vmbus-emu clean
      vmbus-emu clean --dry-run
    """
    removed = {}
    for machine in find_machines():
        if machine.life is Life.DEAD:
            removed[machine.name] = len(objects_of(machine.name)) if dry_run else unlink_objects(machine.name)
    if as_json:
        print_json("clean", 1, {"dry_run": dry_run, "removed": removed})
        return
    for name, count in removed.items():
        say(f"machine {name}: {counted(count, 'object')} {'would be ' if dry_run else ''}removed")
    if not removed:
        say("nothing to clean")
