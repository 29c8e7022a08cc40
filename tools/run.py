"""`vmbus-emu run`: boot a machine, show its devices appear, let packets flow, and take everything away again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

import click

from emu.control import Ready
from emu.errors import DeadlinePassed, UserError
from emu.mirror import Mirror
from emu.scenario import Scenario, parse_device
from emu.task_board import Program, TaskRow, TaskState
from emu.wire.versions import version_text
from tools.crash import write_crash_record
from tools.device_list import ListedDevice, device_report, list_devices
from tools.exit_status import ExitStatus
from tools.launch import BOOT_TIMEOUT_S, MachineDied, RunningMachine, by_hand_command, launch
from tools.options import json_option, scenario_argument
from tools.output import narrates, print_json, print_table, say

ECHO_PACKETS: Final = 32
CRUNCH_NUMBERS: Final = 400
TASK_TIMEOUT_S: Final = 60.0
BY_HAND_TIMEOUT_S: Final = 3600.0
SHOWN_DEVICES: Final = 40
SHOWN_REFUSALS: Final = 5


@dataclass(slots=True)
class Outcome:
    """What a run has to tell at its end, filled as it goes."""

    machine: str
    scenario: Scenario
    seed: int
    version: str | None = None
    devices: list[ListedDevice] = field(default_factory=list)
    offers: int = 0
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
    deaths: list[str] = field(default_factory=list)
    crash_record: str | None = None

    @property
    def channels_open(self) -> int:
        """Channels that are open in both directions."""
        return sum(channel.state in ("opened", "open") for device in self.devices for channel in device.channels)

    def kicks(self) -> dict[str, int]:
        """How often a processor had to be reached, and how."""
        names = {"semaphore": "kicks_semaphore", "signal": "kicks_signal", "none": "kicks_none", "merged": "merged"}
        return {kind: self.counters.get(name, 0) for kind, name in names.items()}

    def finding(self) -> bool:
        """Whether something is wrong with what was seen: a mismatch, a leak."""
        wrong_stream = self.stream is not None and not self.stream["sha256_ok"]
        return wrong_stream or bool(self.leaked) or any(task.errors for task in self.tasks)

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
            "seed": self.seed,
            "deaths": self.deaths,
            "crash_record": self.crash_record,
        }


@click.command()
@scenario_argument
@click.option("--vcpus", type=int, help="Virtual CPUs (1 to 64).")
@click.option(
    "--device", "device_texts", metavar="CLASS[:COUNT]", multiple=True, help="Devices, instead of the file's."
)
@click.option("--duration", "duration_s", type=click.FloatRange(min=0), help="Seconds to run; default: until Ctrl-C.")
@click.option(
    "--stream", "stream_path", type=click.Path(path_type=Path), help="Send this file through an echo channel."
)
@click.option("--detach", is_flag=True, help="Return when all channels are open; the machine goes on.")
@click.option("--no-guest", is_flag=True, help="No guest of ours: wait for somebody else's, end after its UNLOAD.")
@click.option(
    "--guest-timeout",
    "guest_timeout_s",
    type=click.FloatRange(min=0.1),
    default=60.0,
    show_default=True,
    help="With --no-guest: seconds to wait for a guest; status 124 behind them.",
)
@click.option("--record", "record_path", type=click.Path(path_type=Path), help="Record every event into this file.")
@click.option(
    "--without",
    metavar="PROCESS",
    multiple=True,
    help="Do not start this inner process (hypervisor, vcpu0, …, workqueue); somebody starts it by hand.",
)
@click.option("--name", help="Name of the machine; default: vm and the process id.")
@click.option("--poll", help="How a halting processor polls: off, microseconds, or adaptive.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Repeats what is random.")
@json_option
def run(
    scenario_path: Path | None,
    vcpus: int | None,
    device_texts: tuple[str, ...],
    duration_s: float | None,
    stream_path: Path | None,
    detach: bool,
    no_guest: bool,
    guest_timeout_s: float,
    record_path: Path | None,
    without: tuple[str, ...],
    name: str | None,
    poll: str | None,
    seed: int,
    as_json: bool,
) -> int:
    """Boot a machine, show its devices appear, exchange packets, clean up.

    \b
    Example:
      vmbus-emu run --duration 5
      vmbus-emu run scenarios/devices.toml --vcpus 4 --duration 2 --json
      vmbus-emu run --stream /bin/ls
    """
    scenario = (Scenario.load(scenario_path) if scenario_path else Scenario.default()).with_overrides(
        name=name, vcpus=vcpus, devices=[parse_device(text) for text in device_texts], poll=poll
    )
    options = Options(
        scenario, duration_s, stream_path, no_guest, guest_timeout_s, record_path, frozenset(without), seed, as_json
    )
    options.check(detach=detach)
    if detach:
        from tools.detach import run_detached

        return run_detached(options)
    return run_here(options)


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asked for, checked."""

    scenario: Scenario
    duration_s: float | None
    stream_path: Path | None
    no_guest: bool
    guest_timeout_s: float
    record_path: Path | None
    without: frozenset[str]
    seed: int
    as_json: bool

    def check(self, *, detach: bool) -> None:
        """Refuse what does not go together, before anything is made."""
        if self.stream_path is not None:
            if detach or self.no_guest:
                raise UserError("--stream needs our guest in the foreground; leave --detach and --no-guest out")
            if not self.scenario.devices():
                raise UserError("--stream needs a device; the scenario has none")
            check_stream_file(self.stream_path)
        if self.record_path is not None and not self.record_path.absolute().parent.is_dir():
            raise UserError(f"--record {self.record_path}: there is no directory {self.record_path.absolute().parent}")
        if detach and self.no_guest and self.duration_s is not None:
            raise UserError("--detach --no-guest ends with its guest; leave --duration out")


def check_stream_file(path: Path) -> None:
    """A readable regular file, or one line that says what is wrong with it."""
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise UserError(f"--stream {path}: {error.strerror}; give a file that can be read") from None
    if not path.is_file():
        raise UserError(f"--stream {path}: not a regular file; its contents are read twice, to send and to compare")
    if len(os.fsencode(path.resolve())) > 256:
        raise UserError(f"--stream {path}: its full path is longer than 256 bytes; use a shorter one")


def run_here(options: Options, ready_pipe: IO[str] | None = None) -> int:
    """Run in this process; `ready_pipe` is told the machine's name when all channels are open (--detach)."""
    scenario = options.scenario
    interrupted: int | None = None
    with launch(
        scenario,
        record=options.record_path is not None,
        no_guest=options.no_guest,
        without=options.without,
        seed=options.seed,
    ) as running:
        for process in sorted(options.without):
            say(f"start by hand: {by_hand_command(running.name, process)}")
        outcome = Outcome(running.name, scenario, options.seed)
        try:
            with recording(running, options.record_path):
                try:
                    live(running, options, outcome, ready_pipe)
                except KeyboardInterrupt:
                    interrupted = ExitStatus.INTERRUPTED
                except SystemExit as leave:
                    interrupted = int(leave.code or 0) if isinstance(leave.code, int) else ExitStatus.FAILED
                settle(running, outcome, no_guest=options.no_guest)
        except MachineDied as death:
            outcome.deaths = [one.report() for one in death.deaths]
            outcome.crash_record = str(write_crash_record(running, death))
            look(running, outcome)
    return tell(outcome, options.as_json, interrupted)


@contextlib.contextmanager
def recording(running: RunningMachine, path: Path | None) -> Iterator[None]:
    """Drain what the processes record into a file for as long as the block runs."""
    if path is None:
        yield
        return
    from emu.recording import RecordingWriter

    writer = RecordingWriter(path, running.machine)
    running.on_pump = writer.poll
    try:
        yield
    finally:
        running.on_pump = None
        writer.poll()
        writer.close()


def live(running: RunningMachine, options: Options, outcome: Outcome, ready_pipe: IO[str] | None) -> None:
    """From the first message to the end of the duration, the stream, or somebody's patience."""
    if options.no_guest:
        if ready_pipe is not None:
            ready_pipe.write(running.name + "\n")
            ready_pipe.flush()
        wait_for_foreign_guest(running, options, outcome)
        return
    # Whoever starts a process by hand, under a debugger, takes his time.
    timeout_s = BY_HAND_TIMEOUT_S if options.without else BOOT_TIMEOUT_S
    show_discovery(running, options.as_json, timeout_s)
    control = running.machine.control
    outcome.opened_at_ns = time.monotonic_ns() - (control.clock.now() - control.booted_ns)
    outcome.boot_s = round(outcome.opened_at_ns / 1e9 - running.launched_at, 6)
    look(running, outcome)
    if ready_pipe is not None:
        ready_pipe.write(running.name + "\n")
        ready_pipe.flush()
    outcome.tasks = exercise(running)
    if not options.as_json and ready_pipe is None:
        show_devices(outcome)
    if options.stream_path is not None:
        outcome.stream = stream_file(running, options.stream_path, outcome)
        if options.duration_s is None:
            return
    if options.duration_s is None and not options.as_json and narrates():
        say("Ctrl-C ends it")
    running.watch(options.duration_s)


def show_discovery(running: RunningMachine, quiet: bool, timeout_s: float) -> None:
    """Wait until all channels are open; on a terminal with a line that counts them."""
    expected = sum(1 for _ in running.scenario.devices())
    if quiet or not narrates():
        running.wait_ready(timeout_s=timeout_s)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from tools.output import console

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(sys.stderr), transient=True) as progress:
        bar = progress.add_task("discovering devices", total=expected or None)
        mirror = Mirror(running.machine.control)

        def opened() -> bool:
            progress.update(bar, completed=mirror.head().open)
            return running.machine.control.ready >= Ready.CHANNELS_OPEN

        running.wait_until(opened, timeout_s, f"machine {running.name} to open its channels")


def exercise(running: RunningMachine) -> list[TaskRow]:
    """Both kinds of guest task on every CPU: echo with safe points, then computing while echoes interrupt."""
    cpus = {channel.cpu for device in list_devices(running.machine) for channel in device.channels}
    rows: list[TaskRow] = []
    for program, wanted in ((Program.ECHO_CHECK, ECHO_PACKETS), (Program.CRUNCH, CRUNCH_NUMBERS)):
        ordered = [running.order(program, cpu, wanted=wanted) for cpu in sorted(cpus)]
        rows += running.wait_tasks(ordered, TASK_TIMEOUT_S)
    return rows


def stream_file(running: RunningMachine, path: Path, outcome: Outcome) -> dict[str, Any]:
    """Send a file through the first echo channel, take it back, compare SHA-256 with our own reading."""
    channel = next((one for device in outcome.devices for one in device.channels if one.state == "opened"), None)
    if channel is None:
        raise UserError("--stream: no channel is open")
    started = time.monotonic()
    row = running.order(Program.STREAM, channel.cpu, relid=channel.relid, path=str(path.resolve()))
    digest = hashlib.sha256()
    with path.open("rb") as source:
        while chunk := source.read(1 << 20):
            digest.update(chunk)
            running.pump(0)
    task = running.wait_tasks([row], float("inf"))[0]
    return {
        "path": str(path),
        "bytes": task.nbytes,
        "packets": task.packets,
        "seconds": round(time.monotonic() - started, 6),
        "sha256": digest.hexdigest(),
        "sha256_ok": task.state == TaskState.DONE and task.digest == digest.digest(),
    }


def wait_for_foreign_guest(running: RunningMachine, options: Options, outcome: Outcome) -> None:
    """Wait for a guest to attach, then until it has unloaded (or died, which the host treats alike)."""
    mirror = Mirror(running.machine.control)
    running.wait_until(lambda: running.machine.control.ready >= Ready.HOST_RUNS, 10.0, "the hypervisor process to run")
    if not options.as_json and narrates():
        say(f"machine {running.name} waits for a guest to attach (docs/abi.md)")
    running.wait_until(
        lambda: mirror.head().disconnects > 0 or mirror.head().attached_pid != 0,
        options.guest_timeout_s,
        "a guest to attach",
    )
    end = time.monotonic() + (options.duration_s if options.duration_s is not None else float("inf"))
    while mirror.head().disconnects == 0:
        if time.monotonic() > end:
            raise DeadlinePassed("the guest to unload", int((options.duration_s or 0) * 1e9))
        if mirror.head().version:
            look(running, outcome)
        running.pump(0.02)


def look(running: RunningMachine, outcome: Outcome) -> None:
    """Note what can be seen now: version, offers, devices."""
    head = Mirror(running.machine.control).head()
    if head.version:
        outcome.version = version_text(head.version)
        outcome.offers = head.offers
    if devices := list_devices(running.machine):
        outcome.devices = devices


def settle(running: RunningMachine, outcome: Outcome, *, no_guest: bool) -> None:
    """Let the guest unload, then read the last figures."""
    if no_guest:
        outcome.leaked = Mirror(running.machine.control).head().gpadls
    elif running.shut_down_guest():
        outcome.leaked = running.machine.control.leaked + Mirror(running.machine.control).head().gpadls
    running.stop()
    outcome.counters = running.machine.control.counter_totals()
    outcome.refused, outcome.refusals = running.machine.control.refusals()
    outcome.ignored = running.machine.control.ignored()


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
    click.echo(
        f"VMBus {outcome.version}, {outcome.channels_open} of {outcome.offers} channels open "
        f"after {outcome.boot_s:.3f} s"
    )


def tell(outcome: Outcome, as_json: bool, interrupted: int | None) -> int:
    """Print the end of the run and choose the exit status."""
    status = ExitStatus.FAILED if outcome.deaths else interrupted
    if status is None:
        status = ExitStatus.FINDING if outcome.finding() else ExitStatus.FINE
    if as_json:
        print_json("run", 1, outcome.report())
    else:
        _tell_people(outcome)
    for death in outcome.deaths:
        say(f"vmbus-emu: {death}")
    if outcome.crash_record:
        say(f"vmbus-emu: crash record: {outcome.crash_record}")
    return status


def _tell_people(outcome: Outcome) -> None:
    if outcome.tasks:
        errors = sum(task.errors for task in outcome.tasks)
        kicks = ", ".join(f"{count} {kind}" for kind, count in outcome.kicks().items())
        click.echo(f"{sum(task.packets for task in outcome.tasks)} packets echoed, {errors} errors; kicks: {kicks}")
    if outcome.stream is not None:
        rate = outcome.stream["bytes"] / max(outcome.stream["seconds"], 1e-9) / 1e6
        verdict = "equal" if outcome.stream["sha256_ok"] else "DIFFERENT"
        click.echo(
            f"{outcome.stream['path']}: {outcome.stream['bytes']} bytes there and back at {rate:.1f} MB/s, SHA-256 {verdict}"
        )
    if outcome.refused:
        click.echo("refused: " + ", ".join(f"{rule} {count}" for rule, count in sorted(outcome.refused.items())))
        for refusal in [one for one in outcome.refusals if not one["legal"]][-SHOWN_REFUSALS:]:
            click.echo(f"  {refusal['rule']}: {refusal['text']}")
    if outcome.leaked:
        click.echo(f"leaked: {outcome.leaked}")
