"""`vmbus-emu explore`: the host's server and the whole guest joined in one process, in every order of events.

No machine is made: both run here, one step at a time, and what is tried is every order in which messages are taken
and devices come, go and answer, and with `--threads` also which of the guest's threads goes on. What is found is told
as a schedule: numbered steps for people, plain events in JSON, which can be done again.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from emu.errors import UserError
from emu.scenario_text import nearest
from emu.switches import SWITCHES
from tools.exit_status import ExitStatus, deferring_interruption
from tools.findings import Case, InFolder, folder_of
from tools.named_files import check_apart, write_text
from tools.nouns import counted, noun
from tools.options import FileToWrite, Seconds, json_option
from tools.output import print_json, say

if TYPE_CHECKING:
    from tools.explore_cores import Setting
    from tools.explore_search import Explorer, Found, Violation


ERAS: Final = ("current", "seed")
TWICE: Final = "host.dup_rescind"
SCHEDULE: Final = "schedule.json"
"""The file of a finding that `--replay` reads."""


def _switches(_context: click.Context, _option: click.Parameter, given: tuple[str, ...]) -> tuple[str, ...]:
    """Names of switches, repeated or with commas between; UserError for what is none."""
    names = [name.strip() for one in given for name in one.split(",") if name.strip()]
    for name in names:
        if name not in SWITCHES:
            raise UserError(f"--without: there is no switch {name}; {nearest(name, list(SWITCHES))}")
    return tuple(dict.fromkeys(names))


INTERRUPTED: Final = "interruption"
"""`stopped` of an exploration that its user ended."""


@click.command()
@click.option("--depth", type=click.IntRange(1, 1000), default=12, show_default=True, help="Transitions from the boot.")
@click.option("--devices", type=click.IntRange(1, 4), default=2, show_default=True, help="Devices that come and go.")
@click.option(
    "--subchannels", type=click.IntRange(0, 2), default=1, show_default=True, help="Sub-channels of the first device."
)
@click.option("--threads", is_flag=True, help="Also every order among the guest's own threads, at its sync points.")
@click.option(
    "--without",
    metavar="SWITCH[,SWITCH]",
    multiple=True,
    callback=_switches,
    help="Make a historical mistake again, as a scenario's [switches] does; may be repeated.",
)
@click.option("--era", type=click.Choice(list(ERAS)), default="current", show_default=True, help="Which guest kernel.")
@click.option(
    "--fault",
    "faults",
    type=click.Choice([TWICE]),
    multiple=True,
    help="What the host may do besides: send each RESCIND a second time.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="In which order the states of a level are tried.")
@click.option("--states", type=click.IntRange(1), default=2_000_000, show_default=True, help="States to keep, at most.")
@click.option("--time-limit", type=Seconds(0.1), default=600.0, show_default=True, help="Seconds.")
@click.option(
    "--replay", type=click.Path(path_type=Path), help="Do the schedule of a counterexample (a file of --json) again."
)
@click.option(
    "--schedule-out",
    type=FileToWrite(),
    help="Write what is found as a schedule for processes (`races run FILE.toml`).",
)
@json_option
def explore(
    depth: int,
    devices: int,
    subchannels: int,
    threads: bool,
    without: tuple[str, ...],
    era: str,
    faults: tuple[str, ...],
    seed: int,
    states: int,
    time_limit: float,
    replay: Path | None,
    schedule_out: Path | None,
    as_json: bool,
) -> int:
    """Try every order in which host and guest may act, and check each state.

    Exit status 1 when an invariant is broken, 124 when the limits ended it before the depth was completed.

    \b
    Example:
      vmbus-emu explore --depth 12
      vmbus-emu explore --depth 14 --json >f.json
      vmbus-emu explore --replay f.json
      vmbus-emu explore --without wake_before_probe_wait --schedule-out a5.toml
      vmbus-emu races run a5.toml
      vmbus-emu explore --threads --devices 1 --subchannels 0 --depth 16 \\
        --without offer_gate
    """
    from tools.explore_cores import Setting
    from tools.explore_search import Explorer

    check_apart({"--schedule-out": schedule_out}, replay)
    schedule = None
    setting = Setting(devices, subchannels, threads, without, era, TWICE in faults)
    if replay is not None:
        setting, _problems, schedule = read_found(replay, "--replay: ")

    begin = time.monotonic()
    # The two cores are made and run in this process: an exception out of a signal's handler would look like theirs.
    with deferring_interruption() as interruption:
        explorer = Explorer(setting)
        if schedule is not None:
            found = explorer.replay(schedule)
        else:
            found = explorer.explore(
                depth,
                seed=seed,
                states=states,
                out_of_time=lambda: interruption.status is not None or time.monotonic() - begin >= time_limit,
            )
    if interruption.status is not None and found.stopped:
        found.stopped = INTERRUPTED
    seconds = time.monotonic() - begin
    explorer.close()
    report = {
        "devices": setting.devices,
        "subchannels": setting.subchannels,
        "threads": setting.threads,
        "without": list(setting.without),
        "era": setting.era,
        "faults": [TWICE] if setting.twice else [],
        "seed": seed,
        "asked_depth": len(schedule) if schedule is not None else depth,
        **report_of(explorer, found, seconds),
    }
    report["finding"] = _kept(report, replay) if found.violation is not None else None
    if as_json:
        print_json("explore", 2, report)
    else:
        show(report)
    if found.violation is not None and schedule_out is not None:
        export(schedule_out, setting, found.violation)
    if interruption.status is not None:
        return interruption.status
    if found.violation is not None:
        return ExitStatus.FINDING
    return ExitStatus.TIME_LIMIT if found.stopped else ExitStatus.FINE


def _kept(report: dict[str, Any], replay: Path | None) -> str | None:
    """The folder of a counterexample; None if it could not be kept. One that is kept and done again is the same."""
    if replay is not None and (folder := folder_of(replay)) is not None:
        say(f"vmbus-emu: this is the schedule of the finding in {folder}")
        return str(folder)
    violation = report["violation"]
    world = {name: report[name] for name in ("devices", "subchannels", "threads", "without", "era", "faults")}
    steps = [f"{number:4}  {event['text']}" for number, event in enumerate(violation["schedule"], 1)]
    case = Case(("explore",), None, report["seed"], ("--replay", InFolder(SCHEDULE)), same=True)
    kept = case.keep(
        [*violation["problems"], "", *steps, "", json.dumps(world)],
        no_recording=f"no machine was made; {SCHEDULE} is what was done",
        files={SCHEDULE: json.dumps(report, indent=2) + "\n"},
    )
    return None if kept is None else str(kept)


def read_found(path: Path, source: str = "") -> tuple[Setting, list[str], list[dict[str, Any]]]:
    """Small world, problems and steps of a counterexample; UserError (behind `source`) for a file without one."""
    from tools.explore_cores import Setting

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        devices, subchannels, schedule = found["devices"], found["subchannels"], found["violation"]["schedule"]
        threads, without, era, faults = found["threads"], found["without"], found["era"], found["faults"]
        problems = found["violation"]["problems"]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}{path} cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{source}{path} holds no counterexample; write one with `explore --json`") from None
    plain = isinstance(schedule, list) and all(isinstance(event, dict) for event in schedule)
    told = isinstance(problems, list) and problems and all(isinstance(one, str) for one in problems)
    known = devices in range(1, 5) and subchannels in range(3) and isinstance(threads, bool) and era in ERAS
    if not (plain and told and known and isinstance(without, list) and faults in ([], [TWICE])):
        raise UserError(f"{source}{path} holds no schedule; write one with `explore --json`")
    for name in without:
        if name not in SWITCHES:
            raise UserError(f"{source}{path} names the switch {name!r}; known: {', '.join(SWITCHES)}")
    return Setting(devices, subchannels, threads, tuple(without), era, TWICE in faults), problems, schedule


def export(path: Path, setting: Setting, violation: Violation) -> None:
    """Write a counterexample as a schedule for processes; one that cannot be forced on them is told, not written."""
    from tools.explore_schedule import schedule_text
    from tools.schedule import NotForced

    try:
        text = schedule_text(setting, violation.problems, violation.schedule, path.stem)
    except NotForced as why:
        say(f"--schedule-out: {path} is not written: {why}")
        return
    write_text(path, text, "--schedule-out")


def report_of(explorer: Explorer, found: Found, seconds: float) -> dict[str, Any]:
    """What `--json` prints of an exploration."""
    violation = found.violation
    return {
        "transitions": found.transitions,
        "states": found.states,
        "depth": found.depth,
        "exhausted": found.exhausted,
        "stopped": found.stopped or None,
        "seconds": round(seconds, 3),
        "transitions_per_second": round(found.transitions / seconds),
        "guest": {"states": len(explorer.guest), "steps": explorer.guest.edges, "made": explorer.guest.made},
        "host": {"states": len(explorer.host), "steps": explorer.host.edges, "made": explorer.host.made},
        "violation": None if violation is None else {"problems": violation.problems, "schedule": violation.schedule},
    }


def show(report: dict[str, Any]) -> None:
    """A counterexample, if there is one, and the figures."""
    violation = report["violation"]
    if violation is not None:
        for number, event in enumerate(violation["schedule"], 1):
            click.echo(f"{number:4}  {event['text']}")
        for problem in violation["problems"]:
            click.echo(f"      {problem}")
    depth = f"depth {report['depth']} completed" + (", and there are no others" if report["exhausted"] else "")
    made, states, a_second = report["transitions"], report["states"], report["transitions_per_second"]
    click.echo(f"{counted(made, 'transition')}, {states:,} distinct {noun(states, 'state')}, {depth}")
    click.echo(f"{counted(a_second, 'transition')} a second, {report['seconds']:.1f} s")
    for core in ("guest", "host"):
        states, steps = report[core]["states"], report[core]["steps"]
        said = f"{counted(states, 'state')}, {steps:,} different {noun(steps, 'step')}"
        click.echo(f"{core}: {said}, {report[core]['made']:,} made")
    if report["stopped"] == INTERRUPTED:
        click.echo(f"interrupted, before the depth of {report['asked_depth']}")
    elif report["stopped"]:
        click.echo(f"stopped by the limit of {report['stopped']}, before the depth of {report['asked_depth']}")
    found = 0 if violation is None else len(violation["problems"])
    click.echo(counted(found, "violation") if found else "no violation")
