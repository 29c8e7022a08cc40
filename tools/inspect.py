"""`vmbus-emu inspect`: a machine's whole state as a tree, of one that runs or of one that died."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from emu.errors import UserError
from emu.machine import Machine
from tools.machines import chosen_machine, typed
from tools.options import json_option, machine_option
from tools.output import print_json, say
from tools.state_node import Node, NoSuchNode, find, flat, indented, parts_of, text_of, whole
from tools.state_tree import StateTree

FIRST_DEPTH = 2
_HINT = "give a file that a machine left when it died: `vmbus-emu ps` names them"


@click.command()
@click.argument("path", default="")
@machine_option
@click.option(
    "--from",
    "saved",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="A crash record, instead of a running machine.",
)
@json_option
def inspect(path: str, machine_name: str | None, saved: Path | None, as_json: bool) -> None:
    """Show a machine's whole state as a tree, live or as it died.

    PATH names a branch of it, or a leaf, which is printed alone: channels, connection, counters, devices, drivers,
    faults, gpadls, ignored, machine, ports, processes, queues, refused, requests, tasks, vps. Both ends are joined:
    what the host knows of a channel stands beside what the guest does. The machine is not disturbed: shared memory is
    read, nothing else.

    \b
    Example:
      vmbus-emu inspect channels/1/host/state
      vmbus-emu inspect vps/0/sint/2
      vmbus-emu inspect queues | grep length
      vmbus-emu inspect --from crash.json processes
    """
    path = "/".join(parts_of(path))
    with _tree(machine_name, saved) as (name, root):
        try:
            node = find(root, path)
        except NoSuchNode as error:
            raise UserError(f"{error}") from None
        if as_json:
            print_json("inspect", 1, {"machine": name, "path": path, "value": whole(node)})
        elif not isinstance(node, Mapping):
            click.echo(text_of(node))
        elif not sys.stdout.isatty():
            for leaf, value in flat(node, path):
                click.echo(f"{leaf}  {text_of(value)}")
        else:
            for line in indented(node, None if path else FIRST_DEPTH):
                click.echo(line)
            if not path:
                say("`vmbus-emu inspect PATH` shows all of a branch, like channels/1 or vps/0")


@contextmanager
def _tree(machine_name: str | None, saved: Path | None) -> Iterator[tuple[str, Node]]:
    """The name of a machine and its tree."""
    if saved is not None:
        if typed(machine_name) is not None:
            raise UserError("--from and --machine exclude each other; leave one of them out")
        record = saved_record(saved)
        yield record["machine"], record["state"]
        return
    machine = Machine.attach(chosen_machine(machine_name))
    try:
        yield machine.name, StateTree(machine).root()
    finally:
        machine.close()


def saved_record(path: Path) -> dict[str, Any]:
    """A crash record with the state of its machine; UserError when the file is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--from {path}: {error.strerror}; {_HINT}") from None
    except ValueError:
        raise UserError(f"--from {path}: no crash record; {_HINT}") from None
    if not isinstance(record, dict) or record.get("schema", {}).get("name") != "vmbus-emu.crash":
        raise UserError(f"--from {path}: no crash record; {_HINT}")
    if not isinstance(record.get("state"), dict):
        raise UserError(f"--from {path}: a crash record of an older version, without the machine's state; {_HINT}")
    return record
