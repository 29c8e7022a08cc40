"""`vmbus-emu races`: races on demand. Each exhibit is a schedule that shows one of the field's old bugs, every time.

With its fix off a run breaks the invariant that its file names; with it on the same schedule breaks nothing.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from emu.errors import UserError
from tools.exit_status import ExitStatus, noting_interruption
from tools.findings import RECORDING, REPEAT, Case, InFolder
from tools.junit import JunitCase, suite_of, write_end
from tools.named_files import check_apart, write_text
from tools.nameless_file import nameless_file
from tools.nouns import counted
from tools.options import FileToWrite, json_option
from tools.output import narrates, print_json, print_table, say
from tools.race_run import HELD, INCONCLUSIVE, STATUS, VIOLATED, RaceMachine, RaceRun
from tools.schedule import NotForced, Schedule

if TYPE_CHECKING:
    from tools.race_board import Game

EXHIBITS: Final = "exhibits"
SEED: Final = 0
"""Nothing in a schedule is random; its machine has the seed that any machine has when nobody says."""
SUITE: Final = "vmbus-emu races"
CLASSNAME: Final = "races"
SCHEDULE: Final = "schedule.toml"
"""The file of a finding that `races run` reads."""


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
    if Path(name).suffix == ".json":
        from tools.explore_schedule import schedule_of

        return schedule_of(Path(name))
    if Path(name).suffix == ".rec":
        raise UserError(f"{name} is a recording; `vmbus-emu races show --from {name}` tells it")
    from tools.race_board import BOARDS

    if board := next((one for one in BOARDS if one.name.casefold() == name.casefold()), None):
        raise UserError(f"{name} is a board of two exhibits; `vmbus-emu races board {board.name}` plays it")
    raise UserError(
        f"no exhibit is called {name}; `vmbus-emu races list` lists them, or give a schedule FILE.toml, "
        "or what `explore --json` found"
    )


@races.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List the exhibits: id, name, title; with --json also switches and invariants.

    \b
    Example:
      vmbus-emu races list --json | jq -r '.exhibits[] | .name'
    """
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
    print_table(("id", "name", "title"), [(row["id"], row["name"], row["title"]) for row in rows], whole=("id", "name"))


@races.command()
@click.argument("name", metavar="NAME|FILE")
@click.option("--fix", type=click.Choice(["on", "off"]), default="off", show_default=True, help="The historical fix.")
@click.option("--times", type=click.IntRange(1, 10_000), default=1, help="How often to run it.")
@click.option("--record", "record_path", type=FileToWrite(), help="Where to record (default: findings).")
@click.option("--junit", type=FileToWrite(), help="Write the runs as a JUnit file.")
@json_option
def run(name: str, fix: str, times: int, record_path: Path | None, junit: Path | None, as_json: bool) -> int:
    """Run an exhibit, or a schedule of your own.

    What `explore --json` found is run, too: as far as it can be forced on processes, with the same switches off.
    Exit status 1: a violation was seen. 0: none. 124: inconclusive, a step did not come about, or cannot be forced.
    docs/schedules.md has all that a schedule may say: verbs, points, switches, calls.

    \b
    Example:
      vmbus-emu races run A1 --fix off
      vmbus-emu races run my-schedule.toml --fix on --times 20
      vmbus-emu explore --depth 9 --without wake_before_probe_wait --json >f.json
      vmbus-emu races run f.json
    """
    check_apart({"--record": record_path, "--junit": junit}, Path(name))
    try:
        schedule = find_schedule(name)
    except NotForced as why:
        say(f"{name}: inconclusive: {why}")
        none = [RaceRun(Path(name).stem, fix == "on", INCONCLUSIVE, (), False, str(why), 0.0, Path())]
        if junit is not None:
            write_text(junit, junit_of(none), "--junit")
        if as_json:
            print_json("races-run", 1, report_of(none, None, None))
        return ExitStatus.TIME_LIMIT
    runs: list[RaceRun] = []
    with _told_if_it_ends(junit), ExitStack() as deciding:
        with RaceMachine(schedule, fix=fix == "on", seed=SEED) as machine, noting_interruption() as interruption:
            for _ in range(times):
                with ExitStack() as recorded:
                    once = record_path if times == 1 else None
                    runs.append(machine.run(once or recorded.enter_context(nameless_file())))
                    # Of all recordings there is only that of the run that decides, so far.
                    if worst_of(runs) is runs[-1]:
                        before = deciding.pop_all()
                        deciding.enter_context(recorded.pop_all())
                        before.close()
                if not as_json:
                    click.echo(line_of(runs[-1]))
        if interruption.status is not None:
            say(f"interrupted after {len(runs)} of {counted(times, 'run')}")
        if not runs:
            write_end(junit, SUITE, CLASSNAME, "interrupted before the first run ended")
            return interruption.status or ExitStatus.FAILED
        finding = keep(schedule, runs)
        if record_path is not None and times > 1:
            shutil.copyfile(worst_of(runs).recording, record_path)
    if junit is not None:
        output = "" if finding is None else f"finding kept in {finding}; repeat it: sh {finding / REPEAT}"
        write_text(junit, junit_of(runs, output, interrupted=len(runs) < times), "--junit")
    if as_json:
        print_json("races-run", 1, report_of(runs, record_path, finding))
    return interruption.status or STATUS[worst_of(runs).verdict]


@contextmanager
def _told_if_it_ends(junit: Path | None) -> Iterator[None]:
    """An error that ends the block is in the JUnit file as well."""
    try:
        yield
    except Exception as error:
        write_end(junit, SUITE, CLASSNAME, str(error) or type(error).__name__)
        raise


def report_of(runs: list[RaceRun], record_path: Path | None, finding: Path | None) -> dict[str, object]:
    """The object that `--json` prints; a recording is only there of the run that decides, if it was to be kept."""
    worst = worst_of(runs)
    there = record_path or (finding and finding / RECORDING)
    reports = [{**one.report(), "recording": str(there) if there and one is worst else None} for one in runs]
    decides = next(report for one, report in zip(runs, reports, strict=True) if one is worst)
    return {**decides, "finding": None if finding is None else str(finding), "runs": reports}


@races.command()
@click.argument("name", metavar="[NAME|FILE]", required=False)
@click.option("--fix", type=click.Choice(["on", "off"]), default="off", show_default=True, help="The historical fix.")
@click.option("--from", "recording", type=click.Path(path_type=Path), metavar="RECORDING", help="A run's, of `run`.")
@click.option("--svg", "picture", type=FileToWrite(), help="Write the diagram as a picture, too.")
@json_option
def show(name: str | None, fix: str, recording: Path | None, picture: Path | None, as_json: bool) -> int:
    """Tell an exhibit in plain words, run it, and draw the run as a sequence diagram.

    With --from nothing is run: the recording says which exhibit it is, and what came of it.

    \b
    Example:
      vmbus-emu races show A1
      vmbus-emu races show A1 --fix on --svg a1.svg
      vmbus-emu races run A1 --record a1.rec; vmbus-emu races show --from a1.rec
    """
    from tools.race_picture import picture_of
    from tools.race_show import of_recording, print_shown, run_and_show

    check_apart({"--svg": picture}, recording, None if name is None else Path(name))
    if name is None and recording is None:
        raise UserError("nothing is said to show; name an exhibit (`vmbus-emu races list`) or give --from RECORDING")
    try:
        schedule = find_schedule(name) if name is not None else None
    except NotForced as why:
        say(f"{name}: inconclusive: {why}")
        return ExitStatus.TIME_LIMIT
    if recording is not None:
        shown = of_recording(recording, schedule)
    else:
        assert schedule is not None
        shown = run_and_show(schedule, fix=fix == "on")
    print_shown(shown, as_json=as_json)
    if picture is not None:
        title = f"{shown.schedule.name}: {shown.schedule.title} (fix {'on' if shown.note.fix else 'off'})"
        write_text(picture, picture_of(shown.diagram, title, shown.outcome), "--svg")
    return ExitStatus.TIME_LIMIT if shown.note.reason else ExitStatus.FINE


@races.command()
@click.argument("name", required=False)
@click.option("--times", type=click.IntRange(1, 1_000), default=1, help="How often to run each schedule and setting.")
@json_option
def board(name: str | None, times: int, as_json: bool) -> int:
    """Play a board: two exhibits that belong together, each under all four settings of their two fixes.

    Without a name the boards are listed. Exit status 0: everything came out as the board says. 1: something did not.
    124: inconclusive, a step did not come about.

    \b
    Example:
      vmbus-emu races board A4xA5
      vmbus-emu races board B1xB2 --times 5 --json
    """
    from tools.race_board import BOARDS, Game, find_board

    if name is None:
        if as_json:
            print_json("races-boards", 1, {"boards": [{"name": one.name, "title": one.title} for one in BOARDS]})
        else:
            print_table(("board", "title"), [(one.name, one.title) for one in BOARDS])
        return ExitStatus.FINE
    game = Game.of(find_board(name), find_schedule)
    done, wanted = 0, times * len(game.cells)
    with noting_interruption() as interruption:
        for cell in game.play(times, SEED):
            done += 1
            if narrates():
                say(f"{done} of {wanted}: {cell.schedule.name}, {game.setting_text(cell.setting)}: {cell.text}")
    if interruption.status is not None:
        say(f"interrupted after {done} of {wanted} runs")
    if as_json:
        print_json("races-board", 1, game.report())
    else:
        print_game(game)
    return interruption.status or status_of(game)


def print_game(game: Game) -> None:
    """Story, a table for each schedule, and which settings survive both."""
    from tools.race_board import paragraphs_of
    from tools.race_show import screen_width

    click.echo(f"{game.board.name}: {game.board.title}")
    for paragraph in paragraphs_of(game.board):
        click.echo("\n" + textwrap.fill(paragraph, min(100, screen_width())))
    for schedule in game.schedules:
        click.echo("\n" + game.heading(schedule))
        sys.stdout.flush()
        print_table(*game.table(schedule))
        sys.stdout.flush()
    for cell in game.cells:
        for reason in sorted({one.reason for one in cell.runs if one.reason}):
            click.echo(f"\n{cell.schedule.name}, {game.setting_text(cell.setting)}: {reason}")
    click.echo("\n" + game.summary())


def status_of(game: Game) -> ExitStatus:
    """An exit status: an inconclusive run says less than one that is not as told."""
    if any(not cell.as_told and not cell.inconclusive for cell in game.cells):
        return ExitStatus.FINDING
    return ExitStatus.TIME_LIMIT if any(cell.inconclusive for cell in game.cells) else ExitStatus.FINE


@races.command()
@click.option("-o", "--output", type=FileToWrite(), metavar="OUT", help="Where to; default: stdout.")
@json_option
def museum(output: Path | None, as_json: bool) -> None:
    """Write the page of all exhibits (Markdown): each one told, run with its fix off and on, and drawn.

    \b
    Example:
      vmbus-emu races museum -o races.md
    """
    from tools.museum import page
    from tools.race_board import BOARDS

    if as_json and output is None:
        raise UserError("--json prints an object on stdout, where the page would go; name a file with -o OUT")
    known = exhibits()
    text = page(map(Schedule.load, known.values()), say)
    if output is None:
        sys.stdout.write(text)
        return
    write_text(output, text, "-o")
    if as_json:
        sizes = {"path": str(output), "bytes": len(text.encode())}
        print_json("races-museum", 1, {**sizes, "exhibits": list(known), "boards": [one.name for one in BOARDS]})


def worst_of(runs: list[RaceRun]) -> RaceRun:
    """The run that decides the exit status: an unexpected one first, then a violation, then an inconclusive one."""
    order = (VIOLATED, INCONCLUSIVE, HELD)
    return min(runs, key=lambda one: (one.expected, order.index(one.verdict)))


def line_of(run: RaceRun) -> str:
    """One run in one line, and its violations below it."""
    verdict = {VIOLATED: f"violated {run.invariant}", HELD: "held", INCONCLUSIVE: "inconclusive"}[run.verdict]
    as_expected = "as expected" if run.expected else "NOT as expected"
    head = f"{run.name}, fix {'on' if run.fix else 'off'}: {verdict}, {as_expected} ({run.seconds:.2f} s)"
    lines = [head, *(f"  {one.invariant}: {one.text}" for one in run.broken), *(f"  {one}" for one in run.failed)]
    return "\n".join([*lines, f"  {run.reason}"] if run.reason else lines)


def keep(schedule: Schedule, runs: list[RaceRun]) -> Path | None:
    """Keep the run that decides, if it found anything or did not come to its end; the folder then."""
    worst = worst_of(runs)
    if worst.verdict == HELD:
        return None
    # Plugins are named relative to where a schedule lies, so one with plugins is repeated from there.
    file = str(schedule.path.absolute()) if schedule.scenario.plugins else InFolder(SCHEDULE)
    words = (file, "--fix", "on" if worst.fix else "off", "--times", str(len(runs)))
    scenario = (schedule.with_fix() if worst.fix else schedule).scenario
    case = Case(("races", "run"), scenario, SEED, words, label=schedule.name)
    text = schedule.text or schedule.path.read_text(encoding="utf-8")
    return case.keep(line_of(worst).splitlines(), recording=worst.recording, files={SCHEDULE: text})


def junit_of(runs: list[RaceRun], output: str = "", *, interrupted: bool = False) -> str:
    """One test case a run: failed where it is not what the schedule says, skipped where it says nothing.

    One more, an error, where somebody ended the command before its last run.
    """
    cases = [
        JunitCase(
            f"{one.name} fix {'on' if one.fix else 'off'} #{number}",
            failure="" if one.expected or one.verdict == INCONCLUSIVE else one.verdict,
            skipped=one.reason or INCONCLUSIVE if one.verdict == INCONCLUSIVE else "",
            text="" if one.expected or one.verdict == INCONCLUSIVE else line_of(one),
            seconds=one.seconds,
        )
        for number, one in enumerate(runs, 1)
    ]
    early = f"interrupted after {counted(len(runs), 'run')}"
    cases += [JunitCase("ran to its end", error=early)] if interrupted else []
    return suite_of(SUITE, CLASSNAME, cases, seconds=sum(one.seconds for one in runs), output=output)


__all__ = ["ExitStatus", "races"]
