"""`vmbus-emu races`: races on demand. Each exhibit is a schedule that shows one of the field's old bugs, every time.

With its fix off a run breaks the invariant that its file names; with it on the same schedule breaks nothing.
"""

from __future__ import annotations

import time
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

import click

from emu.errors import UserError
from tools.exit_status import ExitStatus
from tools.histograms import check_writable, write_text
from tools.options import json_option
from tools.output import print_json, print_table, say
from tools.paths import made, state_dir
from tools.race_run import HELD, INCONCLUSIVE, STATUS, VIOLATED, RaceMachine, RaceRun
from tools.schedule import Schedule

EXHIBITS: Final = "exhibits"
KEPT: Final = 10
"""Findings that are kept, the newest."""


@click.group(invoke_without_command=True)
@click.pass_context
def races(ctx: click.Context) -> None:
    """Show the races that cost this field years, each the same way every time.

    \b
    Example:
      vmbus-emu races list
      vmbus-emu races run offer-rescind-overtake --fix off
      vmbus-emu races run offer-rescind-overtake --fix on
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def exhibits() -> dict[str, Path]:
    """The schedules that come with this program, by name and in their order."""
    directory = Path(str(files("tools"))) / EXHIBITS
    return {path.stem.split("-", 1)[1]: path for path in sorted(directory.glob("*.toml"))}


def find_schedule(name: str) -> Schedule:
    """An exhibit by its name or its id (`A1`), or a schedule file; UserError."""
    known = exhibits()
    for exhibit, path in known.items():
        if name in (exhibit, path.stem) or name.upper() == path.stem.split("-", 1)[0].upper():
            return Schedule.load(path)
    if Path(name).suffix == ".toml":
        return Schedule.load(Path(name))
    raise UserError(f"no exhibit is called {name}; `vmbus-emu races list` lists them, or give a schedule FILE.toml")


@races.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List the exhibits: id, name, the switch that is off, the invariant that it breaks."""
    schedules = {path.stem.split("-", 1)[0].upper(): Schedule.load(path) for path in exhibits().values()}
    rows = [
        {
            "id": number,
            "name": one.name.split("-", 1)[1],
            "title": one.title,
            "switches": list(one.scenario.fix.off()),
            "variant": one.scenario.fix.variant,
            "invariants": list(one.invariants),
        }
        for number, one in schedules.items()
    ]
    if as_json:
        print_json("races", 1, {"exhibits": rows})
        return
    print_table(
        ("id", "name", "fix off", "breaks"),
        [(str(r["id"]), str(r["name"]), _switches_text(r), " ".join(map(str, r["invariants"]))) for r in rows],  # type: ignore[arg-type]
    )


def _switches_text(row: dict[str, object]) -> str:
    names = row["switches"]
    assert isinstance(names, list)
    return " ".join([*names, *([f"variant={row['variant']}"] if row["variant"] else [])])


@races.command()
@click.argument("name", metavar="NAME|FILE")
@click.option("--fix", type=click.Choice(["on", "off"]), default="off", show_default=True, help="The historical fix.")
@click.option("--times", type=click.IntRange(1, 10_000), default=1, help="How often to run it.")
@click.option("--record", "record_path", type=click.Path(path_type=Path), help="Where to record (default: findings).")
@click.option("--junit", type=click.Path(path_type=Path), help="Write the runs as a JUnit file.")
@json_option
def run(name: str, fix: str, times: int, record_path: Path | None, junit: Path | None, as_json: bool) -> int:
    """Run an exhibit, or a schedule of your own.

    Exit status 1: a violation was seen. 0: none. 124: inconclusive, a step did not come about.

    \b
    Example:
      vmbus-emu races run A1 --fix off
      vmbus-emu races run my-schedule.toml --fix on --times 20
    """
    check_writable(junit, "--junit")
    schedule = find_schedule(name)
    folder = record_path.parent if record_path is not None else made(findings_dir() / _stamp(schedule.name))
    runs = []
    with RaceMachine(schedule, fix=fix == "on") as machine:
        for number in range(times):
            runs.append(machine.run(record_path or folder / f"{number + 1}.rec"))
            if not as_json:
                click.echo(line_of(runs[-1]))
    keep(schedule, runs, folder, own=record_path is not None)
    if junit is not None:
        write_text(junit, junit_of(runs), "--junit")
    if as_json:
        worst = worst_of(runs)
        print_json("races-run", 1, {**worst.report(), "runs": [one.report() for one in runs]})
    return STATUS[worst_of(runs).verdict]


def findings_dir() -> Path:
    """Where findings are kept, a folder each."""
    return state_dir() / "findings"


def _stamp(name: str) -> str:
    return f"{time.strftime('%Y%m%dT%H%M%S')}-{name}-{time.monotonic_ns() % 1_000_000:06}"


def worst_of(runs: list[RaceRun]) -> RaceRun:
    """The run that decides the exit status: an unexpected one first, then a violation, then an inconclusive one."""
    order = (VIOLATED, INCONCLUSIVE, HELD)
    return min(runs, key=lambda one: (one.expected, order.index(one.verdict)))


def line_of(run: RaceRun) -> str:
    """One run in one line, and its violations below it."""
    verdict = {VIOLATED: f"violated {run.invariant}", HELD: "held", INCONCLUSIVE: "inconclusive"}[run.verdict]
    as_expected = "as expected" if run.expected else "NOT as expected"
    head = f"{run.name}, fix {'on' if run.fix else 'off'}: {verdict}, {as_expected} ({run.seconds:.2f} s)"
    lines = [head, *(f"  {one.invariant}: {one.text}" for one in run.broken)]
    return "\n".join([*lines, f"  {run.reason}"] if run.reason else lines)


def keep(schedule: Schedule, runs: list[RaceRun], folder: Path, *, own: bool) -> None:
    """Keep what a run that found something needs to be repeated; the recording of one that found nothing goes."""
    if own:
        return
    for one in runs:
        if one.verdict == HELD:
            one.recording.unlink(missing_ok=True)
    if all(one.verdict == HELD for one in runs):
        folder.rmdir()
        return
    (folder / "schedule.toml").write_text(schedule.path.read_text())
    fix = "on" if runs[0].fix else "off"
    line = f"vmbus-emu races run {folder / 'schedule.toml'} --fix {fix}"
    (folder / "repeat").write_text(f"{line}\n")
    say(f"kept: {folder}; repeat it: {line}")
    for old in sorted(findings_dir().iterdir())[:-KEPT]:
        # Another run may clear up, too.
        with suppress(FileNotFoundError):
            for path in old.iterdir():
                path.unlink(missing_ok=True)
            old.rmdir()


def junit_of(runs: list[RaceRun]) -> str:
    """One test case a run: failed where it is not what the schedule says, skipped where it says nothing."""
    failed = sum(not one.expected and one.verdict != INCONCLUSIVE for one in runs)
    skipped = sum(one.verdict == INCONCLUSIVE for one in runs)
    suite = ElementTree.Element(
        "testsuite", name="vmbus-emu races", tests=str(len(runs)), failures=str(failed), skipped=str(skipped)
    )
    for number, one in enumerate(runs, 1):
        name = f"{one.name} fix {'on' if one.fix else 'off'} #{number}"
        case = ElementTree.SubElement(suite, "testcase", classname="races", name=name, time=f"{one.seconds:.3f}")
        if one.verdict == INCONCLUSIVE:
            ElementTree.SubElement(case, "skipped", message=one.reason)
        elif not one.expected:
            ElementTree.SubElement(case, "failure", message=one.verdict).text = line_of(one)
    return ElementTree.tostring(suite, encoding="unicode") + "\n"


__all__ = ["ExitStatus", "races"]
