"""`vmbus-emu stress`: everything at once, every byte checked, and the counts that must come out as nothing.

The guest's programs send and check (`guestproc.stress`); from here devices come and go under the traffic and vCPU
processes are moved between the cores. At the end what was sent and what came back are added up by channel: the
difference is lost, unless the channel was taken away meanwhile.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import click

from emu.build_kind import BUILD
from emu.errors import DeadlinePassed, MissingPrerequisite, NotOpened, OwnLimit, UserError
from emu.scenario import MAX_OFFERS, DeviceSpec, Scenario
from emu.task_board import Program, TaskRow, TaskState
from guestproc.drivers.echo import EchoDriver
from guestproc.kernel.layout import KernelTables
from tools.check import check_recording, cut_of, undecided_lines, violations_of
from tools.crash import crash_recorded, failure_report
from tools.ctl import ask_host, offer_devices, wait_until_open
from tools.draining import recording
from tools.early_signals import raise_noted
from tools.exit_status import ExitStatus, noting_interruption
from tools.findings import SCENARIO, Case, InFolder, kept_if_it_fails
from tools.flight import DEFAULT_S, save_flight, saved_if_it_hangs
from tools.guest_death import refuse_guest_deaths
from tools.guest_versions import check_versions
from tools.invariants_settled import state_report
from tools.junit import JunitCase, suite_of, write_end
from tools.launch import BOOT_TIMEOUT_S, MachineDied, RunningMachine, launch
from tools.named_files import check_apart, write_text
from tools.nameless_file import nameless_file
from tools.nouns import counted
from tools.options import (
    FileToWrite,
    Seconds,
    fault_option,
    flight_option,
    json_option,
    record_option,
    scenario_argument,
)
from tools.output import narrates, print_json, say
from tools.run_machine import note_boot
from tools.run_outcome import Outcome, recording_report, refused_because, refused_in_bad_faith, tell_faults

INGREDIENTS: Final = {"move": "vCPUs are moved between cores", "hot": "devices come and go"}
"""What `--mix` may name beside the traffic, and what that is."""
MIX_HELP: Final = (
    "What else happens, separated by commas: "
    + ", ".join(f"{word} ({what})" for word, what in INGREDIENTS.items())
    + "; or none."
)
SUITE: Final = "vmbus-emu stress"
CLASSNAME: Final = "stress"
FINDINGS: Final = (
    "lost",
    "corrupt",
    "not_open",
    "failed_tasks",
    "leaked",
    "refused",
    "state_violations",
    "violations",
)
"""What must be nothing; `violations` only where it was checked, `state_violations` where the machine settled."""
VERSION: Final = 2
"""Of the object that `--json` prints. In the first one `bytes` were sent, though `packets` came back."""
TURN_S: Final = 0.02
MOST_HOT: Final = 4
TASK_GRACE_S: Final = 60.0
MOST_RECORDED: Final = 256 << 20
"""Bytes of a recording that nobody asked for, which is checked and then gone: half a minute of it."""


@dataclass(frozen=True, slots=True)
class Limit:
    """`--time-limit`: as somebody typed it (seconds), and when it passes (CLOCK_MONOTONIC, seconds)."""

    seconds: float
    end: float

    @property
    def left_s(self) -> float:
        """Seconds until it passes; 0 behind that."""
        return max(0.0, self.end - time.monotonic())

    def passed(self, duration_s: float) -> OwnLimit:
        """What to raise once it has."""
        return OwnLimit(f"{duration_s:g} s of stress", self.seconds)


@dataclass(slots=True)
class Sums:
    """What all CPUs report, added up by channel."""

    packets: int = 0
    """That came back."""
    nbytes: int = 0
    """Of their payload."""
    lost: int = 0
    corrupt: int = 0
    taken_away: int = 0
    """Packets that were under way on channels that went."""
    channels: int = 0
    computed: int = 0
    complaints: list[str] = field(default_factory=list)


def add_up(reports: Sequence[Mapping[str, Any]]) -> Sums:
    """Sent and received by channel and sender; a channel that somebody saw go has no losses."""
    sums = Sums()
    sent: Counter[tuple[int, int]] = Counter()
    received: Counter[tuple[int, int]] = Counter()
    gone: set[int] = set()
    relids: dict[int, int] = {}
    for report in reports:
        sums.computed += report["computed"]
        sums.complaints += report["complaints"]
        for lane in report["lanes"]:
            handle = lane["handle"]
            relids[handle] = lane["relid"]
            sent[handle, report["cpu"]] += lane["sent"]
            sums.nbytes += lane["bytes"]
            sums.corrupt += lane["corrupt"]
            if lane["gone"]:
                gone.add(handle)
            for sender, count in lane["received"].items():
                received[handle, int(sender)] += count
                sums.packets += count
    for key in sent.keys() | received.keys():
        missing = sent[key] - received[key]
        if key[0] in gone:
            sums.taken_away += max(0, missing)
        else:
            # More than was sent is as wrong as less.
            sums.lost += abs(missing)
            if missing:
                packets = counted(sent[key], "packet")
                sums.complaints.append(f"relid {relids[key[0]]}: of {packets} of cpu{key[1]}, {missing} lost")
    sums.channels = len(relids)
    return sums


@dataclass(slots=True)
class Troubles:
    """What is done to the machine while it works."""

    running: RunningMachine
    rng: random.Random
    mix: frozenset[str]
    cores: list[int]
    moves: int = 0
    adds: int = 0
    removes: int = 0
    hot: list[dict[str, Any]] = field(default_factory=list)
    """Devices that were added, as `offer_devices` tells them; they are taken back by their instance, as a relid is
    another device's once a guest that failed has given it back."""

    def turn(self) -> None:
        """One or the other, by chance."""
        if "move" in self.mix and self.rng.random() < 0.3:
            self.move()
        if "hot" in self.mix and self.rng.random() < 0.1:
            self.add() if len(self.hot) < self.rng.randrange(MOST_HOT + 1) else self.remove()

    def move(self) -> None:
        """Bind a vCPU to one core, or to none in particular."""
        name = f"vcpu{self.rng.randrange(self.running.machine.vp_count)}"
        choice = self.rng.choice([*({core} for core in self.cores), set(self.cores)])
        with suppress(ProcessLookupError):
            os.sched_setaffinity(self.running.inner[name].pid, choice)
            self.moves += 1

    def add(self) -> None:
        """Offer one more echo device."""
        self.hot += offer_devices(self.running.machine, "echo:1")
        self.adds += 1

    def remove(self) -> None:
        """Take one of them back, under its traffic."""
        if self.hot:
            instance = self.hot.pop(self.rng.randrange(len(self.hot)))["instance"]
            # Who is at the machine with `ctl` may have taken it back already.
            with suppress(UserError):
                ask_host(self.running.machine, "rescind", relid=0, instance=instance)
                self.removes += 1

    def not_open(self, look: Callable[[], object]) -> int:
        """How many of those that are still there nobody will open, or has not within ten seconds.

        One that came when all relids were in use was offered to nobody. Before each wait `look` may end it all.
        """
        lost = 0
        for one in (each for each in self.hot if each["relid"]):
            look()
            try:
                wait_until_open(self.running.machine, one["relid"], one["generation"])
            except (NotOpened, DeadlinePassed):
                lost += 1
        return lost


def _mix(text: str) -> frozenset[str]:
    """`--mix move,hot`; `none` for traffic alone."""
    words = [] if text == "none" else text.split(",")
    for word in words:
        if word not in INGREDIENTS:
            known = ", ".join(INGREDIENTS)
            raise UserError(f"--mix {text}: {word or 'nothing'} is no ingredient; there are {known}, or none alone")
    return frozenset(words)


@click.command()
@scenario_argument
@click.option("--seed", type=click.IntRange(0, 2**31), help="What is sent and done; default: a new one, which is told.")
@click.option(
    "--duration",
    "duration_s",
    type=Seconds(0.1, 86_400),
    default=5.0,
    show_default=True,
    help="Seconds of traffic.",
)
@click.option("--channels", type=click.IntRange(1, MAX_OFFERS), default=8, show_default=True, help="Echo devices.")
@click.option("--vcpus", type=int, help="Virtual CPUs.")
@click.option("--mix", default=",".join(INGREDIENTS), show_default=True, help=MIX_HELP)
@click.option("--junit", type=FileToWrite(), help="Write the verdicts as a JUnit file.")
@click.option("--time-limit", "limit_s", type=Seconds(1, 90_000), help="Exit with 124 if it takes longer.")
@fault_option
@record_option
@flight_option(DEFAULT_S)
@json_option
def stress(
    scenario_path: Path | None,
    seed: int | None,
    duration_s: float,
    channels: int,
    vcpus: int | None,
    mix: str,
    junit: Path | None,
    limit_s: float | None,
    fault_texts: tuple[str, ...],
    record_path: Path | None,
    flight_s: float,
    as_json: bool,
) -> int:
    """Send everything that may be sent, from every CPU, while devices come and go; check every byte.

    Packets and bytes are told as they came back, each checked; packets that went with their channels are told apart.

    \b
    Example:
      vmbus-emu stress --duration 10
      vmbus-emu stress --seed 7 --vcpus 4 --channels 32 --mix none --json
    """
    ingredients = _mix(mix)
    check_apart({"--record": record_path, "--junit": junit}, scenario_path)
    scenario = Scenario.default() if scenario_path is None else Scenario.load(scenario_path)
    devices = [DeviceSpec(count=channels)] if scenario_path is None else []
    scenario = scenario.with_overrides(vcpus=vcpus, devices=devices, faults=fault_texts)
    refuse_guest_deaths(scenario, "stress")
    chosen = random.SystemRandom().randrange(2**31) if seed is None else seed
    again = _again(scenario_path, chosen, duration_s, channels, vcpus, mix, fault_texts)
    limit = None if limit_s is None else Limit(limit_s, time.monotonic() + limit_s)
    check_versions(scenario)
    case = _case(scenario, chosen, duration_s, mix, limit_s, flight_s)
    ended_early = f"ended early; the same again: {again}"
    report: dict[str, Any] | None = None
    with nameless_file() as told, nameless_file() as recorded:
        try:
            with noting_interruption() as interruption, kept_if_it_fails(case, record_path):
                raise_noted()
                report = run_stress(
                    scenario,
                    chosen,
                    duration_s,
                    ingredients,
                    limit,
                    told,
                    recorded,
                    live=narrates() and not as_json,
                    record_path=record_path,
                    flight_s=flight_s,
                )
                report["again"] = again
        except (UserError, MissingPrerequisite) as error:
            write_end(junit, SUITE, CLASSNAME, str(error))
            raise  # no seed makes any difference
        except BaseException as error:
            say(ended_early)
            write_end(junit, SUITE, CLASSNAME, str(error) or type(error).__name__, output=_told(error, again))
            if as_json and isinstance(error, (DeadlinePassed, MachineDied)):
                print_json("stress", VERSION, {"seed": chosen, "again": again, **failure_report(error)})
            raise
        if interruption.status is not None or report is None:
            say(ended_early)
            write_end(junit, SUITE, CLASSNAME, "interrupted", output=ended_early)
            if as_json:
                print_json("stress", VERSION, {"seed": chosen, "again": again, "interrupted": True})
            return interruption.status or ExitStatus.FAILED
        report["finding"] = _kept(case, report, record_path, recorded)
        if junit is not None:
            write_text(junit, junit_of(report), "--junit")
        if as_json:
            print_json("stress", VERSION, report)
        else:
            _show(report)
        return ExitStatus.FINDING if findings_of(report) else ExitStatus.FINE


def _told(error: BaseException, again: str) -> str:
    """What the JUnit file of a run that ended early says of how to look into it."""
    folder = getattr(error, "finding", None)
    kept = f"\nfinding kept in {folder}" if folder else ""
    return f"ended early; the same again: {again}{kept}"


def _case(scenario: Scenario, seed: int, duration_s: float, mix: str, limit_s: float | None, flight_s: float) -> Case:
    """What is stressed, and how to do the same again on the scenario that is kept."""
    words = ["--seed", str(seed), "--duration", f"{duration_s:g}", "--mix", mix]
    words += ["--flight", f"{flight_s or DEFAULT_S:g}"]
    words += [] if limit_s is None else ["--time-limit", f"{limit_s:g}"]
    return Case(("stress",), scenario, seed, (InFolder(SCENARIO), *words))


def _kept(case: Case, report: Mapping[str, Any], record_path: Path | None, recorded: Path) -> str | None:
    """The folder of what was found; None if nothing was, or if it could not be kept."""
    found = findings_of(report)
    if not found:
        return None
    lines = [*found.values(), *report["complaints"]]
    judged = "violations" in report
    made = record_path or (recorded if judged else None) or (Path(report["flight"]) if report.get("flight") else None)
    folder = case.keep(lines, recording=made, judge=not judged)
    return None if folder is None else str(folder)


def _again(
    scenario_path: Path | None,
    seed: int,
    duration_s: float,
    channels: int,
    vcpus: int | None,
    mix: str,
    faults: tuple[str, ...],
) -> str:
    """The command line that does the same again: with its seed, and with its faults."""
    words = ["vmbus-emu", "stress"]
    words += [str(scenario_path)] if scenario_path is not None else ["--channels", str(channels)]
    words += ["--seed", str(seed), "--duration", f"{duration_s:g}", "--mix", mix]
    words += [] if vcpus is None else ["--vcpus", str(vcpus)]
    for fault in faults:
        words += ["--fault", fault]
    return shlex.join(words)


def run_stress(
    scenario: Scenario,
    seed: int,
    duration_s: float,
    mix: frozenset[str],
    limit: Limit | None,
    reports: Path,
    own_recording: Path,
    *,
    live: bool,
    record_path: Path | None = None,
    flight_s: float = 0.0,
) -> dict[str, Any]:
    """Boot, stress, settle, check; the report. OwnLimit when `limit` comes first.

    What the programs report goes into the file `reports`, what is recorded, if it is not to be kept, into
    `own_recording`.
    """
    cores = sorted(os.sched_getaffinity(0))
    unchecked = _unchecked(scenario, record_path, flight_s)
    path = record_path or (None if unchecked else own_recording)
    with (
        launch(scenario, seed=seed, record=record_path is not None or flight_s > 0, flight_s=flight_s) as running,
        crash_recorded(running, flight_s),
        saved_if_it_hangs(running, flight_s),
        recording(running, path, None if record_path else MOST_RECORDED) as recorded,
    ):
        _booted(running, duration_s, limit)
        booted = Outcome(running.name, scenario, seed)
        note_boot(running, booted)
        booted.faults = running.faults.report()
        lost = booted.lost()
        if "hot" not in mix and not lost and not any(one.driver == EchoDriver.name for one in booted.devices):
            raise UserError("nothing would be sent: give a scenario with an echo device, or --mix hot")
        troubles = Troubles(running, random.Random(seed), mix, cores)
        rows = [
            running.order(Program.STRESS, cpu, wanted=int(duration_s * 1e9), path=str(reports))
            for cpu in range(scenario.machine.vcpus)
        ]
        _watch(running, troubles, duration_s, limit, live=live)
        tasks = _ended(running, rows, duration_s, limit)
        faults = running.faults.report()
        if any(one["hits"] for one in faults):
            lost += troubles.not_open(lambda: _look(running, limit, duration_s))
        sums = add_up([json.loads(line) for line in reports.read_text(encoding="utf-8").splitlines()])
        rings = _ring_transitions(_guest_tables(running))
        ordered = "faults were ordered" if faults else ""
        state = state_report(running.machine, running.pump, unjudged=ordered)
        in_time = running.shut_down_guest()
        leaked = running.leaked()
        refused, refusals = refused_in_bad_faith(running.machine.control)
        running.stop()
        # Behind the end of all processes: each has published its last ones then.
        counters = running.machine.control.counter_totals()
        faults = running.faults.report()
        report: dict[str, Any] = {
            "seed": seed,
            "seconds": duration_s,
            "vcpus": scenario.machine.vcpus,
            "build": BUILD,
            "channels": sums.channels,
            "packets": sums.packets,
            "bytes": sums.nbytes,
            "requested": counters["requested"],
            "interrupts": counters["interrupts"],
            "wakeups": counters["kicks_semaphore"] + counters["kicks_signal"],
            "kicks": {name.removeprefix("kicks_"): counters[name] for name in counters if name.startswith("kicks_")},
            "spurious": counters["spurious"],
            "merged": counters["merged"],
            "preemptions": counters["preemptions"],
            "computed": sums.computed,
            **rings,
            "moves": troubles.moves,
            "hot_adds": troubles.adds,
            "hot_removes": troubles.removes,
            "taken_away": sums.taken_away,
            "lost": sums.lost,
            "corrupt": sums.corrupt,
            "not_open": lost,
            "complaints": sums.complaints,
            "failed_tasks": sum(task.state == TaskState.FAILED for task in tasks),
            "refused": refused,
            "refusals": refusals,
            "leaked": leaked if in_time else leaked or 1,
            "faults": faults,
            **state,
        }
        if found := findings_of(report):
            flight = save_flight(running.machine, flight_s, f"finding: {', '.join(found.values())}")
            report["flight"] = None if flight is None else str(flight)
    # Behind the block: a recording is whole when it is closed.
    report["recording"] = recording_report(recorded) if record_path else None
    if recorded is not None and recorded.given_up:
        unchecked = f"{recorded.given_up}; --record FILE keeps it all"
    report["unchecked"] = unchecked
    if path is not None and not unchecked:
        report |= _checked(path)
    return report


def _unchecked(scenario: Scenario, record_path: Path | None, flight_s: float) -> str:
    """Why the invariants are not to be checked; empty if they are."""
    if record_path is not None:
        return ""
    if scenario.faults:
        return "faults were ordered"
    return "" if flight_s else "nothing was recorded"


def _checked(path: Path) -> dict[str, Any]:
    """What the invariants say of the recording."""
    verdicts, _recording = check_recording(path)
    return {
        "violations": [*(f"{one.name}: {one.text}" for one in violations_of(verdicts)), *cut_of(verdicts)],
        "violations_count": sum(one.count for one in verdicts),
        "undecided": {one.name: one.undecided for one in verdicts if one.undecided},
        "checked": len(verdicts),
    }


def _booted(running: RunningMachine, duration_s: float, limit: Limit | None) -> None:
    """The machine, once its channels are open; as `_ended`."""
    with _limited(limit, duration_s):
        running.wait_ready(timeout_s=BOOT_TIMEOUT_S if limit is None else min(BOOT_TIMEOUT_S, limit.left_s))


def _ended(running: RunningMachine, rows: list[int], duration_s: float, limit: Limit | None) -> list[TaskRow]:
    """The programs, once they have ended; DeadlinePassed where one hangs, OwnLimit where the limit comes first."""
    with _limited(limit, duration_s):
        return running.wait_tasks(rows, TASK_GRACE_S if limit is None else min(TASK_GRACE_S, limit.left_s))


def _look(running: RunningMachine, limit: Limit | None, duration_s: float) -> None:
    """Between two waits: MachineDied where a process has ended, OwnLimit where the limit has passed."""
    running.pump(0.0)
    if limit is not None and not limit.left_s:
        raise limit.passed(duration_s)


@contextmanager
def _limited(limit: Limit | None, duration_s: float) -> Iterator[None]:
    """A wait whose deadline is that of the limit, where that comes first: OwnLimit then."""
    try:
        yield
    except DeadlinePassed:
        if limit is not None and not limit.left_s:
            raise limit.passed(duration_s) from None
        raise


def _watch(
    running: RunningMachine,
    troubles: Troubles,
    duration_s: float,
    limit: Limit | None,
    *,
    live: bool,
) -> None:
    """Trouble the machine for as long as it works; a line of what happens, where somebody watches."""
    began = said = time.monotonic()
    before = running.machine.control.counter_totals()
    while time.monotonic() - began < duration_s:
        if limit is not None and not limit.left_s:
            raise limit.passed(duration_s)
        troubles.turn()
        running.pump(TURN_S)
        if live and time.monotonic() - said > 0.5:
            now = running.machine.control.counter_totals()
            seconds, said = time.monotonic() - said, time.monotonic()
            rates = {name: (now[name] - before[name]) / seconds for name in ("packets", "bytes", "interrupts")}
            before = now
            say(
                f"{said - began:5.1f} s  {rates['packets']:9,.0f} packets/s  {rates['bytes'] / 1e6:7.1f} MB/s  "
                f"{rates['interrupts']:7,.0f} interrupts/s  "
                f"{counted(len(troubles.hot), 'hot device')}, {counted(troubles.moves, 'move')}"
            )


def _guest_tables(running: RunningMachine) -> KernelTables:
    """The guest's records."""
    return KernelTables.attach(running.machine.ram.apart)


def _ring_transitions(tables: KernelTables) -> dict[str, int]:
    """How often rings went from empty to not, and to full, as the guest's channels counted it."""
    totals: defaultdict[str, int] = defaultdict(int)
    names = {
        "empty_transitions": "intr_out_empty",
        "full_transitions": "out_full_first",
        "full_writes": "out_full_total",
        "room_signals": "intr_in_full",
    }
    for channel in tables.channels.live():
        for name, word in names.items():
            with suppress(AssertionError):  # it goes while we look
                totals[name] += getattr(channel, word)
    return {name: totals[name] for name in names}


def findings_of(report: Mapping[str, Any]) -> dict[str, str]:
    """What must be nothing and is not, by name."""
    return {name: f"{name}: {report[name]} (seed {report['seed']})" for name in FINDINGS if report.get(name)}


def junit_of(report: Mapping[str, Any]) -> str:
    """One test case for each count that must be nothing; what was not looked at is skipped, not left out."""
    found = findings_of(report)
    reasons = {"violations": report.get("unchecked", ""), "state_violations": report.get("unjudged", "")}
    complaints = report.get("complaints")
    details = {"lost": complaints, "corrupt": complaints, "refused": refused_because(report.get("refusals", ()))}
    cases = [
        JunitCase(
            name,
            failure=found.get(name, ""),
            skipped="" if name in found else reasons.get(name, ""),
            text="\n".join(details.get(name) or ()) if name in found else "",
        )
        for name in FINDINGS
        if name in report or reasons.get(name)
    ]
    output = [f"the same again: {report['again']}"] if report.get("again") else []
    output += [f"finding kept in {report['finding']}"] if report.get("finding") else []
    return suite_of(SUITE, CLASSNAME, cases, seconds=report["seconds"], output="\n".join(output))


def _show(report: Mapping[str, Any]) -> None:
    click.echo(
        f"{counted(report['packets'], 'packet')}, {report['bytes'] / 1e6:,.1f} MB there and back through "
        f"{counted(report['channels'], 'channel')} of {counted(report['vcpus'], 'vCPU')} in {report['seconds']:g} s"
    )
    click.echo(
        f"{counted(report['requested'], 'interrupt')} requested, {report['merged']:,} merged, "
        f"{report['interrupts']:,} taken, {report['spurious']} spurious; {counted(report['wakeups'], 'wake-up')}, "
        f"{counted(report['preemptions'], 'preemption')}"
    )
    click.echo(
        f"rings: {counted(report['empty_transitions'], 'time')} from empty, "
        f"{counted(report['full_transitions'], 'time')} full, {counted(report['room_signals'], 'signal')} for room"
    )
    click.echo(
        f"{counted(report['hot_adds'], 'device')} added, {report['hot_removes']} removed, "
        f"{counted(report['moves'], 'move')} between cores; "
        f"{counted(report['taken_away'], 'packet went with its channel', 'packets went with their channels')}"
    )
    click.echo(f"lost {report['lost']}, corrupt {report['corrupt']}, leaked {report['leaked']}, seed {report['seed']}")
    for text in report["complaints"]:
        click.echo(f"  {text}")
    tell_faults(report["faults"])
    found = findings_of(report)
    for name, text in found.items():
        click.echo(f"finding: {text}")
        for line in refused_because(report["refusals"]) if name == "refused" else ():
            click.echo(f"  {line}")
    if found:
        click.echo(f"the same again: {report['again']}")
    if report["unchecked"]:
        click.echo(f"invariants were not checked: {report['unchecked']}")
    else:
        undecided = report["undecided"]
        checked = counted(report["checked"] - len(undecided), "invariant")
        violations = counted(report["violations_count"], "violation")
        beside = f", {len(undecided)} undecided" if undecided else ""
        click.echo(f"{checked} checked, {violations}{beside}")
        for line in undecided_lines(undecided):
            click.echo(line)
    if report["unjudged"]:
        click.echo(f"what the machine left undone was not judged: {report['unjudged']}")
    if one := report["recording"]:
        click.echo(f"{counted(one['records'], 'event')} in {one['path']}, {one['dropped']:,} dropped")
    if report.get("flight"):
        click.echo(f"flight recording: {report['flight']}")
