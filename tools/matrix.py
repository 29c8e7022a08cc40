"""`vmbus-emu matrix`: boots the guest of each era on a host of each version, and says what they agreed on."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from typing import Final

import click

from emu.control import Ready
from emu.errors import DeadlinePassed
from emu.mirror import Mirror
from emu.scenario import ERAS, DeviceSpec, MachineSpec, Scenario
from emu.task_board import TaskState
from emu.wire.versions import KNOWN_VERSIONS, version_text
from tools.crash import write_crash_record
from tools.early_signals import raise_noted
from tools.exit_status import ExitStatus, noting_interruption
from tools.guest_versions import predicted
from tools.launch import BOOT_TIMEOUT_S, MachineDied, RunningMachine, launch
from tools.nouns import counted
from tools.options import json_option
from tools.output import narrates, print_json, print_table, say
from tools.run_machine import exercise

VCPUS: Final = 2
DEVICES: Final = 4
RAM_BYTES: Final = 64 << 20
REFUSAL: Final = "vmbus_connect: EDOM"
"""What a guest dies of whose versions the host has none of."""


@dataclass(frozen=True, slots=True)
class Boot:
    """What came of one era on one host; `refused` says why there was no connection, None: there was one.

    `died`: a process of the machine ended for another reason than that the host speaks no version of the guest's.
    """

    era: str
    version: str
    negotiated: str | None = None
    offers: int = 0
    channels_open: int = 0
    packets: int = 0
    leaked: int = 0
    refused: str | None = None
    ok: bool = False
    died: bool = False


@click.command()
@json_option
def matrix(as_json: bool) -> int:
    """Boot every era of the guest on every version of the host.

    One boot after the other, with 2 vCPUs and 4 devices; each exchanges some packets and shuts down. Exit
    status 1 when one of them did otherwise than the protocol says: a guest that asks for newer versions only is
    to be refused. Exit status 4 when a process of one of them died.

    \b
    Example:
      vmbus-emu matrix
      vmbus-emu matrix --json | jq -r '.results[] | select(.ok | not)'
    """
    results = []
    with noting_interruption() as interruption, closing(boot_all()) as boots:
        raise_noted()
        for result in boots:
            results.append(result)
            if not as_json and narrates():
                say(f"{result.era} on {result.version}: {result.negotiated or 'refused'}")
    if as_json:
        told = {"results": [asdict(result) for result in results]}
        print_json("matrix", 1, {**told, "interrupted": interruption.status is not None})
    else:
        show(results)
    if interruption.status is not None:
        return interruption.status
    if any(result.died for result in results):
        return ExitStatus.FAILED
    return ExitStatus.FINE if all(result.ok for result in results) else ExitStatus.FINDING


def boot_all() -> Generator[Boot, None, None]:
    """Every pair, on one machine that is switched off and on in between; another one behind a death."""
    with ExitStack() as stack:
        running: RunningMachine | None = None
        for era in ERAS:
            for version in KNOWN_VERSIONS:
                scenario = scenario_of(era, version)
                if running is None:
                    running = stack.enter_context(launch(scenario))
                else:
                    running.power_cycle(scenario)
                result = boot(running)
                if result.died:
                    stack.close()
                    running = None
                yield result


def scenario_of(era: str, version: int) -> Scenario:
    """The machine of one pair."""
    machine = MachineSpec(vcpus=VCPUS, ram_bytes=RAM_BYTES, era=era, host_version=version)
    return Scenario(machine, (DeviceSpec(count=DEVICES),), "the matrix")


def boot(running: RunningMachine) -> Boot:
    """What comes of a machine that was just switched on, up to its guest's end."""
    spec = running.scenario.machine
    expected = predicted(spec.era, spec.host_version)
    try:
        running.wait_ready(Ready.CHANNELS_OPEN, timeout_s=BOOT_TIMEOUT_S)
        return _used(running, expected)
    except (MachineDied, DeadlinePassed) as error:
        text = _cause(error)
        refused = REFUSAL in text
        died = False
        if isinstance(error, MachineDied) and not refused:
            record = write_crash_record(running, error)
            text += "" if record is None else f"; crash record: {record}"
            died = True
        ok = expected is None and refused
        return Boot(spec.era, version_text(spec.host_version), refused=text, ok=ok, died=died)


def _used(running: RunningMachine, expected: int | None) -> Boot:
    """A machine that came up: count, exchange packets, let the guest go."""
    spec = running.scenario.machine
    mirror = Mirror(running.machine.control)
    running.wait_until(lambda: mirror.head().open == DEVICES, BOOT_TIMEOUT_S, "the host to have opened every channel")
    head = mirror.head()
    tasks = exercise(running)
    done = running.shut_down_guest()
    leaked = running.leaked()
    right = head.version == expected and head.offers == DEVICES and done and not leaked
    return Boot(
        era=spec.era,
        version=version_text(spec.host_version),
        negotiated=version_text(head.version),
        offers=head.offers,
        channels_open=head.open,
        packets=sum(task.packets for task in tasks),
        leaked=leaked,
        ok=right and all(task.state == TaskState.DONE and not task.errors for task in tasks),
    )


def _cause(error: MachineDied | DeadlinePassed) -> str:
    """Why a machine did not come up, in one line: the last of a traceback, if a process left one."""
    said = error.deaths[0].traceback or error.deaths[0].report() if isinstance(error, MachineDied) else str(error)
    return said.strip().splitlines()[-1]


def show(results: list[Boot]) -> None:
    """The table for people."""
    rows = [
        (
            result.era,
            result.version,
            result.negotiated or "refused" if result.ok else result.negotiated or "-",
            result.offers,
            result.channels_open,
            result.packets,
            "ok" if result.ok else _verdict(result),
        )
        for result in results
    ]
    print_table(("era", "host", "negotiated", "offers", "open", "packets", ""), rows)
    wrong, died = sum(not result.ok and not result.died for result in results), sum(result.died for result in results)
    told = [f"{wrong} of them not as the protocol says"] if wrong else []
    told += [f"{died} of them died"] if died else []
    click.echo(", ".join([counted(len(results), "machine"), *told]) if told else f"{len(results)} ok")


def _verdict(result: Boot) -> str:
    """What is wrong with a machine, for the last column."""
    said = f": {result.refused}" if result.refused else ""
    return f"{'DIED' if result.died else 'WRONG'}{said}"
