"""`vmbus-emu races show`: an exhibit in plain words, and its schedule as a sequence diagram of a run.

The run is made for it, or taken from a recording of `races run`, which says of itself what is to be told.
"""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import click

from emu.errors import UserError
from emu.recording import Recording
from tools.director import Broken
from tools.nameless_file import nameless_file
from tools.output import colored, print_json
from tools.race_rows import Diagram, Kind, diagram_of
from tools.race_run import RaceMachine, RunNote
from tools.race_sentences import (
    expected_of,
    finding_text,
    findings_of,
    name_of,
    number_of,
    paragraphs,
    sentence_of,
    switches_of,
)
from tools.race_text import LEAST_WIDTH, draw
from tools.schedule import Schedule

PIPED_WIDTH: Final = 110
"""Where nobody says how wide it is."""
_MOST_WIDTH: Final = 140
_COLORS: Final = {Kind.STEP: "cyan", Kind.HELD: "yellow", Kind.GOES_ON: "yellow", Kind.IN_VAIN: "red"}


@dataclass(frozen=True, slots=True)
class Shown:
    """An exhibit and a run of it, ready to be told."""

    schedule: Schedule
    note: RunNote
    diagram: Diagram

    @property
    def findings(self) -> list[Broken]:
        """What the run found, as far as it is what the exhibit is about."""
        found = findings_of(self.schedule, self.note.broken)
        return [replace(one, text=_renamed(one.text, self.diagram.renamed)) for one in found]

    @property
    def outcome(self) -> list[str]:
        """The end of the diagram: the findings, that there are none, or why nothing can be said."""
        if self.note.reason:
            return [f"inconclusive: {self.note.reason}"]
        fix = "on" if self.note.fix else "off"
        return [finding_text(one) for one in self.findings] or [f"nothing is broken (fix {fix})"]


def _renamed(text: str, names: Mapping[str, str]) -> str:
    """All at once, as two may have changed their names."""
    if not names:
        return text
    return re.sub("|".join(map(re.escape, names)), lambda found: names[found[0]], text)


def run_and_show(schedule: Schedule, *, fix: bool, told: bool = False) -> Shown:
    """Run it once on a machine of its own; the recording goes."""
    with nameless_file() as path, RaceMachine(schedule, fix=fix) as machine:
        machine.run(path)
        return of_recording(path, schedule, told=told)


def of_recording(path: Path, schedule: Schedule | None = None, *, told: bool = False) -> Shown:
    """From what `races run` recorded; UserError if that is no schedule's run, or another schedule's."""
    with Recording(path) as recording:
        note = RunNote.of(recording.notes)
        if note is None or not note.began_ns:
            what = "no run of a schedule" if note is None else "a run that came to no step"
            raise UserError(f"{path} holds {what}; `vmbus-emu races run NAME --record FILE` makes one")
        if schedule is not None and schedule.name != note.name:
            raise UserError(f"{path} holds a run of {note.name}, not of {schedule.name}; leave the name out")
        recorded = Schedule.of_document(note.schedule, Path(f"{note.name}.toml"))
        return Shown(recorded, note, diagram_of(recording, note, recorded, told=told))


# -- as text, as an object -------------------------------------------------------------------------------


def screen_width() -> int:
    """How wide a diagram may be here."""
    if not sys.stdout.isatty():
        return PIPED_WIDTH
    return max(LEAST_WIDTH, min(shutil.get_terminal_size().columns, _MOST_WIDTH))


def lines_of(shown: Shown, width: int, *, ascii_only: bool) -> Iterator[str]:
    """Everything, for a terminal."""
    schedule = shown.schedule
    yield click.style(f"{number_of(schedule)} {name_of(schedule)}: {schedule.title}", bold=True)
    for paragraph in paragraphs(schedule):
        yield ""
        yield from textwrap.wrap(paragraph, min(width, 100))
    yield ""
    for name, wrong in switches_of(schedule):
        yield from _hanging(f"fix off  {name}: {wrong}", width)
    for name, title in expected_of(schedule):
        yield from _hanging(f"breaks   {name}: {title}", width)
    yield ""
    for step in schedule.steps:
        yield from _hanging(f"{step.number:>3}. {sentence_of(step)}", width, 5)
    yield ""
    yield click.style(f"The run, fix {'on' if shown.note.fix else 'off'}", bold=True)
    yield from draw(shown.diagram, width, ascii_only=ascii_only, paint=_paint)
    yield ""
    for line in shown.outcome:
        for part in _hanging(line, width, 2):
            yield click.style(part, fg="red" if shown.note.broken else None, bold=True)


def _hanging(text: str, width: int, indent: int = 9) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent=" " * indent)


def _paint(kind: Kind, words: str) -> str:
    color = _COLORS.get(kind)
    return click.style(words, fg=color) if color else words


def report_of(shown: Shown) -> dict[str, Any]:
    """The object that `--json` prints."""
    schedule, diagram = shown.schedule, shown.diagram
    return {
        "id": number_of(schedule),
        "name": schedule.name,
        "title": schedule.title,
        "story": paragraphs(schedule),
        "switches": [{"name": name, "wrong": wrong} for name, wrong in switches_of(schedule)],
        "invariants": [{"name": name, "title": title} for name, title in expected_of(schedule)],
        "steps": [{"number": one.number, "step": one.text, "text": sentence_of(one)} for one in schedule.steps],
        "fix": "on" if shown.note.fix else "off",
        "lifelines": list(diagram.lifelines),
        "rows": [
            {
                "t_ns": row.at_ns - diagram.began_ns,
                "kind": row.kind.value,
                "actor": row.actor,
                "to": row.to,
                "count": row.count,
                "text": row.text,
            }
            for row in diagram.rows
        ],
        "findings": [{"invariant": one.invariant, "text": one.text} for one in shown.findings],
        "reason": shown.note.reason,
    }


def can_encode(encoding: str | None) -> bool:
    """Whether a terminal with this encoding has box drawing."""
    try:
        "│▶✗●".encode(encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return False
    return True


def print_shown(shown: Shown, *, as_json: bool) -> None:
    """Print it."""
    if as_json:
        print_json("races-show", 1, report_of(shown))
        return
    ascii_only = not can_encode(sys.stdout.encoding)
    for line in lines_of(shown, screen_width(), ascii_only=ascii_only):
        text = line.encode("ascii", "replace").decode() if ascii_only else line
        click.echo(text, color=colored(sys.stdout))
