"""The museum: a page of all exhibits, made of their files and of a run of each with its fix off and one with it on; and
of the boards, on which two exhibits are played together.

`head_of`, `head_of_board` and `index_of` say what depends on the files alone; the diagrams are told in an order that
depends on causes, not on times, so that the same schedules make the same page.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from tools.race_board import BOARDS, Game, head_of_board, run_of_board
from tools.race_sentences import (
    expected_of,
    finding_text,
    name_of,
    number_of,
    paragraphs,
    sentence_of,
    switches_of,
)
from tools.race_show import Shown, run_and_show
from tools.race_text import draw
from tools.schedule import Schedule

WIDTH: Final = 118
TITLE: Final = "# Races on demand: the museum"
OPENING: Final = f"""{TITLE}

Each of these races has cost somebody weeks. Here each one happens whenever you like: `vmbus-emu races run A1 --fix off`
breaks what its page says, every time; with `--fix on` the same steps break nothing, every time. `vmbus-emu races show
A1` tells a page of this museum about a run of its own, with times.

In the diagrams a column is the life of an actor, from top to bottom: the host, processors, workers (by the name of
their queue), threads of the guest's user space. `▸` is a step of the schedule, `■` an actor that is held at a sync
point until `□` (its line is dotted meanwhile), an arrow a message, work or a signal from one to another, `✗` one that
never arrives. Waits are steps, too; they are left out.

Behind the exhibits come the boards: two exhibits that are halves of one matter, each run under all four settings of
the two fixes (`vmbus-emu races board A4xA5`).

This page is made by `vmbus-emu races museum -o docs/races.md`, of the schedules in `tools/exhibits/` and a run of
each. [schedules.md](schedules.md) says how to write one of your own."""


def page(schedules: Iterable[Schedule], told: Callable[[str], object] = lambda _line: None) -> str:
    """The whole page; runs every exhibit twice, and plays every board. `told` is given a line about each."""
    exhibits = list(schedules)
    parts = [OPENING, "\n".join(index_of(exhibits))]
    for schedule in exhibits:
        off = run_and_show(schedule, fix=False, told=True)
        on = run_and_show(schedule, fix=True, told=True)
        told(f"{schedule.name}: run and drawn")
        parts += ["\n".join(head_of(schedule)), "\n".join(run_of(off, on))]
    by_number = {number_of(one): one for one in exhibits}
    for board in BOARDS:
        game = Game.of(board, by_number.__getitem__)
        for _cell in game.play():
            pass
        told(f"{board.name}: played")
        parts += ["\n".join(head_of_board(board, game.schedules, WIDTH)), "\n".join(run_of_board(game))]
    return "\n\n".join(parts) + "\n"


def index_of(schedules: Sequence[Schedule]) -> list[str]:
    """The tables of all exhibits and of the boards: they depend on the files alone."""
    rows = ["| | exhibit | switch | breaks |", "|---|---|---|---|"]
    for one in schedules:
        switches = ", ".join(f"`{name}`" for name, _wrong in switches_of(one))
        broken = ", ".join(name for name, _title in expected_of(one))
        rows.append(f"| {number_of(one)} | [{name_of(one)}](#{_anchor(one)}) | {switches} | {broken} |")
    boards = [f"| [{one.name}](#{one.name.lower()}) | {one.title} |" for one in BOARDS]
    return [*rows, "", "| board | what it is about |", "|---|---|", *boards]


def head_of(schedule: Schedule) -> list[str]:
    """The part of an exhibit that depends on its file alone: title, story, switches, invariants, steps."""
    lines = [f"## {number_of(schedule)} {name_of(schedule)}", "", f"**{schedule.title}**", ""]
    for paragraph in paragraphs(schedule):
        lines += [*_wrapped(paragraph), ""]
    for name, wrong in switches_of(schedule):
        lines += _wrapped(f"- Off: `{name}`: {wrong}.", 2)
    for name, title in expected_of(schedule):
        lines += _wrapped(f"- Breaks: {name}: {title}.", 2)
    lines += ["", f"The steps (`tools/exhibits/{schedule.path.name}`):", ""]
    for one in schedule.steps:
        lines += _wrapped(f"{one.number}. {sentence_of(one)}", len(f"{one.number}. "))
    return lines


def _wrapped(text: str, indent: int = 0) -> list[str]:
    """Lines of the page; `indent` is how far those behind the first are moved in, as a list wants it."""
    return textwrap.wrap(text, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def run_of(off: Shown, on: Shown) -> list[str]:
    """The part that is of a run: the diagram with the fix off, what was found, and one line on the fix."""
    assert off.findings and not off.note.reason, f"{off.schedule.name}, fix off: {off.outcome}"
    assert not on.note.broken and not on.note.reason, f"{on.schedule.name}, fix on: {on.outcome}"
    diagram = ["```text", *draw(off.diagram, WIDTH, times=False), "```"]
    found = [line for one in off.findings for line in _wrapped(f"- {finding_text(one)}.", 2)]
    return [*diagram, "", *found, "", "With the fix on the same steps break nothing, and the machine comes to rest."]


def _anchor(schedule: Schedule) -> str:
    return f"{number_of(schedule)} {name_of(schedule)}".lower().replace(" ", "-")
