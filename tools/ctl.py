"""`vmbus-emu ctl`: what a user asks of a running machine: hot add and hot remove here, the guest's half next door."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import click

from emu import plugin
from emu.errors import DeadlinePassed, NotOpened, UserError
from emu.machine import Machine
from emu.mirror import Mirror
from emu.orders import OrderDesk, OrderState, Recipient
from emu.scenario import parse_device
from emu.scenario_text import Nonsense, guid
from emu.vmexit import HostBell
from hostproc.protocol.states import ChannelState
from tools.ctl_cpus import CPU_COMMANDS
from tools.ctl_guest import GUEST_COMMANDS, telling_what_became_of
from tools.exit_status import ExitStatus, noting_interruption
from tools.machines import chosen_machine
from tools.options import json_option, machine_option, relid_of
from tools.output import print_json, say
from tools.unopened import Unopened

WAIT_S: Final = 10.0
OFFERED_AT_ONCE: Final = 64
"""Devices that one order offers: their names are its answer."""
_LOOK_S: Final = 0.001


@click.group(invoke_without_command=True)
@click.pass_context
def ctl(ctx: click.Context) -> None:
    """Offer and rescind devices, bind drivers, move interrupts, let steps of the guest fail.

    \b
    Example:
      vmbus-emu ctl offer echo
      vmbus-emu ctl rescind 9
      vmbus-emu ctl unbind 3
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


for command in (*GUEST_COMMANDS, *CPU_COMMANDS):
    ctl.add_command(command)


def ask_host(machine: Machine, what: str, **arguments: Any) -> dict[str, Any]:
    """Order something of the host; raises as `OrderDesk.ask` does."""
    return _ask_at(OrderDesk(machine.control), machine, what, **arguments)


def _ask_at(desk: OrderDesk, machine: Machine, what: str, **arguments: Any) -> dict[str, Any]:
    bell = HostBell(machine.doorbells.view, machine.wakeup("host"))
    return desk.ask(Recipient.HOST, what, bell.wake, **arguments)


def offer_devices(
    machine: Machine, device: str, *, backend: str | None = None, instance: str | None = None
) -> list[dict[str, Any]]:
    """Offer what `CLASS[:COUNT]` says; each device's relid, generation, instance and class. Raises as `offering`."""
    return [one for some in offering(machine, device, backend=backend, instance=instance) for one in some]


def offering(
    machine: Machine, device: str, *, backend: str | None, instance: str | None, desk: OrderDesk | None = None
) -> Iterator[list[dict[str, Any]]]:
    """As `offer_devices`, order by order: an answer has room for a few, so many are several orders.

    UserError, which also says how many were offered before.
    """
    desk = desk or OrderDesk(machine.control)
    spec = parse_device(device, plugin.known_from(machine.config), flag="CLASS[:COUNT]")
    if instance and spec.count != 1:
        raise UserError("--instance names one device; leave it or the count out")
    arguments = {"class": spec.class_name, "backend": backend or spec.backend, "instance": instance}
    offered = 0
    while offered < spec.count:
        count = min(OFFERED_AT_ONCE, spec.count - offered)
        try:
            some = _ask_at(desk, machine, "offer", count=count, **arguments)["offered"]
        except UserError as error:
            raise UserError(f"{error}; {offered} were offered before" if offered else str(error)) from None
        offered += len(some)
        yield some


def instance_option(value: str | None) -> str | None:
    """A GUID as a flag gives it; UserError otherwise."""
    try:
        return None if value is None else str(guid(value))
    except Nonsense as nonsense:
        raise UserError(f"--instance: {nonsense.what}; {nonsense.cure}") from None


@dataclass(slots=True)
class Ending:
    """How a wait ended that was not waited to its end: by its deadline, or by a signal with this exit status."""

    late: DeadlinePassed | None = None
    status: int | None = None

    def report(self) -> dict[str, Any]:
        """What `--json` tells of it."""
        return {"timed_out": None if self.late is None else str(self.late), "interrupted": self.status is not None}


@contextmanager
def noting_ending() -> Iterator[Ending]:
    """Let neither deadline nor signal end the command, which has done something by then and tells it first."""
    ending = Ending()
    with noting_interruption() as interruption:
        try:
            yield ending
        except DeadlinePassed as late:
            ending.late = late
    ending.status = interruption.status


@ctl.command()
@click.argument("device", metavar="CLASS[:COUNT]")
@click.option("--backend", help="The back end behind it; default: its class's own, else echo.")
@click.option("--instance", metavar="GUID", help="Its instance GUID; default: one that is not in use.")
@click.option("--wait", is_flag=True, help="Wait until the guest has opened every channel, or has failed to.")
@machine_option
@json_option
def offer(
    device: str, backend: str | None, instance: str | None, wait: bool, machine_name: str | None, as_json: bool
) -> int:
    """Offer a device (hot add).

    Prints its relid and instance. With --wait exit status 1 says that a device was offered and will not be open: its
    probe failed, no driver has taken it, it is gone again, or the machine was stopped; 124 that after 10 s neither is
    known.

    \b
    Example:
      vmbus-emu ctl offer nic --wait
      vmbus-emu ctl offer echo:4
    """
    chosen_instance = instance_option(instance)
    machine = Machine.attach(chosen_machine(machine_name))
    desk = OrderDesk(machine.control)
    offered: list[dict[str, Any]] = []
    unopened: list[dict[str, Any]] = []
    try:
        with noting_ending() as ending:
            with telling_what_became_of(desk, "offer"):
                for some in offering(machine, device, backend=backend, instance=chosen_instance, desk=desk):
                    offered += some
                    if not as_json:
                        # Before the wait: who interrupts it has these devices all the same.
                        for one in some:
                            click.echo(f"{one['relid']} {one['instance']}")
            if wait:
                unopened.extend(_waiting_for_each(machine, offered))
        if unseen := sum(not one["relid"] for one in offered):
            say(f"{unseen} of {len(offered)} without a relid, for the next REQUESTOFFERS: {why_no_relid(machine)}")
    finally:
        machine.close()
    if as_json:
        told = {"machine": machine.name, "offered": offered, "not_open": unopened}
        unanswered = desk.newest is OrderState.POSTED
        print_json("ctl-offer", 1, {**told, "unanswered": unanswered, **ending.report()})
    if ending.late is not None:
        raise ending.late
    return ending.status or (ExitStatus.FINDING if unopened else ExitStatus.FINE)


def _waiting_for_each(machine: Machine, offered: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Wait until what was offered is open; relid, instance and reason of each that will not be, also on stderr."""
    for one in offered:
        try:
            wait_until_open(machine, one["relid"], one["generation"])
        except NotOpened as lost:
            say(f"vmbus-emu: {lost}")
            yield {"relid": one["relid"], "instance": one["instance"], "why": lost.why}


@ctl.command()
@click.argument("relid", callback=relid_of, required=False)
@click.option("--instance", metavar="GUID", help="The device's instance GUID instead of a relid.")
@click.option("--wait", is_flag=True, help="Wait until the guest has released the relid.")
@machine_option
@json_option
def rescind(relid: int | None, instance: str | None, wait: bool, machine_name: str | None, as_json: bool) -> int:
    """Take a device back (hot remove).

    At any moment, also amid its opening.

    \b
    Example:
      vmbus-emu ctl rescind 3 --wait
    """
    chosen_instance = instance_option(instance)
    if (relid is None) == (chosen_instance is None):
        raise UserError("give either a relid or --instance GUID")
    machine = Machine.attach(chosen_machine(machine_name))
    try:
        desk = OrderDesk(machine.control)
        with telling_what_became_of(desk, "rescind"):
            answer = _ask_at(desk, machine, "rescind", relid=relid or 0, instance=chosen_instance or "")
        if not as_json:
            click.echo(f"{answer['relid']} {answer['instance']}")
        with noting_ending() as ending:
            if wait and answer["relid"]:
                wait_until_released(machine, answer["relid"], answer["generation"])
    finally:
        machine.close()
    if as_json:
        print_json("ctl-rescind", 1, {"machine": machine.name, **answer, **ending.report()})
    if ending.late is not None:
        raise ending.late
    return ending.status or ExitStatus.FINE


def wait_until_open(machine: Machine, relid: int, generation: int) -> None:
    """Watch the host's mirror until this life of a relid is open.

    UserError when there is no guest to open it; NotOpened once it is known that none will (`Unopened`).
    """
    if not relid:
        raise UserError(f"--wait: {why_no_relid(machine)}, so nobody will open it; leave --wait out")
    mirror, unopened = Mirror(machine.control), Unopened(machine, relid, generation)

    def opened() -> bool:
        channel = mirror.channel(relid)
        if channel is not None and channel.generation >= generation and channel.state == ChannelState.OPEN:
            return True
        if why := unopened.why():
            raise NotOpened(relid, why)
        return False

    _watch(opened, f"relid {relid} to be open")


def why_no_relid(machine: Machine) -> str:
    """Why a device that is there was given no relid."""
    return "all relids are in use" if Mirror(machine.control).head().version else "no guest is connected"


def wait_until_released(machine: Machine, relid: int, generation: int) -> None:
    """Watch the host's mirror until the guest has given this life of a relid back."""
    mirror = Mirror(machine.control)
    _watch(lambda: mirror.is_over(relid, generation), f"relid {relid} to be released")


def _watch(done: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not done():
        if time.monotonic() > end:
            raise DeadlinePassed(what, int(WAIT_S * 1e9))
        time.sleep(_LOOK_S)
