"""A run from launch to its end: boot, exercise, stream, watch, settle, whatever interrupts it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from emu.control import Ready
from emu.errors import DeadlinePassed, UserError
from emu.faults import FaultKind
from emu.ipc.segments import too_full
from emu.layout import M_ATTACH_GENERATION
from emu.mirror import Left, Mirror
from emu.scenario import Scenario
from emu.task_board import Program, TaskBoard, TaskRow, TaskState
from emu.wire.versions import version_text
from guestproc.drivers.echo import EchoDriver
from guestproc.drivers.netlike import NetlikeDriver
from tools.crash import write_crash_record
from tools.device_list import list_devices
from tools.draining import recording
from tools.early_signals import raise_noted
from tools.exit_status import noting_interruption
from tools.findings import SCENARIO, Case, InFolder, keep_death, kept_if_it_hangs
from tools.flight import DEFAULT_S, save_flight, saved_if_it_hangs
from tools.guest_death import GuestDeaths
from tools.launch import (
    BOOT_TIMEOUT_S,
    SHUTDOWN_TIMEOUT_S,
    TOLD_TIMEOUT_S,
    MachineDied,
    RunningMachine,
    by_hand_command,
    launch,
    unused_name,
)
from tools.nouns import counted, noun
from tools.output import narrates, print_json, say
from tools.run_outcome import Outcome, show_devices, tell, tell_faults, tell_noted, tell_refused

ECHO_PACKETS: Final = 32
CRUNCH_NUMBERS: Final = 400
NET_FRAMES: Final = 200
TASK_TIMEOUT_S: Final = 60.0
TAKES_ANSWER_S: Final = 1.0
"""How long a guest that has unloaded may take to take the answer; then the machine ends, and what is left is told."""
BY_HAND_TIMEOUT_S: Final = 3600.0


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asked for, checked."""

    scenario: Scenario
    duration_s: float | None
    stream_path: Path | None
    no_guest: bool
    guest_timeout_s: float
    record_path: Path | None
    flight_s: float
    record_bytes: bool
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
            if self.duration_s is None and any(one.spec.kind is FaultKind.GUEST_DIE for one in self.scenario.faults):
                raise UserError("--stream: guest.die would wait for its end; add --duration, which begins behind it")
            check_stream_file(self.stream_path)
        if self.record_bytes and self.record_path is None:
            raise UserError("--record-bytes says what a recording keeps; name one with --record FILE")
        if detach and self.no_guest and self.duration_s is not None:
            raise UserError("--detach --no-guest ends with its guest; leave --duration out")

    def case(self) -> Case:
        """What is run, and how to run it again: as long, as silently, and recorded if it was."""
        words: list[str | InFolder] = [InFolder(SCENARIO), "--seed", str(self.seed)]
        if self.duration_s is not None:
            words += ["--duration", f"{self.duration_s:g}"]
        if self.stream_path is not None:
            words += ["--stream", str(self.stream_path.resolve())]
        if self.no_guest:
            words += ["--no-guest", "--guest-timeout", f"{self.guest_timeout_s:g}"]
        for process in sorted(self.without):
            words += ["--without", process]
        # Said in any case: what did not record shall not record the next time either.
        words += ["--flight", f"{self.flight_s or (0 if self.record_path is None else DEFAULT_S):g}"]
        return Case(("run",), self.scenario, self.seed, tuple(words))


def check_stream_file(path: Path) -> None:
    """A readable regular file, or one line that says what is wrong with it."""
    try:
        # Before it is opened: a pipe that nobody writes would be waited for.
        regular = stat.S_ISREG(path.stat().st_mode)
        with path.open("rb") if regular or path.is_dir() else contextlib.nullcontext():
            pass
    except OSError as error:
        raise UserError(f"--stream {path}: {error.strerror}; give a file that can be read") from None
    if not regular:
        raise UserError(f"--stream {path}: not a regular file; its contents are read twice, to send and to compare")
    if len(os.fsencode(path.resolve())) > 256:
        raise UserError(f"--stream {path}: its full path is longer than 256 bytes; use a shorter one")


def run_here(options: Options, ready: Callable[[str], object] | None = None) -> int:
    """Run in this process; `ready` is told the machine's name when all channels are open (--detach).

    Whatever ends it, also before the machine stands and while it is taken away, is told of what there was by then.
    """
    outcome = Outcome(
        options.scenario.machine.name or unused_name(), options.scenario, options.seed, foreign=options.no_guest
    )
    interrupted: int | None = None
    with noting_interruption() as beside:
        raise_noted()
        try:
            interrupted = run_to_its_end(options, outcome, ready)
        except DeadlinePassed as passed:
            outcome.timed_out, outcome.flight, outcome.kept = str(passed), passed.recording, passed.finding
            if options.as_json:
                print_json("run", 1, outcome.report())
            else:
                tell_refused(outcome.refused, outcome.refusals)
                if outcome.foreign:
                    tell_noted(outcome.ignored, outcome.refusals)
                tell_faults(outcome.faults)
            raise
    return tell(outcome, options.as_json, beside.status or interrupted)


def run_to_its_end(options: Options, outcome: Outcome, ready: Callable[[str], object] | None) -> int | None:
    """Launch, live, settle, and keep what was found; the exit status of whoever interrupted its life, if one did."""
    scenario = options.scenario
    case = options.case()
    death: MachineDied | None = None
    with launch(
        scenario,
        name=outcome.machine,
        record=options.record_path is not None or options.flight_s > 0,
        record_bytes=options.record_bytes,
        no_guest=options.no_guest,
        without=options.without,
        seed=options.seed,
        flight_s=options.flight_s,
    ) as running:
        for process in sorted(options.without):
            say(f"start by hand: {by_hand_command(running.name, process)}")
        try:
            with (
                # Nobody who waits for a guest in vain has found anything.
                contextlib.nullcontext() if options.no_guest else kept_if_it_hangs(case, options.record_path),
                saved_if_it_hangs(running, options.flight_s),
                recording(running, options.record_path) as outcome.recording,
            ):
                with noting_interruption() as interruption:
                    live(running, options, outcome, ready)
                try:
                    settle(running, outcome, no_guest=options.no_guest)
                except DeadlinePassed as late:
                    # Whoever interrupted it is told so, too; but that is what he ended it for.
                    if interruption.status is None:
                        raise
                    outcome.timed_out = str(late)
            if outcome.finding():
                outcome.flight = save_flight(running.machine, options.flight_s, "finding: see what the run said")
        except DeadlinePassed:
            # Why a guest does not come any further is in its log, if anywhere.
            for line in running.log:
                say(line)
            outcome.log = running.log
            outcome.counters, outcome.faults = running.machine.control.counter_totals(), running.faults.report()
            if options.no_guest:
                running.stop()  # what the guest never took is told when the machine ends
            note_refused(running, outcome)
            if not running.machine.control.shutdown_requested:  # what was there before is told; half of it is gone
                look(running, outcome)
            raise
        except MachineDied as died:
            death = died
            outcome.deaths = [one.report() for one in death.deaths]
            outcome.counters = running.machine.control.counter_totals()
            outcome.faults = running.faults.report()
            record = write_crash_record(running, death, options.flight_s)
            outcome.crash_record = None if record is None else str(record)
            outcome.flight = death.flight
            look(running, outcome)
    outcome.log = running.log
    if death is not None:
        outcome.kept = keep_death(case, death, options.record_path)
    elif interruption.status is None and outcome.finding():
        recorded = options.record_path or outcome.flight
        outcome.kept = case.keep(outcome.findings(), recording=recorded, judge=True)
    return interruption.status


def live(running: RunningMachine, options: Options, outcome: Outcome, ready: Callable[[str], object] | None) -> None:
    """From the first message to the end of the duration, the stream, or somebody's patience."""
    if options.no_guest:
        if ready is not None:
            ready(running.name)
        wait_for_foreign_guest(running, options, outcome)
        return
    # Whoever starts a process by hand, under a debugger, takes his time.
    timeout_s = BY_HAND_TIMEOUT_S if options.without else BOOT_TIMEOUT_S
    show_discovery(running, options.as_json, timeout_s)
    deaths = GuestDeaths(running)
    while deaths.look():
        pass
    note_boot(running, outcome)
    if ready is not None:
        ready(running.name)
    outcome.tasks = exercise(running)
    if not options.as_json and ready is None:
        show_devices(outcome)
    if options.stream_path is not None:
        outcome.stream = stream_file(running, options.stream_path, outcome)
        if options.duration_s is None:
            return
    if options.duration_s is None and not options.as_json and narrates():
        say("Ctrl-C ends it")
    deaths.watch(options.duration_s)


def note_boot(running: RunningMachine, outcome: Outcome) -> None:
    """Of a machine whose guest is up: how long that took, and what it was offered and has opened.

    MissingPrerequisite where a channel is not open, of which no fault is the cause, and no memory is left.
    """
    control = running.machine.control
    outcome.opened_at_ns = time.monotonic_ns() - (control.clock.now() - control.booted_ns)
    outcome.boot_s = round(outcome.opened_at_ns / 1e9 - running.launched_at, 6)
    with contextlib.suppress(DeadlinePassed):  # a channel that is taken back meanwhile is one that it never tells of
        running.wait_until(lambda: host_has_told(running), TOLD_TIMEOUT_S, "the host to tell", step_s=0.002)
    look(running, outcome)
    outcome.offers = max(outcome.offers, outcome.surely_offered())
    struck = any(fault["hits"] for fault in running.faults.report())
    lost = 0 if struck else outcome.lost()
    told = f"{lost:,} of {counted(outcome.offers, 'channel')} {noun(lost, 'is', 'are')} not open"
    if lost and (full := too_full(told)):
        raise full


def show_discovery(running: RunningMachine, quiet: bool, timeout_s: float) -> None:
    """Wait until all channels are open; on a terminal with a line that counts them."""
    expected = sum(1 + device.subchannels for device in running.scenario.devices())
    if quiet or not narrates():
        running.wait_ready(timeout_s=timeout_s)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from tools.output import console

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(sys.stderr), transient=True) as progress:
        bar = progress.add_task("discovering devices", total=expected or None)
        mirror = Mirror(running.machine.control)

        running.wait_ready(timeout_s=timeout_s, on_look=lambda: progress.update(bar, completed=mirror.head().open))


def exercise(running: RunningMachine) -> list[TaskRow]:
    """Both kinds of guest task where echo channels are: echo with safe points, then computing amid interrupts.

    Where netlike devices have channels, frames both ways after that.
    """
    board = TaskBoard(running.machine.control)
    devices = list_devices(running.machine)
    cpus = {channel.cpu for device in devices if device.driver == EchoDriver.name for channel in device.channels}
    polled = {channel.cpu for device in devices if device.driver == NetlikeDriver.name for channel in device.channels}
    rows: list[TaskRow] = []
    for program, wanted, there in (
        (Program.ECHO_CHECK, ECHO_PACKETS, cpus),
        (Program.CRUNCH, CRUNCH_NUMBERS, cpus),
        (Program.NET_CHECK, NET_FRAMES, polled),
    ):
        ordered = [running.order(program, cpu, wanted=wanted) for cpu in sorted(there)]
        rows += running.wait_tasks(ordered, TASK_TIMEOUT_S)
        # A board has fewer rows than there may be processors for all programs.
        for index in ordered:
            board.free(index)
    return rows


def stream_file(running: RunningMachine, path: Path, outcome: Outcome) -> dict[str, Any]:
    """Send a file through the first echo channel, take it back, compare SHA-256 with our own reading."""
    echoing = (one for device in outcome.devices if device.driver == EchoDriver.name for one in device.channels)
    channel = next((one for one in echoing if one.state == "opened"), None)
    if channel is None:
        raise UserError("--stream: no channel of an echo device is open")
    before = _written(path)
    started = time.monotonic()
    row = running.order(Program.STREAM, channel.cpu, relid=channel.relid, path=str(path.resolve()))
    digest, file_bytes = hashlib.sha256(), 0
    with path.open("rb") as source:
        while chunk := source.read(1 << 20):
            digest.update(chunk)
            file_bytes += len(chunk)
            running.pump(0)
    task = running.wait_tasks([row], float("inf"))[0]
    seconds = round(time.monotonic() - started, 6)
    same = task.state == TaskState.DONE and task.digest == digest.digest()
    if not same and _written(path) != before:
        raise UserError(f"--stream {path}: somebody wrote it while it was sent; give a file that stays as it is")
    return {
        "path": str(path),
        "relid": channel.relid,
        "file_bytes": file_bytes,
        "bytes": task.nbytes,
        "packets": task.packets,
        "seconds": seconds,
        "sha256": digest.hexdigest(),
        "sha256_ok": same,
    }


def _written(path: Path) -> tuple[int, int] | None:
    """What changes when a file is written: its size and its time (ns); None for one that is gone."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def wait_for_foreign_guest(running: RunningMachine, options: Options, outcome: Outcome) -> None:
    """Wait for a guest to attach, then until it has unloaded, detached or died: one guest, and how it left is told."""
    mirror = Mirror(running.machine.control)
    running.wait_until(lambda: running.machine.control.ready >= Ready.HOST_RUNS, 10.0, "the hypervisor process to run")
    if not options.as_json and narrates():
        say(f"machine {running.name} waits for a guest to attach (docs/abi.md)")
    patience = time.monotonic() + options.guest_timeout_s
    end = float("inf")
    while (head := mirror.head()).disconnects == 0:
        now = time.monotonic()
        if head.attached_pid:
            # One that leaves before it has connected is waited for in vain: then another may come, in as much time.
            patience = now + options.guest_timeout_s
            if end == float("inf") and options.duration_s is not None:
                end = now + options.duration_s
        elif now > patience:
            came = running.machine.vps.view.load_u32(M_ATTACH_GENERATION) != 0
            awaited = "a guest to connect (one attached, and left before it did)" if came else "a guest to attach"
            raise DeadlinePassed(awaited, int(options.guest_timeout_s * 1e9))
        if now > end:
            raise DeadlinePassed("the guest to unload", int((options.duration_s or 0) * 1e9))
        if head.version:
            look(running, outcome)
        running.pump(0.02)
    look(running, outcome)  # it may have come and gone since the last one
    end = time.monotonic() + TAKES_ANSWER_S
    while (head := mirror.head()).attached_pid and head.to_slots + head.outgoing and time.monotonic() < end:
        running.pump(0.02)


def host_has_told(running: RunningMachine) -> bool:
    """Whether the mirror has what the guest has already: a host at work writes it every few milliseconds only."""
    opened = sum(one.state == "opened" for device in list_devices(running.machine) for one in device.channels)
    head = Mirror(running.machine.control).head()
    return head.version != 0 and head.open >= opened


def look(running: RunningMachine, outcome: Outcome) -> None:
    """Note what can be seen now: version, offers, devices."""
    head = Mirror(running.machine.control).head()
    if head.version:
        outcome.version = version_text(head.version)
        outcome.offers = head.offers
    if outcome.foreign and head.seen_version:
        outcome.version = version_text(head.seen_version)
        outcome.offers, outcome.seen_open = head.seen_offers, head.seen_open
        outcome.left = Left(head.left)
    if devices := list_devices(running.machine):
        outcome.devices = devices


def note_refused(running: RunningMachine, outcome: Outcome) -> None:
    """Note what the host refused and ignored: who writes a guest has little else to go by."""
    control = running.machine.control
    outcome.refused, outcome.refusals = control.refusals()
    outcome.ignored = control.ignored()


def settle(running: RunningMachine, outcome: Outcome, *, no_guest: bool) -> None:
    """Let the guest unload, then read the last figures; DeadlinePassed when it never did."""
    running.let_go()
    if not no_guest and running.machine.control.ready >= Ready.CHANNELS_OPEN:
        # Here, as it is wanted at the end: what is imported at the top holds up the boot.
        from tools.invariants_settled import state_report

        outcome.state = state_report(running.machine, running.pump, unjudged=not_judged(running))
    if no_guest:
        outcome.leaked = Mirror(running.machine.control).head().gpadls
    elif running.shut_down_guest(SHUTDOWN_TIMEOUT_S):
        outcome.leaked = running.leaked()
    running.stop()
    outcome.counters = running.machine.control.counter_totals()
    note_refused(running, outcome)
    outcome.faults = running.faults.report()
    control = running.machine.control
    if control.shutdown_requested and not control.shutdown_done and not running.deaths:
        raise DeadlinePassed("the guest to unload", int(SHUTDOWN_TIMEOUT_S * 1e9))


def not_judged(running: RunningMachine) -> str:
    """Why what a machine leaves undone says nothing against it; "" if it does."""
    if running.faults.report():
        return "faults were ordered"
    if running.scenario.plugins:
        return "a device of a plugin's may leave packets as it likes"
    return ""
