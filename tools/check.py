"""`vmbus-emu check`: the invariants that a recording alone can decide, each held, broken or undecided.

A violation is named by its number and shown with the records that it is in. The same rules run at the end of a
recorded `stress`.

The recording of a schedule's run says, besides, whether the machine had come to rest (then what has not happened never
will), and what the run itself found in the machine's memory, which no recording has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from emu.recording import Recording, TraceRecord
from tools.event_names import shown_text
from tools.exit_status import ExitStatus
from tools.findings import Case, folder_of
from tools.invariant_table import RULES
from tools.invariants import Finding, Machine, Verdict, judge, missing_of
from tools.junit import JunitCase, suite_of
from tools.named_files import check_apart, write_text
from tools.nouns import counted
from tools.options import FileToWrite, json_option
from tools.output import print_json, say
from tools.trace import as_json

if TYPE_CHECKING:
    from tools.race_run import RunNote

SHOWN: Final = 10
"""Violations of one rule that are shown to people."""


def check_recording(path: Path) -> tuple[list[Verdict], Recording]:
    """Verdicts on a recording; UserError when it is none."""
    with Recording(path) as recording:
        return verdicts_of(recording), recording


def verdicts_of(recording: Recording) -> list[Verdict]:
    """Verdicts on a recording that is open."""
    machine = Machine(tuple(recording.head.get("vp_indices", ())))
    note = run_of(recording)
    settled = note is not None and note.settled
    return judge(RULES, recording.records(), machine, missing=missing_of(recording), settled=settled)


def run_of(recording: Recording) -> RunNote | None:
    """What the run of a schedule says of itself; None if the recording is of no such run."""
    if not any(note.get("kind") == "race" for note in recording.notes):
        return None  # without the import, which brings a launcher with it
    from tools.race_run import RunNote

    return RunNote.of(recording.notes)


def told_of(verdicts: Sequence[Verdict], note: RunNote | None) -> list[tuple[str, str]]:
    """What only the run itself saw: invariant and text of each."""
    shown = {violation.text for violation in violations_of(verdicts)}
    return [] if note is None else [(one.invariant, one.text) for one in note.broken if one.text not in shown]


def violations_of(verdicts: Sequence[Verdict]) -> list[Finding]:
    """All violations that were kept, by number."""
    return [violation for verdict in verdicts for violation in verdict.violations]


def cut_of(verdicts: Sequence[Verdict]) -> list[str]:
    """A line for each rule of whose violations not all were kept: how many more there are."""
    return [
        f"{verdict.name}: {verdict.count - kept:,} more like these, which are only counted"
        for verdict in verdicts
        if verdict.count > (kept := len(verdict.violations))
    ]


def report_of(verdicts: Sequence[Verdict], path: Path, told: Sequence[tuple[str, str]] = ()) -> dict[str, Any]:
    """The object that `--json` prints; `told` is what the run itself saw beside the records."""
    return {
        "recording": str(path),
        "told": [{"invariant": name, "text": text} for name, text in told],
        "violations": [
            {"invariant": one.name, "text": one.text, "records": [as_json(record) for record in one.records]}
            for one in violations_of(verdicts)
        ],
        "invariants": [
            {
                "invariant": verdict.name,
                "title": verdict.rule.TITLE,
                "verdict": "undecided" if verdict.undecided else "broken" if verdict.count else "held",
                "violations": verdict.count,
                "undecided": verdict.undecided,
            }
            for verdict in verdicts
        ],
    }


def junit_of(verdicts: Sequence[Verdict], path: Path, told: Sequence[tuple[str, str]] = (), damage: str = "") -> str:
    """One test case an invariant: failed where it is broken, skipped where it is undecided.

    One more of what is `told`, and one of damage, since nearly everything is undecided then.
    """
    cases = [
        JunitCase(
            f"{verdict.name} {verdict.rule.TITLE}",
            failure=counted(verdict.count, "violation") if verdict.count and not verdict.undecided else "",
            skipped=verdict.undecided,
            text="\n".join([*(line for one in verdict.violations for line in lines_of(one)), *cut_of([verdict])]),
        )
        for verdict in verdicts
    ]
    if told:
        text = "\n".join(f"{name}: {text}" for name, text in told)
        cases.append(JunitCase("the machine as its run found it", failure=counted(len(told), "violation"), text=text))
    if damage:
        cases.append(JunitCase("the recording is whole", failure=damage))
    return suite_of(f"vmbus-emu check {path.name}", "check", cases)


def lines_of(violation: Finding) -> list[str]:
    """A violation for people: what, then each record that shows it."""
    return [f"{violation.name}: {violation.text}", *(f"    {_line(record)}" for record in violation.records)]


def _line(record: TraceRecord) -> str:
    where = f"{record.actor.name}/{record.context.lower()}"
    return f"{record.t_ns / 1e9:.6f} {where} #{record.seq} {record.event.name}: {shown_text(record)}"


def keep(verdicts: Sequence[Verdict], recording: Recording, told: Sequence[tuple[str, str]] = ()) -> Path | None:
    """Keep what was found, its recording left where it is; one that is in a finding's folder belongs to that."""
    path = recording.path.absolute()
    if (folder := folder_of(path)) is not None:
        say(f"vmbus-emu: this is the recording of the finding in {folder}")
        return folder
    found = [line for one in violations_of(verdicts) for line in lines_of(one)]
    found += [*cut_of(verdicts), *(f"{name}: {text}" for name, text in told)]
    found += [recording.damage] if recording.damage else []
    case = Case(("check",), None, None, (str(path),), same=True)
    return case.keep(found, no_recording=f"it stays where it is, {path}; it does not say of which scenario it is")


def show(verdicts: Sequence[Verdict]) -> None:
    """What is broken with its records, then one line of all."""
    for verdict in verdicts:
        for violation in verdict.violations[:SHOWN]:
            for line in lines_of(violation):
                click.echo(line)
        if (more := verdict.count - SHOWN) > 0:
            listed = len(verdict.violations) - SHOWN
            them = "them" if listed == more else f"{listed} of them"
            click.echo(f"{verdict.name}: {more:,} more like these (--json lists {them})")
    held = sum(1 for one in verdicts if not one.count and not one.undecided)
    broken = sum(1 for one in verdicts if one.count)
    undecided = {one.name: one.undecided for one in verdicts if one.undecided}
    click.echo(f"{counted(held, 'invariant')} held, {broken} broken, {len(undecided)} undecided")
    for line in undecided_lines(undecided):
        click.echo(line)


def undecided_lines(undecided: Mapping[str, str]) -> list[str]:
    """A line for each reason why invariants are undecided, and their names; reasons are given by name."""
    return [
        f"undecided, as {reason}: {', '.join(name for name, why in undecided.items() if why == reason)}"
        for reason in dict.fromkeys(undecided.values())
    ]


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--junit", type=FileToWrite(), help="Write the verdicts as a JUnit file.")
@json_option
def check(file: Path, junit: Path | None, as_json: bool) -> int:
    """Check a recording against the invariants of VMBus.

    Of a recording of `races run` it also says what the run saw in the machine's memory. Exit status 1 if one is broken.

    \b
    Example:
      vmbus-emu record -o boot.rec --duration 1
      vmbus-emu check boot.rec
      vmbus-emu check boot.rec --json | jq '.violations[].text'
    """
    check_apart({"--junit": junit}, file)
    verdicts, recording = check_recording(file)
    note = run_of(recording)
    told = told_of(verdicts, note)
    if junit is not None:
        write_text(junit, junit_of(verdicts, file, told, recording.damage), "--junit")
    is_finding = bool(recording.damage or told) or any(one.count for one in verdicts)
    folder = keep(verdicts, recording, told) if is_finding else None
    if as_json:
        kept = {"damage": recording.damage, "finding": None if folder is None else str(folder)}
        print_json("check", 1, {**report_of(verdicts, file, told), **kept})
    else:
        show(verdicts)
        if told and note is not None:
            click.echo(f"the run of {note.name}, fix {'on' if note.fix else 'off'}, found in the machine itself:")
            for name, text in told:
                click.echo(f"  {name}: {text}")
    if recording.damage:
        say(f"vmbus-emu: {recording.damage}")
    return ExitStatus.FINDING if is_finding else ExitStatus.FINE
