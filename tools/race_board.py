"""A combination board: two exhibits whose cures are halves of one, each schedule under all four settings of the two.

A board says beforehand under which settings each schedule breaks what its exhibit names. `play` runs them all on one
machine, which is reset to another setting between two runs; the tables and the sentence below them say what was seen.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from emu.errors import UserError
from emu.switches import Fix
from tools.nameless_file import nameless_file
from tools.race_run import HELD, INCONCLUSIVE, VIOLATED, RaceMachine, RaceRun
from tools.race_sentences import name_of, number_of
from tools.schedule import Schedule

Setting = tuple[bool, bool]
"""Whether the first exhibit's fix is on, and the second's."""

SETTINGS: Final[tuple[Setting, ...]] = ((True, True), (True, False), (False, True), (False, False))
_BOTH_ON: Final = SETTINGS[0]


@dataclass(frozen=True, slots=True)
class Board:
    """Two exhibits, by their ids, and the settings under which the schedule of each breaks its invariant."""

    title: str
    story: str
    numbers: tuple[str, str]
    breaks: tuple[frozenset[Setting], frozenset[Setting]]

    @property
    def name(self) -> str:
        """As the catalogue of races writes it."""
        return "x".join(self.numbers)


BOARDS: Final[tuple[Board, ...]] = (
    Board(
        "The look of the one and the wake of the other",
        """
A probe asks the host and waits; the handler of a rescind tells it that nobody will answer. A4's cure is the probe's:
join the list, then look at the flag. A5's cure is the handler's: raise the flag and wake who is on the list, and only
then wait for the probe. Each of them has been in a kernel without the other. A probe that looks is no better off
while the handler waits for it and has not raised the flag yet; and a handler that wakes first has woken nobody who
joins the list a moment later and does not look.

The rule: the two are halves of one cure. Each side writes its own word before it reads the other's; then one of them,
at least, sees the other.
""",
        ("A4", "A5"),
        (frozenset(SETTINGS[1:]), frozenset({(True, False), (False, False)})),
    ),
    Board(
        "A slot, a bit, and two who must look last",
        """
Guest and host share a slot for one message and, in it, a bit that says "more waiting". The guest empties the slot and
then reads the bit; the host sets the bit and then looks at the slot once more. If the guest reads too early, or if
the host does not look again, there is a moment in which the guest owes no EOM and the host waits for one. It takes
only one of the two to lose a message, and the right one cannot make up for it, since each half has a schedule of its
own.

The rule: a handshake has two halves, and a cure of one half is no cure. Write first, look afterwards, on both sides.
""",
        ("B1", "B2"),
        (frozenset({(False, True), (False, False)}), frozenset({(True, False), (False, False)})),
    ),
)


def find_board(name: str) -> Board:
    """A board by its name, in any case; UserError."""
    wanted = name.replace("×", "x").replace(" ", "").casefold()
    found = next((board for board in BOARDS if board.name.casefold() == wanted), None)
    if found is None:
        raise UserError(f"no board is called {name}; there are {', '.join(board.name for board in BOARDS)}")
    return found


@dataclass(slots=True)
class Cell:
    """One schedule under one setting: what the board says of it, and the runs so far."""

    schedule: Schedule
    setting: Setting
    told_broken: bool
    runs: list[RaceRun] = field(default_factory=list)

    @property
    def as_told(self) -> bool:
        """Whether every run so far came out as the board says."""
        return all(map(self._is_as_told, self.runs))

    @property
    def broken(self) -> bool:
        """Whether any run broke anything."""
        return any(run.verdict == VIOLATED for run in self.runs)

    @property
    def inconclusive(self) -> bool:
        """Whether any run did not come to its end."""
        return any(run.verdict == INCONCLUSIVE for run in self.runs)

    def _is_as_told(self, run: RaceRun) -> bool:
        if not self.told_broken:
            return run.verdict == HELD
        return run.verdict == VIOLATED and run.invariant in self.schedule.invariants

    @property
    def text(self) -> str:
        """What was seen, in plain words."""
        if not self.runs:
            return "not run"
        said = self._seen()
        return said if self.as_told or self.inconclusive else f"{said}: NOT as told"

    def _seen(self) -> str:
        broke = [run for run in self.runs if run.verdict == VIOLATED]
        if self.inconclusive:
            return "inconclusive"
        if not broke:
            return "nothing is broken"
        found = {one.invariant for run in broke for one in run.broken}
        names = [name for name in self.schedule.invariants if name in found] or sorted(found)
        said = f"broken: {' and '.join(names)}"
        return said if len(broke) == len(self.runs) else f"{said}, in {len(broke)} of {len(self.runs)} runs"


@dataclass(frozen=True, slots=True)
class Game:
    """A board, its schedules, and a cell for each of these under each setting, in the order of the tables."""

    board: Board
    schedules: tuple[Schedule, Schedule]
    cells: tuple[Cell, ...]

    @classmethod
    def of(cls, board: Board, find: Callable[[str], Schedule]) -> Game:
        """Nothing was run yet. `find` gives an exhibit by its id."""
        first, second = (find(number) for number in board.numbers)
        told = zip((first, second), board.breaks, strict=True)
        cells = [Cell(one, setting, setting in breaks) for one, breaks in told for setting in SETTINGS]
        return cls(board, (first, second), tuple(cells))

    def play(self, times: int = 1, seed: int = 0) -> Iterator[Cell]:
        """Run every cell so often, on one machine; each time that one has been run, it is given."""
        with nameless_file() as path, RaceMachine(self.schedules[0], fix=True, seed=seed) as machine:
            for cell in self.cells:
                for _ in range(times):
                    machine.take(self.under(cell), fix=cell.setting == _BOTH_ON)
                    cell.runs.append(machine.run(path))
                    yield cell

    def under(self, cell: Cell) -> Schedule:
        """A cell's schedule, of the machine that has this setting."""
        off = [one.scenario.fix.off() for one, on in zip(self.schedules, cell.setting, strict=True) if not on]
        fix = Fix.of({"switches": {name: False for names in off for name in names}})
        return replace(cell.schedule, scenario=replace(cell.schedule.scenario, fix=fix))

    def table(self, schedule: Schedule) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Headings and rows: the first exhibit's fix downwards, the second's to the right."""
        first, second = self.board.numbers
        cells = {cell.setting: cell.text for cell in self.cells if cell.schedule is schedule}
        rows = [
            (f"{first}'s fix {_on(down)}", *(cells[down, right] for right in (True, False))) for down in (True, False)
        ]
        return ("", f"{second}'s fix on", f"{second}'s fix off"), rows

    def heading(self, schedule: Schedule) -> str:
        """What stands above a schedule's table."""
        return f"The schedule of {number_of(schedule)} ({name_of(schedule)}): {schedule.title}"

    def summary(self) -> str:
        """Which settings survive both schedules."""
        if not all(cell.runs for cell in self.cells):
            return "Not every setting was run."
        fragile = {cell.setting for cell in self.cells if cell.broken or cell.inconclusive}
        safe = [setting for setting in SETTINGS if setting not in fragile]
        which = "; ".join(self.setting_text(setting) for setting in safe)
        count = ("None", "One", "Two", "Three", "All four")[len(safe)]
        verb = "survives" if len(safe) == 1 else "survive"
        return f"{count} of the four settings {verb} both schedules{f': {which}' if which else ''}."

    def setting_text(self, setting: Setting) -> str:
        """A setting in words."""
        if setting[0] == setting[1]:
            return f"both fixes {_on(setting[0])}"
        return " and ".join(f"{one}'s fix {_on(on)}" for one, on in zip(self.board.numbers, setting, strict=True))

    def report(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        names = [one.scenario.fix.off() for one in self.schedules]
        return {
            "board": self.board.name,
            "title": self.board.title,
            "story": paragraphs_of(self.board),
            "switches": [name for one in names for name in one],
            "cells": [
                {
                    "schedule": cell.schedule.name,
                    "fixes": {number: _on(on) for number, on in zip(self.board.numbers, cell.setting, strict=True)},
                    "told": "broken" if cell.told_broken else "held",
                    "as_told": cell.as_told if cell.runs else None,
                    "runs": [run_report(run) for run in cell.runs],
                }
                for cell in self.cells
            ],
            "summary": self.summary(),
        }


def run_report(run: RaceRun) -> dict[str, Any]:
    """A run of a cell, as `--json` has it; its recording is not kept, and `expected` is the cell's to say."""
    report = run.report()
    return {key: report[key] for key in ("verdict", "invariant", "violations", "reason", "seconds")}


def paragraphs_of(board: Board) -> list[str]:
    """The story, a line a paragraph."""
    return [" ".join(part.split()) for part in board.story.split("\n\n") if part.strip()]


def _on(value: bool) -> str:
    return "on" if value else "off"


# -- its page in the museum --------------------------------------------------------------------------------


def head_of_board(board: Board, schedules: Sequence[Schedule], width: int) -> list[str]:
    """The part that depends on nothing but the board and the exhibits' files."""
    lines = [f"## {board.name}", "", f"**{board.title}**", ""]
    for paragraph in paragraphs_of(board):
        lines += [*_wrapped(paragraph, width), ""]
    for one in schedules:
        switches = ", ".join(f"`{name}`" for name in one.scenario.fix.off())
        link = f"[{number_of(one)} {name_of(one)}](#{number_of(one).lower()}-{name_of(one)})"
        lines.append(f"- {number_of(one)}'s fix is {switches}; its schedule is that of {link}.")
    return lines


def run_of_board(game: Game) -> list[str]:
    """The part that is of the runs: a table for each schedule, and which settings survive both."""
    wrong = [f"{cell.schedule.name}, {game.setting_text(cell.setting)}" for cell in game.cells if not cell.as_told]
    assert not wrong, f"{game.board.name} is not as told: {'; '.join(wrong)}"
    lines: list[str] = []
    for schedule in game.schedules:
        columns, rows = game.table(schedule)
        lines += [f"The schedule of {number_of(schedule)}:", "", f"| {' | '.join(columns)} |", "|---|---|---|"]
        lines += [*(f"| {' | '.join(row)} |" for row in rows), ""]
    return [*lines, game.summary()]


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
