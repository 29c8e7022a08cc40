"""What a run has to tell: filled while it goes, shown to people or printed as JSON at its end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import click

from emu.control import Control
from emu.mirror import Left
from emu.recording import RecordingWriter
from emu.scenario import Scenario
from emu.task_board import Program, TaskRow
from emu.wire.guids import guid_to_wire
from emu.wire.versions import VERSION_WIN8, version_from_text
from tools.device_list import ListedDevice, device_report
from tools.exit_status import ExitStatus
from tools.nouns import counted, noun
from tools.output import print_json, print_table, say

SHOWN_DEVICES: Final = 40
SHOWN_REFUSALS: Final = 5
NOTED: Final = frozenset(
    {
        "backend-ended",
        "gpadl-never-complete",
        "message-on-contact-connection",
        "messages-undelivered",
        "packets-masked",
        "packets-unannounced",
    }
)
"""What somebody else's guest, or a plugin, did that is let pass, and that its author will want to know all the same."""
LEFT: Final = {
    Left.UNLOADED: "the guest unloaded",
    Left.DETACHED: "the guest detached without UNLOAD",
    Left.DIED: "the guest died without UNLOAD",
}


@dataclass(slots=True)
class Outcome:
    """What a run has to tell at its end, filled as it goes."""

    machine: str
    scenario: Scenario
    seed: int
    foreign: bool = False
    """Somebody else's guest: only the host knows its channels."""
    version: str | None = None
    devices: list[ListedDevice] = field(default_factory=list)
    offers: int = 0
    seen_open: int = 0
    """The most channels that a foreign guest had open at a time."""
    left: Left = Left.NOBODY
    """How somebody else's guest left."""
    boot_s: float | None = None
    opened_at_ns: int | None = None
    """CLOCK_MONOTONIC when the last channel was open: for whoever started this process and timed it."""
    tasks: list[TaskRow] = field(default_factory=list)
    stream: dict[str, Any] | None = None
    counters: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)
    refusals: list[dict[str, Any]] = field(default_factory=list)
    leaked: int | None = None
    faults: list[dict[str, Any]] = field(default_factory=list)
    """The fault plan with its hits (`emu.fault_plan`)."""
    state: dict[str, Any] = field(default_factory=lambda: {"state_violations": [], "unjudged": "it ended before"})
    """What the machine left undone when it had settled (`tools.invariants_settled`)."""
    log: list[str] = field(default_factory=list)
    """The machine's log: the newest of the guest's lines, and the tracebacks of back ends. See `log_explains`."""
    timed_out: str | None = None
    """What was waited for in vain, if that ended it."""
    deaths: list[str] = field(default_factory=list)
    crash_record: str | None = None
    recording: RecordingWriter | None = None
    flight: Path | None = None
    kept: Path | None = None
    """The folder of what was found (`tools.findings`)."""

    @property
    def channels_open(self) -> int:
        """Channels that are open in both directions; the most at a time of somebody else's guest, which closes them."""
        if self.foreign:
            return self.seen_open
        # The guest's OPENED_STATE; the kernel's OPEN_STATE is an offer that nobody has opened.
        return sum(channel.state == "opened" for device in self.devices for channel in device.channels)

    def surely_offered(self) -> int:
        """Channels that the host has offered by the time the guest is up, also those that the guest let go of again.

        What the mirror counts are relids in use, and a few milliseconds late.
        """
        opened = {device.device_id for device in self.devices if device.state == "opened"}
        has_subchannels = self.version is not None and version_from_text(self.version) >= VERSION_WIN8
        return sum(
            1 + (device.subchannels if has_subchannels and device.instance in opened else 0)
            for device in self.scenario.devices()
        )

    @property
    def unopened(self) -> int:
        """Channels that our guest was offered and has not opened."""
        return 0 if self.foreign or self.boot_s is None else max(0, self.offers - self.channels_open)

    def lost(self) -> int:
        """Channels that should be open and are not; a device that no driver takes stays closed rightly.

        A plugin's driver may refuse a device; that is a loss only where a fault of the plan struck.
        """
        struck = any(fault["hits"] for fault in self.faults)
        if not self.unopened or (self.scenario.plugins and not struck):
            return 0
        # Here, as few runs want it: what is imported at the top holds up the boot.
        from guestproc.drivers.driver import takes_sockets
        from guestproc.drivers.table import BUILT_IN

        drivers = [*BUILT_IN, *(one.driver for one in self.scenario.plugins.drivers)]
        # A driver of sockets takes nothing else, and nobody else takes those.
        taken = {(class_id, takes_sockets(driver)) for driver in drivers for class_id in driver.id_table}
        idle = [one for one in self.devices if (guid_to_wire(one.class_id), one.class_name == "hv_sock") not in taken]
        return self.unopened - sum(channel.state != "opened" for one in idle for channel in one.channels)

    @property
    def log_explains(self) -> bool:
        """Whether people are shown the log: where it may say why something is not as it should be, and of plugins."""
        struck = any(fault["hits"] for fault in self.faults)
        return bool(self.scenario.plugins or struck or self.deaths or self.leaked or self.lost())

    def kicks(self) -> dict[str, int]:
        """How often a processor had to be reached, and how."""
        names = {"semaphore": "kicks_semaphore", "signal": "kicks_signal", "none": "kicks_none", "merged": "merged"}
        return {kind: self.counters.get(name, 0) for kind, name in names.items()}

    def finding(self) -> bool:
        """Whether something is wrong with what was seen: a mismatch, a leak, a channel that is not open."""
        return bool(self.findings())

    def findings(self) -> list[str]:
        """What is wrong with what was seen, a line each."""
        lost = self.lost()
        wrong = [one for one in self.tasks if one.errors]
        found = [f"{one.program.name.lower()} on cpu{one.cpu}: {counted(one.errors, 'error')}" for one in wrong]
        if self.stream is not None and not self.stream["sha256_ok"]:
            found.append(_wrong_stream(self.stream))
        found += [LEFT[self.left]] if self.left is Left.DIED else []
        found += [f"not open: {lost:,} of {counted(self.offers, 'channel')}"] if lost else []
        found += [f"leaked: {self.leaked}"] if self.leaked else []
        found += [f"plugin errors: {self.plugin_errors}"] if self.plugin_errors else []
        return [*found, *self.state["state_violations"]]

    @property
    def plugin_errors(self) -> int:
        """Exceptions that plugins let out, on both sides."""
        return self.counters.get("plugin_errors", 0) + self.refused.get("backend-error", 0)

    def report(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {
            "machine": self.machine,
            "version": self.version,
            "era": self.scenario.machine.era,
            "vcpus": self.scenario.machine.vcpus,
            "offers": self.offers,
            "devices": [device_report(device) for device in self.devices],
            "channels_open": self.channels_open,
            "not_open": self.lost(),
            "guest_left": self.left.name.lower() if self.left else None,
            "boot_s": self.boot_s,
            "opened_at_ns": self.opened_at_ns,
            "kicks": self.kicks(),
            "packets": sum(task.packets for task in self.tasks),
            "task_errors": sum(task.errors for task in self.tasks),
            "counters": self.counters,
            "stream": self.stream,
            "refused": self.refused,
            "ignored": self.ignored,
            "refusals": self.refusals,
            "leaked": self.leaked,
            "faults": self.faults,
            **self.state,
            "plugins": self.scenario.plugins.paths,
            "plugin_errors": self.plugin_errors,
            "log": self.log,
            "seed": self.seed,
            "timed_out": self.timed_out,
            "deaths": self.deaths,
            "crash_record": self.crash_record,
            "recording": recording_report(self.recording),
            "flight": None if self.flight is None else str(self.flight),
            "finding": None if self.kept is None else str(self.kept),
        }


def recording_report(recording: RecordingWriter | None) -> dict[str, Any] | None:
    """A recording in numbers, for `--json`."""
    if recording is None:
        return None
    return {"path": str(recording.path), "records": recording.records, "dropped": recording.dropped}


def tell_recording(recording: RecordingWriter | None) -> None:
    """One line of how much was recorded, and how much of it was lost."""
    if recording is not None:
        more = f"; {recording.dropped:,} more {noun(recording.dropped, 'was', 'were')} dropped"
        lost = more if recording.dropped else ", none dropped"
        say(f"{counted(recording.records, 'event')} recorded in {recording.path}{lost}")


def tell_faults(faults: list[dict[str, Any]]) -> None:
    """A line for each fault that the machine was to have."""
    for one in faults:
        hits, seen = one["hits"], one["seen"]
        click.echo(f"fault {one['fault']}: {counted(hits, 'hit')} of {counted(seen, 'occasion')}")


def tell_refused(refused: Mapping[str, int], refusals: Sequence[Mapping[str, Any]]) -> None:
    """What the host refused, by rule, and the newest reasons (as `Control.refusals` gives both)."""
    if not refused:
        return
    click.echo("refused: " + ", ".join(f"{rule} {count}" for rule, count in sorted(refused.items())))
    for line in refused_because(refusals):
        click.echo(f"  {line}")


def tell_noted(ignored: Mapping[str, int], refusals: Sequence[Mapping[str, Any]]) -> None:
    """What the host let pass and is worth knowing, by rule, and why (as `Control.ignored` and `refusals` give it)."""
    noted = {rule: count for rule, count in sorted(ignored.items()) if rule in NOTED}
    if not noted:
        return
    click.echo("noted: " + ", ".join(f"{rule} {count}" for rule, count in noted.items()))
    for line in dict.fromkeys(f"{one['rule']}: {one['text']}" for one in refusals if one["rule"] in noted):
        click.echo(f"  {line}")


def refused_because(refusals: Sequence[Mapping[str, Any]]) -> list[str]:
    """The newest reasons, a line each, the oldest of them first."""
    # Who asks an old host for four newer versions is told so four times, in the same words.
    lines = [f"{one['rule']}: {one['text']}" for one in refusals if not one["legal"]]
    newest = dict.fromkeys(reversed(lines))
    return [*newest][SHOWN_REFUSALS - 1 :: -1]


def joined_refusals(machines: Iterable[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The newest refusals of several machines, one after the other; those that are alike once, with their sum."""
    sums: dict[tuple[object, ...], dict[str, Any]] = {}
    for one in (one for refusals in machines for one in refusals):
        kind = tuple(value for name, value in one.items() if name != "count")
        before = sums.pop(kind, {"count": 0})
        sums[kind] = {**one, "count": before["count"] + one["count"]}
    return [*sums.values()]


def refused_in_bad_faith(control: Control) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """What the host refused, as `Control.refusals`, without what a guest that is right may ask for (INV-30)."""
    # Here, as `run` does not want it: what is imported at the top holds up the boot.
    from tools.invariants_messages import is_in_good_faith

    refused, refusals = control.refusals()
    return (
        {rule: count for rule, count in refused.items() if not is_in_good_faith(rule)},
        [one for one in refusals if not one["legal"] and not is_in_good_faith(one["rule"])],
    )


def show_devices(outcome: Outcome) -> None:
    """The table of devices, and what the exercise found."""
    rows = [
        (
            device.relid,
            device.class_name,
            str(device.device_id),
            device.driver or "-",
            " ".join(f"{channel.relid}@cpu{channel.cpu}" for channel in device.channels),
            device.state,
        )
        for device in outcome.devices[:SHOWN_DEVICES]
    ]
    print_table(("relid", "class", "instance", "driver", "channels", "state"), rows)
    if len(outcome.devices) > SHOWN_DEVICES:
        click.echo(f"… and {len(outcome.devices) - SHOWN_DEVICES} more (vmbus-emu ls lists them)")
    click.echo(f"VMBus {outcome.version}, {_of_channels(outcome)} open after {outcome.boot_s:.3f} s")


def _of_channels(outcome: Outcome) -> str:
    return f"{outcome.channels_open:,} of {counted(outcome.offers, 'channel')}"


def _wrong_stream(stream: Mapping[str, Any]) -> str:
    """What is wrong with a file that did not come back: it ended early, or is another one."""
    if stream["bytes"] < stream["file_bytes"]:
        part = f"{stream['bytes']} of {stream['file_bytes']} {noun(stream['file_bytes'], 'byte')} there and back"
        return f"{stream['path']}: {part}, then relid {stream['relid']} was gone, or its device did not answer"
    return f"{stream['path']} came back with another SHA-256"


def tell(outcome: Outcome, as_json: bool, interrupted: int | None) -> int:
    """Print the end of the run and choose the exit status."""
    status = ExitStatus.FAILED if outcome.deaths else interrupted
    if status is None:
        status = ExitStatus.FINDING if outcome.finding() else ExitStatus.FINE
    if as_json:
        print_json("run", 1, outcome.report())
    else:
        _tell_people(outcome)
        for line in outcome.log if outcome.log_explains else ():
            say(line)
        tell_recording(outcome.recording)
    if outcome.timed_out:
        say(f"vmbus-emu: {outcome.timed_out}")
    for death in outcome.deaths:
        say(f"vmbus-emu: {death}")
    if outcome.crash_record:
        say(f"vmbus-emu: crash record: {outcome.crash_record}")
    if outcome.flight:
        say(f"vmbus-emu: flight recording: {outcome.flight}")
    return status


def _tell_people(outcome: Outcome) -> None:
    if outcome.foreign and outcome.version:
        click.echo(f"VMBus {outcome.version}, {_of_channels(outcome)} open at a time")
    if outcome.left:
        click.echo(LEFT[outcome.left])
    if outcome.tasks:
        echoes = [task for task in outcome.tasks if task.program != Program.NET_CHECK]
        frames = [task for task in outcome.tasks if task.program == Program.NET_CHECK]
        errors, packets = sum(task.errors for task in echoes), sum(task.packets for task in echoes)
        kicks = ", ".join(f"{count} {kind}" for kind, count in outcome.kicks().items())
        click.echo(f"{counted(packets, 'packet')} echoed, {counted(errors, 'error')}; kicks: {kicks}")
        if frames:
            errors, packets = sum(task.errors for task in frames), sum(task.packets for task in frames)
            click.echo(f"{counted(packets, 'frame')} through hv_netlike, {counted(errors, 'error')}")
    if outcome.stream is not None:
        rate = outcome.stream["bytes"] / max(outcome.stream["seconds"], 1e-9) / 1e6
        moved = f"{outcome.stream['bytes']} {noun(outcome.stream['bytes'], 'byte')} there and back at {rate:.1f} MB/s"
        if outcome.stream["sha256_ok"]:
            click.echo(f"{outcome.stream['path']}: {moved}, SHA-256 equal")
        else:
            click.echo(_wrong_stream(outcome.stream))
    tell_refused(outcome.refused, outcome.refusals)
    if outcome.foreign or outcome.scenario.plugins:
        tell_noted(outcome.ignored, outcome.refusals)
    tell_faults(outcome.faults)
    if lost := outcome.lost():
        click.echo(f"not open: {lost:,} of {counted(outcome.offers, 'channel')}")
    if outcome.plugin_errors:
        click.echo(f"plugin errors: {outcome.plugin_errors}")
    for text in outcome.state["state_violations"]:
        click.echo(f"violation: {text}")
    if outcome.leaked:
        click.echo(f"leaked: {outcome.leaked}")
