"""The guest's half of `vmbus-emu ctl`: what an administrator does to drivers and devices, as letters to its user space.

Each command is one call (`guestproc.user`); what it refuses is an errno of the kernel's with a cure, in one line.
`uevents` asks nobody: it reads the guest's RAM, as a program reads a netlink socket.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final
from uuid import UUID

import click

from emu import plugin
from emu.control import ActorKind, Control
from emu.errors import UserError
from emu.faults import MOST_TIMES, PLACES
from emu.ipc.atomics import ACQUIRE
from emu.machine import USER_WAKEUP, Machine
from emu.orders import OrderDesk, OrderState, Recipient
from emu.wire.device_classes import BY_NAME
from guestproc.kernel.layout import BOOT_MAGIC, BOOT_RECORD_GPA, KernelTables
from guestproc.protocol import uevent_text
from guestproc.protocol.uevent_text import Uevent
from tools.machines import chosen_machine, runs
from tools.options import json_option, machine_option, relid_of
from tools.output import print_json, print_table, say

FOLLOW_S: Final = 0.05
NO_OVERRIDE: Final = "none"


@contextmanager
def machine_with_guest(name: str | None) -> Iterator[Machine]:
    """The chosen machine; UserError when its guest is somebody else's, who keeps his own drivers."""
    machine = Machine.attach(chosen_machine(name))
    try:
        if machine.config["no_guest"]:
            raise UserError(f"machine {machine.name} has no guest of ours; start one without --no-guest")
        yield machine
    finally:
        machine.close()


def ask_guest(machine: Machine, what: str, **arguments: Any) -> dict[str, Any]:
    """Ask a call of the guest's user space; raises as `OrderDesk.ask` does."""
    return _ask_at(OrderDesk(machine.control), machine, what, **arguments)


def _ask_at(desk: OrderDesk, machine: Machine, what: str, **arguments: Any) -> dict[str, Any]:
    wake = machine.wakeup(f"actor.{USER_WAKEUP}").post
    return desk.ask(Recipient.GUEST, what, wake, **arguments)


@contextmanager
def telling_what_became_of(desk: OrderDesk, what: str) -> Iterator[None]:
    """Who interrupts an order hears whether it may be carried out all the same: in one line, and is let through."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if desk.newest is OrderState.POSTED:
            see = "`vmbus-emu ls` and `vmbus-emu inspect` show what there is"
            say(f"vmbus-emu: interrupted before `{what}` was answered: it may be done all the same; {see}")
        elif desk.newest is OrderState.FREE:
            say(f"vmbus-emu: interrupted before `{what}` was read: it is not done")
        raise


def _ask(machine: Machine, what: str, **arguments: Any) -> dict[str, Any]:
    """Ask it for a user, who may interrupt it; the answer, with the machine's name in front."""
    desk = OrderDesk(machine.control)
    with telling_what_became_of(desk, what):
        return {"machine": machine.name, **_ask_at(desk, machine, what, **arguments)}


def ask(name: str | None, what: str, **arguments: Any) -> dict[str, Any]:
    """Ask it of the chosen machine; the answer, with the machine's name in front."""
    with machine_with_guest(name) as machine:
        return _ask(machine, what, **arguments)


def _with_class(machine_name: str | None, what: str, driver: str, text: str) -> dict[str, Any]:
    """Ask something of a driver and a class as a user names it: its GUID, or the name that it has here."""
    with machine_with_guest(machine_name) as machine:
        classes = {**BY_NAME, **plugin.known_from(machine.config).classes}
        if text not in classes and not _is_guid(text):
            raise UserError(f"{text} is no class and no GUID; there are the classes {', '.join(sorted(classes))}")
        guid = str(classes[text].guid) if text in classes else text
        return _ask(machine, what, driver=driver, guid=guid)


def _is_guid(text: str) -> bool:
    try:
        UUID(text)
    except ValueError:
        return False
    return True


def _is_device(text: str) -> bool:
    """Whether it looks like a device as a user names it, and not like a driver."""
    return text.isdecimal() or _is_guid(text)


def _in_order(usage: str, driver: str, device: str) -> None:
    """UserError for a driver and a device that were given the other way round."""
    if _is_device(driver) and not _is_device(device):
        raise UserError(f"{driver} is a device and {device} is none; the order is `vmbus-emu ctl {usage}`")


# -- devices --------------------------------------------------------------------------------------------


@click.command()
@click.argument("driver")
@click.argument("device")
@machine_option
@json_option
def bind(driver: str, device: str, machine_name: str | None, as_json: bool) -> None:
    """Let DRIVER probe DEVICE, and keep it.

    DEVICE is a relid or an instance GUID. The driver must match it: by its ids, by one added with new-id, or by an
    override. It is what a write to the driver's `bind` does.

    \b
    Example:
      vmbus-emu ctl bind hv_echo 3
    """
    _in_order(f"bind {device} {driver}", driver, device)
    _show_device("bind", ask(machine_name, "bind", driver=driver, device=device), as_json)


@click.command()
@click.argument("device")
@machine_option
@json_option
def unbind(device: str, machine_name: str | None, as_json: bool) -> None:
    """Take DEVICE from its driver; it stays, unbound.

    DEVICE is a relid or an instance GUID. The driver closes its channel.

    \b
    Example:
      vmbus-emu ctl unbind 3
    """
    _show_device("unbind", ask(machine_name, "unbind", device=device), as_json)


@click.command()
@click.argument("device")
@click.argument("driver", metavar="DRIVER|none")
@machine_option
@json_option
def override(device: str, driver: str, machine_name: str | None, as_json: bool) -> None:
    """Let only DRIVER bind DEVICE; `none` takes that back.

    It needs no id for it then. Nothing is unbound or probed by it, as in the kernel: unbind and bind do that.

    \b
    Example:
      vmbus-emu ctl override 3 uio_hv_generic
      vmbus-emu ctl unbind 3
      vmbus-emu ctl bind uio_hv_generic 3
    """
    _in_order(f"override {driver} {device}", driver, device)
    name = "" if driver == NO_OVERRIDE else driver
    _show_device("override", ask(machine_name, "override", device=device, driver=name), as_json)


def _show_device(command: str, answer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(f"ctl-{command}", 1, answer)
        return
    only = f" (override: {answer['driver_override']})" if answer["driver_override"] else ""
    click.echo(f"{answer['device']} {answer['driver'] or '-'}{only}")


# -- drivers --------------------------------------------------------------------------------------------


@click.command(name="new-id")
@click.argument("driver")
@click.argument("guid", metavar="GUID|CLASS")
@machine_option
@json_option
def new_id(driver: str, guid: str, machine_name: str | None, as_json: bool) -> None:
    """Let DRIVER take a class of devices, too.

    Those that have no driver are probed at once.

    \b
    Example:
      vmbus-emu ctl new-id uio_hv_generic f8615163-df3e-46c5-913f-f2d2f965ed0e
      vmbus-emu ctl new-id uio_hv_generic nic
    """
    _show_drivers("new-id", _with_class(machine_name, "new_id", driver, guid), as_json)


@click.command(name="remove-id")
@click.argument("driver")
@click.argument("guid", metavar="GUID|CLASS")
@machine_option
@json_option
def remove_id(driver: str, guid: str, machine_name: str | None, as_json: bool) -> None:
    """Take an id back that new-id gave to DRIVER.

    Devices that are bound stay so.

    \b
    Example:
      vmbus-emu ctl remove-id uio_hv_generic nic
    """
    _show_drivers("remove-id", _with_class(machine_name, "remove_id", driver, guid), as_json)


@click.command()
@click.argument("driver")
@machine_option
@json_option
def register(driver: str, machine_name: str | None, as_json: bool) -> None:
    """Register DRIVER, like modprobe.

    It is probed with the devices that it matches and that have no driver.

    \b
    Example:
      vmbus-emu ctl register hv_echo
    """
    _show_drivers("register", ask(machine_name, "register", driver=driver), as_json)


@click.command()
@click.argument("driver")
@machine_option
@json_option
def unregister(driver: str, machine_name: str | None, as_json: bool) -> None:
    """Forget DRIVER, like rmmod.

    Its channels are closed, its devices stay, unbound.

    \b
    Example:
      vmbus-emu ctl unregister hv_echo
    """
    _show_drivers("unregister", ask(machine_name, "unregister", driver=driver), as_json)


@click.command()
@machine_option
@json_option
def drivers(machine_name: str | None, as_json: bool) -> None:
    """List the guest's drivers.

    Number, whether registered, how many devices are bound, how many ids it was written with, and those added.

    \b
    Example:
      vmbus-emu ctl drivers
    """
    answer = ask(machine_name, "drivers")
    if as_json:
        print_json("ctl-drivers", 1, answer)
        return
    _print_drivers(answer["drivers"])


def _show_drivers(command: str, answer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(f"ctl-{command}", 1, answer)
    else:
        _print_drivers([answer])


def _print_drivers(rows: list[dict[str, Any]]) -> None:
    print_table(
        ("driver", "number", "registered", "devices", "ids", "added ids"),
        [
            (
                row["name"],
                row["number"],
                "yes" if row["registered"] else "no",
                row["devices"],
                row["static_ids"],
                " ".join(row["dynamic_ids"]) or "-",
            )
            for row in rows
        ],
    )


# -- faults ---------------------------------------------------------------------------------------------


@click.command()
@click.argument("where", type=click.Choice(PLACES), metavar="WHERE")
@click.option(
    "--times", type=click.IntRange(0, MOST_TIMES), default=1, show_default=True, help="How often; 0 takes it back."
)
@click.option("--relid", callback=relid_of, help="Of this relid only; default: of whichever is next.")
@machine_option
@json_option
def fail(where: str, times: int, relid: int | None, machine_name: str | None, as_json: bool) -> None:
    """Let a step of the guest fail, the next times.

    Prints what is planned. WHERE is alloc_channel or work_alloc (no memory for the channel, or for its second half),
    device_create, device_register, add_kobj (of a channel's directory), message_work (for a message that a worker
    takes), request (for one that is to be answered), probe (-EIO), or probe_hang: that one waits until `--times 0`,
    the machine's shutdown, or 30 s.

    \b
    Example:
      vmbus-emu ctl fail device_register
      vmbus-emu ctl offer echo
      vmbus-emu ctl fail probe_hang --relid 9
      vmbus-emu ctl fail probe_hang --times 0
    """
    answer = ask(machine_name, "fail", where=where, times=times, relid=relid or 0)
    if as_json:
        print_json("ctl-fail", 1, answer)
        return
    for one in answer["faults"]:
        left = "every time" if one["times"] is None else f"{one['times']} more"
        click.echo(f"{one['where']}: {left}" + (f", relid {one['relid']}" if one["relid"] else ""))


# -- uevents --------------------------------------------------------------------------------------------


@click.command()
@click.option("--follow", is_flag=True, help="Go on with what comes, until Ctrl-C or the machine's end.")
@machine_option
@json_option
def uevents(follow: bool, machine_name: str | None, as_json: bool) -> None:
    """Print the newest uevents of the guest's bus.

    At most 64, as `udevadm monitor --property` prints them.

    \b
    Example:
      vmbus-emu ctl uevents
      vmbus-emu ctl uevents --follow
    """
    if follow and as_json:
        raise UserError("--follow prints as it goes and --json one object at the end; choose one of them")
    with machine_with_guest(machine_name) as machine:
        tables = _tables_of(machine)
        found = uevent_text.since(tables, 0)
        if as_json:
            rows = [
                {"seqnum": one.seqnum, "machine_ns": one.machine_ns, "head": one.head, "variables": one.variables}
                for one in found
            ]
            print_json("ctl-uevents", 1, {"machine": machine.name, "uevents": rows})
            return
        _print_uevents(found)
        last = found[-1].seqnum if found else 0
        while follow and not machine.stopping and launcher_runs(machine.control):
            found = uevent_text.since(tables, last)
            _print_uevents(found)
            last = found[-1].seqnum if found else last
            time.sleep(FOLLOW_S)


def launcher_runs(control: Control) -> bool:
    """Whether who made the machine still lives; one that was killed could not say that it stops."""
    return any(row.kind == ActorKind.LAUNCHER and runs(row) for row in control.rows())


def _tables_of(machine: Machine) -> KernelTables:
    """The guest kernel's records; UserError before it has laid them out."""
    if machine.ram.view.load_u64(BOOT_RECORD_GPA, ACQUIRE) != BOOT_MAGIC:
        raise UserError(f"the guest of machine {machine.name} has not booted yet; try again")
    return KernelTables.attach(machine.ram.apart)


def _print_uevents(found: list[Uevent]) -> None:
    for one in found:
        click.echo(f"KERNEL[{one.machine_ns / 1e9:.6f}] {one.head}")
        for key, value in one.variables.items():
            click.echo(f"{key}={value}")
        click.echo()
    sys.stdout.flush()


GUEST_COMMANDS: Final = (bind, unbind, override, new_id, remove_id, register, unregister, drivers, fail, uevents)
