"""`vmbus-emu ctl`'s commands about processors: move a channel's interrupts, take a CPU offline, bring it back."""

from __future__ import annotations

from typing import Any, Final

import click

from emu.errors import UserError
from tools.ctl_guest import ask
from tools.options import json_option, machine_option
from tools.output import print_json, print_table


@click.command()
@click.argument("channel", metavar="DEVICE[/N]")
@click.argument("cpu", type=click.IntRange(min=0))
@machine_option
@json_option
def move(channel: str, cpu: int, machine_name: str | None, as_json: bool) -> None:
    """Let CPU take the interrupts of a channel.

    DEVICE is a relid or an instance GUID, N the index of one of its sub-channels; the relid of a sub-channel will do,
    too. It is what a write to the channel's `cpu` does: the channel must be open, VMBus 4.1 or later.

    \b
    Example:
      vmbus-emu ctl move 3 1
      vmbus-emu ctl move 3/2 0
    """
    device, slash, index = channel.partition("/")
    if slash and not (index.isascii() and index.isdecimal()):
        raise UserError(f"{channel}: {index!r} is no sub-channel's index; write DEVICE/N, as in 3/2")
    answer = ask(machine_name, "move", device=device, index=int(index or 0), cpu=cpu)
    if as_json:
        print_json("ctl-move", 1, answer)
    else:
        click.echo(f"{answer['relid']} {answer['from']} -> {answer['cpu']}")


@click.command()
@click.argument("cpu", type=click.IntRange(min=0))
@machine_option
@json_option
def offline(cpu: int, machine_name: str | None, as_json: bool) -> None:
    """Take CPU offline.

    It refuses while it is needed: CPU 0 takes the host's messages, another one may have a channel's interrupts (move
    those first), one that it has not taken yet, or a program that runs on it.

    \b
    Example:
      vmbus-emu ctl move 3 0
      vmbus-emu ctl offline 1
    """
    _show("offline", ask(machine_name, "cpu_online", cpu=cpu, online=False), as_json)


@click.command()
@click.argument("cpu", type=click.IntRange(min=0))
@machine_option
@json_option
def online(cpu: int, machine_name: str | None, as_json: bool) -> None:
    """Bring CPU back online.

    \b
    Example:
      vmbus-emu ctl online 1
    """
    _show("online", ask(machine_name, "cpu_online", cpu=cpu, online=True), as_json)


@click.command()
@machine_option
@json_option
def cpus(machine_name: str | None, as_json: bool) -> None:
    """List the guest's CPUs.

    VP index, whether online, how many channels interrupt it, and the first of their relids.

    \b
    Example:
      vmbus-emu ctl cpus
    """
    answer = ask(machine_name, "cpus")
    if as_json:
        print_json("ctl-cpus", 1, answer)
    else:
        _print_cpus(answer["cpus"])


def _show(command: str, answer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(f"ctl-{command}", 1, answer)
    else:
        _print_cpus([answer])


def _print_cpus(rows: list[dict[str, Any]]) -> None:
    print_table(
        ("CPU", "VP", "online", "channels", "relids"),
        [
            (
                row["cpu"],
                row["vp_index"],
                "yes" if row["online"] else "no",
                row["channels"],
                " ".join(map(str, row["relids"])) + (" ..." if row["channels"] > len(row["relids"]) else "") or "-",
            )
            for row in rows
        ],
    )


CPU_COMMANDS: Final = (move, offline, online, cpus)
