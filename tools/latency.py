"""`vmbus-emu latency`: round trips through an echo channel, and the stages in which their time goes.

Two machines run, one after the other: a plain one for the round trips themselves, and one that records, from whose
records the stages are cut. So the figure of a round trip is free of the recorder, and what the recorder costs is
the difference of the two.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import click

from emu.build_kind import BUILD, PURE
from emu.errors import DeadlinePassed, NotOpened, UserError
from emu.recording import Recording
from emu.scenario import Scenario, parse_device
from emu.task_board import Program, TaskState
from guestproc.drivers.echo import EchoDriver
from tools.crash import crash_recorded, failure_report
from tools.ctl import ask_host, wait_until_open, wait_until_released
from tools.device_list import list_devices
from tools.draining import recording
from tools.early_signals import raise_noted
from tools.exit_status import ExitStatus, noting_interruption
from tools.findings import SCENARIO, Case, InFolder, kept_if_it_fails
from tools.guest_death import refuse_guest_deaths
from tools.guest_versions import check_versions
from tools.histograms import (
    US,
    figures_of,
    hgrm_text,
    histogram_of,
    hlog_text,
    regressions,
    spread_of,
    svg_plot,
    terminal_plot,
    too_few,
    within_spread,
)
from tools.latency_stages import CONTROL_STAGES, DATA_STAGES, DUE_STAGE, Stages, Step, stages_of
from tools.launch import MachineDied, RunningMachine, launch
from tools.named_files import check_apart, check_svg, write_text
from tools.nameless_file import nameless_file
from tools.nouns import counted
from tools.options import FileToWrite, Seconds, fault_option, json_option, record_option, scenario_argument
from tools.output import print_json, print_table, say
from tools.run_outcome import joined_refusals, refused_in_bad_faith, tell_faults, tell_refused

REPORT: Final = "vmbus-emu.latency"
VERSION: Final = 1
ROUND_TRIP: Final = "round_trip"
RECORDED: Final = "round_trip_recorded"
MOST_SIZE: Final = 8_192
HELD: Final = 0.95
"""A rate of which less than so much was done was not reached; a host that lost its core at the end is no more."""
RECORDED_S: Final = 1.5
MOST_RECORDED: Final = 50_000
"""Round trips whose stages are found out, unless somebody wants the recording; each has 27 records of 64 bytes."""
HOT_PLUGS: Final = 20
MOST_TOLD: Final = 3
"""Figures that differ by themselves, told by name in one line."""
_PACKET_NAMES: Final = ("p50", "p90", "p99", "p999")


@dataclass(frozen=True, slots=True)
class Measured:
    """Samples of one machine: its round trips, how many never came back, and stages if it recorded."""

    trips: Trips
    lost: int
    stages: Stages = field(default_factory=Stages)
    dropped: int = 0
    faults: list[dict[str, Any]] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)
    refusals: list[dict[str, Any]] = field(default_factory=list)
    """What the host refused, and why the newest (`refused_in_bad_faith`): a back end that raised is among it."""


@dataclass(frozen=True, slots=True)
class Trips:
    """When each round trip was due and when its answer was taken, in their order (CLOCK_MONOTONIC ns).

    They were measured from `began_s` on (seconds since the epoch) for `seconds`.
    """

    dues: array[int]
    dones: array[int]
    began_s: float
    seconds: float

    def lengths(self) -> list[int]:
        """How long each took, in ns."""
        return [done - due for due, done in zip(self.dues, self.dones, strict=True)]

    def achieved(self, rate: int) -> float:
        """Round trips a second that were done; not more than `rate` (0: as many as there were)."""
        if not self.dues:
            return 0.0
        a_second = len(self.dues) * 1e9 / max(1, self.dones[-1] - self.dues[0])
        return min(a_second, rate) if rate else a_second


@click.command()
@scenario_argument
@click.option("--rate", type=click.IntRange(1, 1_000_000), help="Round trips a second, sent when they are due.")
@click.option("--closed", is_flag=True, help="One after the other (the default).")
@click.option("--size", type=click.IntRange(0, MOST_SIZE), default=64, show_default=True, help="Bytes of payload.")
@click.option("--vcpus", type=int, help="Virtual CPUs.")
@click.option("--poll", metavar="off|US|adaptive", help="How long a halting processor looks first.")
@click.option(
    "--duration",
    "duration_s",
    type=Seconds(0.05, 3600),
    default=3.0,
    show_default=True,
    help="Seconds of each of the two measurements.",
)
@click.option("--hgrm", type=FileToWrite(), help="Write the round trip's percentiles (HdrHistogram text).")
@click.option("--hlog", type=FileToWrite(), help="Write every stage's histogram (HdrHistogram log).")
@click.option("--plot", type=FileToWrite(), help="Write the percentile curves (SVG).")
@click.option("--compare", type=click.Path(path_type=Path), help="An older --json output to compare with.")
@click.option("--fail", "fail", multiple=True, metavar="p99:+10%", help="With --compare: how much worse is a finding.")
@fault_option
@record_option
@json_option
def latency(
    scenario_path: Path | None,
    rate: int | None,
    closed: bool,
    size: int,
    vcpus: int | None,
    poll: str | None,
    duration_s: float,
    hgrm: Path | None,
    hlog: Path | None,
    plot: Path | None,
    compare: Path | None,
    fail: tuple[str, ...],
    fault_texts: tuple[str, ...],
    record_path: Path | None,
    as_json: bool,
) -> int:
    """Measure round trips and the stages in which their time goes.

    The stages are those of a second machine, which records: for 1.5 seconds at most, or 50,000 round trips at a rate,
    unless --record keeps what it did. Where that one ends early the round trips of the first are told.

    With --compare a percentile may be worse by chance: what is found says by how much parts of one run differ.

    \b
    Example:
      vmbus-emu latency --duration 2
      vmbus-emu latency --rate 1000 --poll off --json > new.json
    """
    if closed and rate is not None:
        raise UserError("--closed and --rate exclude each other; leave one of them out")
    if fail and compare is None:
        raise UserError("--fail needs something to compare with; add --compare OLD.json")
    written = {"--record": record_path, "--hgrm": hgrm, "--hlog": hlog, "--plot": plot}
    check_apart(written, scenario_path, compare)
    check_svg(plot, "--plot", "the curves are")
    limits = _limits(fail)
    before = _read_report(compare) if compare is not None else Older({}, {})
    scenario = _scenario(scenario_path, vcpus, poll, fault_texts)
    case = _case(scenario, rate, size, duration_s, compare, fail)
    # The command's context closes it.
    recorded_at = record_path or click.get_current_context().with_resource(nameless_file())
    plain: Measured | None = None
    recorded: Measured | None = None
    failure: DeadlinePassed | MachineDied | NotOpened | None = None
    began_s = 0.0
    try:
        with noting_interruption() as interruption:
            raise_noted()
            with kept_if_it_fails(case):
                plain = measure(scenario, rate or 0, size, duration_s)
            with kept_if_it_fails(case, recorded_at):
                seconds = duration_s if record_path is not None else _recorded_s(rate, duration_s)
                began_s = time.time()
                recorded = measure(scenario, rate or 0, size, seconds, record=True, kept=recorded_at)
    except (DeadlinePassed, MachineDied, NotOpened) as error:
        failure = error
    ended = {"interrupted": interruption.status is not None} if failure is None else failure_report(failure)
    if plain is None:
        if as_json:
            print_json("latency", 1, ended)
        elif failure is None:
            say("vmbus-emu: interrupted before the first measurement was done; --duration makes it shorter")
        if failure is not None:
            raise failure
        return interruption.status or ExitStatus.FAILED
    samples = {ROUND_TRIP: plain.trips.lengths()}
    if recorded is not None:
        samples |= {RECORDED: recorded.trips.lengths(), **recorded.stages.all()}
    histograms = {name: histogram_of(values, name) for name, values in samples.items()}
    figures: dict[str, dict[str, Any]] = {
        name: {**figures_of(histogram), "spread": spread_of(samples[name])} for name, histogram in histograms.items()
    }
    if hgrm is not None:
        write_text(hgrm, hgrm_text(histograms[ROUND_TRIP]), "--hgrm")
    if hlog is not None:
        write_text(hlog, hlog_text(histograms, _intervals(plain, recorded, began_s)), "--hlog")
    if plot is not None:
        write_text(plot, svg_plot(histograms, f"vmbus-emu latency, {counted(size, 'byte')}, {_pace(rate)}"), "--plot")
    # The round trip is judged in any case: it is what was asked for.
    unjudged = too_few({stage: one for stage, one in before.stages.items() if stage != ROUND_TRIP}, figures, limits)
    worse = regressions(before.stages, figures, limits, unjudged)
    machines = [plain] if recorded is None else [plain, recorded]
    report = {
        "rate": rate,
        "achieved": round(plain.trips.achieved(rate or 0), 1),
        "achieved_recorded": None if recorded is None else round(recorded.trips.achieved(rate or 0), 1),
        "size": size,
        "vcpus": scenario.machine.vcpus,
        "poll": scenario.machine.poll.text(),
        "build": BUILD,
        "stages": figures,
        "recorder_ns": None if recorded is None else figures[RECORDED]["p50_ns"] - figures[ROUND_TRIP]["p50_ns"],
        "records_dropped": sum(one.dropped for one in machines),
        "lost": sum(one.lost for one in machines),
        "faults": summed([one.faults for one in machines]),
        "refused": dict(sum((Counter(one.refused) for one in machines), Counter())),
        "refusals": joined_refusals([one.refusals for one in machines]),
        "regressions": worse,
        "unjudged": unjudged,
        "within_spread": within_spread(before.stages, figures, limits, unjudged),
        "finding": None,
        **ended,
    }
    if failure is None and interruption.status is None:
        report["finding"] = _kept(case, report, recorded_at)
    for line in _cautions(report):
        say(f"vmbus-emu: {line}")
    if compare is not None and (other := before.otherwise(report)):
        say(f"vmbus-emu: {compare} was measured otherwise: {other}")
    if as_json:
        print_json("latency", VERSION, report)
    else:
        _show(report, terminal_plot(histograms[ROUND_TRIP], shutil.get_terminal_size().columns), before)
        if recorded is None:
            say("vmbus-emu: the machine that records did not come to its end: there are no stages")
    if failure is not None:
        raise failure
    return interruption.status or (ExitStatus.FINDING if _found(report) else ExitStatus.FINE)


def _scenario(path: Path | None, vcpus: int | None, poll: str | None, faults: tuple[str, ...] = ()) -> Scenario:
    """The scenario to measure on: by default one echo device, which is what round trips are for."""
    scenario = Scenario.default() if path is None else Scenario.load(path)
    devices = [parse_device("echo:1")] if path is None else []
    scenario = scenario.with_overrides(vcpus=vcpus, poll=poll, devices=devices, faults=faults)
    refuse_guest_deaths(scenario, "latency")
    check_versions(scenario)
    return scenario


def _recorded_s(rate: int | None, duration_s: float) -> float:
    """How long the machine that records is measured: a million records say where time goes as well as a hundred."""
    return min(duration_s, RECORDED_S if rate is None else max(RECORDED_S, MOST_RECORDED / rate))


def measure(
    scenario: Scenario, rate: int, size: int, duration_s: float, *, record: bool = False, kept: Path | None = None
) -> Measured:
    """Boot a machine, let one CPU ping its channel for so long, and read what it wrote down.

    `kept` is where the recording goes, if somebody wants it.
    """
    with (
        nameless_file() as samples,
        nameless_file() as drained,
        launch(scenario, record=record) as running,
        crash_recorded(running),
    ):
        with recording(running, (kept or drained) if record else None) as recorded:
            running.wait_ready()
            began_s = time.time()
            lost = _ping(running, rate, size, duration_s, samples)
            if record:
                hot_plug(running)
            running.shut_down_guest()
            trips = _trips(samples, began_s, duration_s)
            refused = refused_in_bad_faith(running.machine.control)
            if recorded is None:
                return Measured(trips, lost, Stages(), 0, running.faults.report(), *refused)
            running.stop()
        faults = running.faults.report()
        steps = _steps(recorded.path, running.machine.config["vp_indices"])
        # With records missing nobody knows which packet is which round trip.
        stages = stages_of(steps, () if recorded.dropped else trips.dues)
        return Measured(trips, lost, stages, recorded.dropped, faults, *refused)


def _case(
    scenario: Scenario, rate: int | None, size: int, duration_s: float, compare: Path | None, fail: tuple[str, ...]
) -> Case:
    """What is measured, and how to measure it again and compare it with the same."""
    words = ["--size", str(size), "--duration", f"{duration_s:g}"]
    words += [] if rate is None else ["--rate", str(rate)]
    words += [] if compare is None else ["--compare", str(compare.resolve())]
    for limit in fail:
        words += ["--fail", limit]
    # Its machines have the seed that a machine has when nobody says.
    return Case(("latency",), scenario, 0, (InFolder(SCENARIO), *words))


def _found(report: Mapping[str, Any]) -> list[str]:
    """What is wrong with what was measured, a line each."""
    found = [f"lost: {report['lost']}"] if report["lost"] else []
    found += [f"worse: {line}" for line in report["regressions"]]
    raised = report["refused"].get("backend-error", 0)
    return [*found, f"plugin errors: {raised}"] if raised else found


def _kept(case: Case, report: dict[str, Any], recording: Path) -> str | None:
    """The folder of what was found; None if nothing was, or if it could not be kept."""
    found = _found(report)
    folder = case.keep(found, recording=recording, judge=True) if found else None
    return None if folder is None else str(folder)


def summed(faults: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The faults of machines of one scenario, as those of one."""
    return [
        {**same[0], "seen": sum(one["seen"] for one in same), "hits": sum(one["hits"] for one in same)}
        for same in zip(*faults, strict=True)
    ]


def _ping(running: RunningMachine, rate: int, size: int, duration_s: float, samples: Path) -> int:
    echoing = [device for device in list_devices(running.machine) if device.driver == EchoDriver.name]
    channels = [one for device in echoing for one in device.channels if one.state == "opened"]
    if not channels:
        raise UserError("no channel is open to measure on; give a scenario with an echo device")
    first = channels[0]
    wanted = int(duration_s * 1e9)
    row = running.order(
        Program.PING, first.cpu, relid=first.relid, wanted=wanted, size=size, rate=rate, path=str(samples)
    )
    task = running.wait_tasks([row], duration_s + 60.0)[0]
    return task.errors if task.state == TaskState.FAILED else 0


def hot_plug(running: RunningMachine, times: int = HOT_PLUGS) -> None:
    """Control messages to follow: offers, openings and rescinds, one device after the other."""
    machine = running.machine
    for _ in range(times):
        offered = ask_host(machine, "offer", **{"class": "echo", "backend": "echo", "count": 1, "instance": ""})
        name = offered["offered"][0]
        wait_until_open(machine, name["relid"], name["generation"])
        ask_host(machine, "rescind", relid=name["relid"], instance="")
        wait_until_released(machine, name["relid"], name["generation"])
        running.pump(0)


def _trips(path: Path, began_s: float, seconds: float) -> Trips:
    pairs = array("Q", path.read_bytes())
    return Trips(pairs[::2], pairs[1::2], began_s, seconds)


def _intervals(plain: Measured, recorded: Measured | None, launched_s: float) -> dict[str, tuple[float, float]]:
    """From when on (seconds since the epoch) and for how long each histogram was filled.

    Messages are followed for the whole life of the machine that records, which was launched at `launched_s`.
    """
    intervals = {ROUND_TRIP: (plain.trips.began_s, plain.trips.seconds)}
    if recorded is not None:
        second = recorded.trips.began_s, recorded.trips.seconds
        life = launched_s, max(0.0, time.time() - launched_s)
        intervals |= dict.fromkeys((RECORDED, DUE_STAGE, *DATA_STAGES), second) | dict.fromkeys(CONTROL_STAGES, life)
    return intervals


def _steps(path: Path, vp_indices: list[int]) -> Iterator[Step]:
    """Records as the stages want them, in the order of time."""
    positions = {vp_index: position for position, vp_index in enumerate(vp_indices)}
    with Recording(path) as recording:
        for record in recording.records():
            position = -1 if record.vp is None else positions[record.vp]
            yield Step(record.t_ns, record.event.number, record.values, position)


def _limits(texts: Sequence[str]) -> dict[str, float]:
    """Percentile name -> share that it may be worse by; UserError for one that is said twice."""
    limits: dict[str, float] = {}
    for text in texts:
        name, share = _limit(text)
        if name in limits:
            raise UserError(f"--fail {text}: there is another limit for {name}; leave one of them out")
        limits[name] = share
    return limits


def _limit(text: str) -> tuple[str, float]:
    """`p99:+10%` as ("p99", 0.1)."""
    name, _, share = text.partition(":")
    number = share.removeprefix("+").removesuffix("%")
    try:
        value = float(number) / 100
    except ValueError:
        value = -1.0
    if name not in _PACKET_NAMES or not share.endswith("%") or not 0 <= value < math.inf:
        raise UserError(f"--fail {text}: not understood; write it like p99:+10% ({', '.join(_PACKET_NAMES)})")
    return name, value


@dataclass(frozen=True, slots=True)
class Older:
    """An older report: count, percentiles (ns) and spread of each stage, and what it was measured with."""

    stages: dict[str, dict[str, Any]]
    measured_with: dict[str, Any]

    def otherwise(self, report: Mapping[str, Any]) -> str:
        """What of it is not as in `report`, in the old one's values; "" if nothing is."""
        changed = {name: value for name, value in self.measured_with.items() if value != report[name]}
        return ", ".join(_pace(value) if name == "rate" else f"{name} {value}" for name, value in changed.items())


def _read_report(path: Path) -> Older:
    """An older report; UserError when it is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        name, version, stages = document["schema"]["name"], document["schema"].get("version", VERSION), {}
        if (name, version) == (REPORT, VERSION):
            stages = {stage: _read_stage(one) for stage, one in document["stages"].items()}
            stages[ROUND_TRIP]  # without it nothing would be compared, and nothing worse
    except OSError as error:
        raise UserError(f"--compare {path}: {error.strerror}; give what `vmbus-emu latency --json` printed") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise UserError(f"--compare {path}: no report; give what `vmbus-emu latency --json` printed") from None
    if name != REPORT:
        raise UserError(f"--compare {path}: it is a {name}; give what `vmbus-emu latency --json` printed")
    if version != VERSION:
        raise UserError(f"--compare {path}: a report of version {version}, where {VERSION} is read; measure it again")
    measured_with = {key: document[key] for key in ("rate", "size", "vcpus", "poll") if key in document}
    # One that does not say is from before there was another.
    return Older(stages, {**measured_with, "build": document.get("build", PURE)})


def _read_stage(one: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a stage that are compared; it has no spread if the report is from before that was told."""
    spread = {name: float(value) for name, value in one.get("spread", {}).items() if value is not None}
    figures = {f"{name}_ns": float(one[f"{name}_ns"]) for name in _PACKET_NAMES}
    return {"count": int(one["count"]), **figures, "spread": spread}


def _change(before: Mapping[str, float], now: Mapping[str, float]) -> Iterator[str]:
    """Median and 99th percentile as they were, as they are, and by how much they changed."""
    for figure in ("p50_ns", "p99_ns"):
        yield f"{before[figure] / US:.1f}"
        yield f"{now[figure] / US:.1f}"
        yield f"{now[figure] / before[figure] - 1:+.0%}" if before[figure] else "-"


def _pace(rate: int | None) -> str:
    return "one after the other" if rate is None else f"{rate} a second"


def _cautions(report: Mapping[str, Any]) -> Iterator[str]:
    """What the figures do not say by themselves, and somebody would read them wrongly without."""
    rate, plain, recorded = report["rate"], report["achieved"], report["achieved_recorded"]
    reached = {"": plain} | ({} if recorded is None else {" by the machine that records": recorded})
    slower = [f"{by:,.0f}{whom}" for whom, by in reached.items() if rate is not None and by < HELD * rate]
    if slower:
        yield (
            f"{rate} a second were not reached: {', and '.join(slower)}; the rest waited, "
            "and the round trips are as long as the backlog: a lower --rate tells more"
        )
    if report["records_dropped"]:
        dropped = report["records_dropped"]
        yield f"{counted(dropped, 'record was', 'records were')} dropped: the stages are those of what was left"
    if report["unjudged"]:
        yield f"too few samples for --fail, not judged: {', '.join(report['unjudged'])}; --duration makes them more"
    if wide := report["within_spread"]:
        more = len(wide) - MOST_TOLD
        yield (
            "parts of a run differ by more than --fail allows, so that runs of one and the same program may, too: "
            f"{', '.join(wide[:MOST_TOLD])}{f', and {more} more (--json tells all)' if more > 0 else ''}; "
            "a wider limit, a lower percentile or several runs tell more"
        )


def _show(report: dict[str, Any], curve: list[str], before: Older) -> None:
    rows = [
        (
            name,
            one["count"],
            *(f"{one[f'{percentile}_ns'] / US:.1f}" for percentile in _PACKET_NAMES),
            f"{one['max_ns'] / US:.1f}",
        )
        for name, one in report["stages"].items()
    ]
    print_table(("stage", "count", "p50 us", "p90 us", "p99 us", "p99.9 us", "max us"), rows)
    size, vcpus = report["size"], report["vcpus"]
    how = f"{counted(size, 'byte')}, {_pace(report['rate'])}, {counted(vcpus, 'vCPU')}, poll {report['poll']}"
    click.echo(f"\nround trip, {how}, {report['build']}:")
    for line in curve:
        click.echo(line)
    added = report["recorder_ns"]
    recorded = "" if added is None else f"p50 in the machine that records: {added / US:+.1f} us; "
    click.echo(f"\n{recorded}{report['achieved']:,.0f} round trips a second; {report['lost']} lost")
    tell_faults(report["faults"])
    tell_refused(report["refused"], report["refusals"])
    shared = [stage for stage in report["stages"] if stage in before.stages]
    if shared:
        click.echo("")
        print_table(
            ("stage", *(f"{name} {word}" for name in ("p50", "p99") for word in ("before us", "now us", "change"))),
            [(stage, *_change(before.stages[stage], report["stages"][stage])) for stage in shared],
        )
    for line in report["regressions"]:
        click.echo(f"worse: {line}")
