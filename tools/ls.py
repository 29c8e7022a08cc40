"""`vmbus-emu ls`: a running machine's devices in the format of the kernel's `lsvmbus`, byte for byte."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from emu.machine import Machine
from emu.wire.guids import braced
from tools.device_list import ListedDevice, device_report, list_devices
from tools.machines import chosen_machine
from tools.options import json_option, machine_option
from tools.output import print_json


@click.command()
@machine_option
@click.option("-v", "--verbose", "verbosity", count=True, help="Class GUIDs and channels, too; -vv: and paths.")
@json_option
def ls(machine_name: str | None, verbosity: int, as_json: bool) -> None:
    """List a machine's devices as the kernel's lsvmbus does.

    \b
    Example:
      vmbus-emu ls -vv
      vmbus-emu ls --json | jq '.devices[].channels[].vcpu'
    """
    name = chosen_machine(machine_name)
    machine = Machine.attach(name)
    try:
        devices = list_devices(machine)
    finally:
        machine.close()
    if as_json:
        print_json("ls", 1, {"machine": name, "devices": [device_report(device) for device in devices]})
    else:
        sys.stdout.write(lsvmbus(devices, verbosity))


def lsvmbus(devices: Sequence[ListedDevice], verbosity: int) -> str:
    """What `lsvmbus`, `lsvmbus -v` or `lsvmbus -vv` prints for these devices."""
    return "".join(_entry(device, verbosity) for device in sorted(devices, key=lambda device: device.relid))


def _entry(device: ListedDevice, verbosity: int) -> str:
    if verbosity == 0:
        return f"VMBUS ID {device.relid:>2}: {device.description}\n"
    lines = [f"VMBUS ID {device.relid:>2}: Class_ID = {braced(device.class_id)} - {device.description}"]
    if verbosity > 1:
        lines.append(f"\tDevice_ID = {braced(device.device_id)}")
        lines.append(f"\tSysfs path: {device.sysfs_path}")
    for channel in sorted(device.channels, key=lambda channel: channel.relid):
        lines.append(f"\tRel_ID={channel.relid}, target_cpu={channel.cpu}")
    # The entry's channels end with a newline of their own: a blank line follows.
    return "\n".join(lines) + "\n\n"
