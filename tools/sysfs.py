"""`vmbus-emu sysfs -- CMD…`: runs a command that finds the machine's live tree at `/sys/bus/vmbus`.

The tree is served over FUSE, spoken to /dev/fuse directly: each read is answered from the guest's records as
they are then, and fails with the kernel's errno where the kernel's would (EINVAL while there is no ring,
ENODEV when the device went). In a user namespace of one's own this needs no privilege, and no libfuse,
helper or binding (`mfusepy` would need libfuse) is wanted. Where /dev/fuse may not be opened, as in many
containers, the tree is copied into a tmpfs that is refreshed ten times a second: values are up to 0.1 s old,
and what would fail is not there. `--technique` picks one of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import click

from emu.control import ActorKind
from emu.errors import MissingPrerequisite
from emu.machine import Machine
from guestproc.protocol.uevents import PARENT_NAME
from tools.machines import chosen_machine, runs
from tools.options import json_option, machine_option
from tools.output import print_json
from tools.sysfs_live import LiveTree
from tools.sysfs_mounts import FuseMounts, Mounts, TmpfsMounts
from tools.sysfs_namespace import enter_namespaces, mount_point
from tools.sysfs_session import Session, run_inside

BUS: Final = Path("/sys/bus/vmbus")
PARENT: Final = Path("/sys/devices") / PARENT_NAME
TECHNIQUES: Final = ("fuse", "tmpfs")


@click.command(context_settings={"allow_interspersed_args": False})
@machine_option
@click.option(
    "--technique",
    type=click.Choice(TECHNIQUES),
    help="How the tree is made; default: fuse, and tmpfs where that is not to be had.",
)
@json_option
@click.argument("command", metavar="CMD…", nargs=-1, required=True, type=click.UNPROCESSED)
def sysfs(machine_name: str | None, technique: str | None, as_json: bool, command: tuple[str, ...]) -> int:
    """Run a command that sees the machine's live tree at /sys/bus/vmbus.

    CMD runs in its own user and mount namespace, as root over nothing but itself (as in `unshare -rm`); no
    privilege is needed. The rest of /sys stays as it is. The tree is gone when CMD ends: what CMD leaves running
    is killed then. The exit status is CMD's, 128 + n after signal n.

    With fuse, the default because only it is as true as the kernel's own, every read is answered at once from
    the guest kernel's records, errors included (EINVAL without a ring), and a write to bind, unbind, new_id,
    remove_id, driver_override or uevent is done by the guest's kernel; /dev/fuse is all it needs. With tmpfs the
    files are a copy refreshed every 0.1 s, without those whose read would fail, and read-only.

    With --json an object with machine, command and status stands behind what CMD has printed.

    \b
    Example:
      vmbus-emu sysfs -- lsvmbus -vv
      vmbus-emu sysfs -- sh -c 'cat /sys/bus/vmbus/devices/*/channel_vp_mapping'
      vmbus-emu sysfs -- sh -c \\
        'echo nic-class-GUID >/sys/bus/vmbus/drivers/uio_hv_generic/new_id'
      vmbus-emu sysfs -- bash
    """
    name = chosen_machine(machine_name)
    machine = Machine.attach(name)
    tree = LiveTree(machine)

    def vanish() -> None:
        tree.gone = True

    status = run_inside(
        Session(
            command=command,
            environment={"VMBUS_EMU_MACHINE": name},
            prepare=preparation(tree, technique),
            watched=launcher_of(machine),
            on_watched=vanish,
        )
    )
    if as_json:
        print_json("sysfs", 1, {"machine": name, "command": list(command), "status": status})
    return status


def preparation(tree: LiveTree, technique: str | None) -> Callable[[], Mounts]:
    """What the serving process does first: enter the namespaces and mount the tree, by FUSE if it can."""

    def prepare() -> Mounts:
        enter_namespaces()
        for place in (BUS, PARENT):
            mount_point(place)
        trees = {BUS: tree.bus, PARENT: tree.parent}
        if technique != "tmpfs":
            try:
                return FuseMounts(trees)
            except MissingPrerequisite:
                if technique == "fuse":
                    raise
        return TmpfsMounts(trees)

    return prepare


def launcher_of(machine: Machine) -> int:
    """A pidfd of the machine's launcher, which becomes readable when it dies; a pipe's end if it is dead."""
    for row in machine.control.rows():
        if row.kind == ActorKind.LAUNCHER:
            try:
                pidfd = os.pidfd_open(row.pid)
            except ProcessLookupError:
                break
            if runs(row):
                return pidfd
            os.close(pidfd)
    dead, writer = os.pipe()
    os.close(writer)
    return dead
