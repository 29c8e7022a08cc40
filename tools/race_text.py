"""A sequence diagram as text: lifelines as columns of characters, a line for each row, its words at the right.

Box drawing characters, or ASCII where the terminal has no others. A lifeline whose actor is held at a point is dotted.
Colour is the caller's: `paint` is given a row's kind and its words.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from tools.race_rows import Diagram, Kind, Row

Paint = Callable[[Kind, str], str]
"""Words of a row of some kind, coloured."""

LEAST_WIDTH: Final = 72
_TIME: Final = 11
_LEAST_WORDS: Final = 28


@dataclass(frozen=True, slots=True)
class Signs:
    """The characters of a diagram."""

    life: str
    held: str
    line: str
    cross: str
    right: str
    left: str
    lost: str
    does: str
    stands: str
    goes: str
    step: str


BOXES: Final = Signs("│", "┊", "─", "┼", "▶", "◀", "✗", "●", "■", "□", "▸")
ASCII: Final = Signs("|", ":", "-", "+", ">", "<", "x", "*", "#", "o", ">")


def plain(_kind: Kind, words: str) -> str:
    """No colour."""
    return words


def draw(
    diagram: Diagram, width: int, *, times: bool = True, ascii_only: bool = False, paint: Paint = plain
) -> Iterator[str]:
    """The lines of a diagram, none wider than `width` (at least `LEAST_WIDTH`), without spaces at their ends."""
    signs = ASCII if ascii_only else BOXES
    frame = _Frame(diagram, max(width, LEAST_WIDTH), times)
    for line in frame.heads():
        yield line.rstrip()
    held: set[str] = set()
    for row in diagram.rows:
        if row.kind is Kind.GOES_ON:
            held.discard(row.actor)
        before = frame.cells(signs, held)
        if row.kind is Kind.HELD:
            held.add(row.actor)
        behind = frame.cells(signs, held)
        words = f"{signs.step} {row.text}" if row.kind is Kind.STEP else row.words
        if ascii_only:
            words = words.encode("ascii", "replace").decode()
        lines = textwrap.wrap(words, frame.words_width, subsequent_indent="  ") or [""]
        drawn = frame.marked(before, row, signs)
        for number, text in enumerate(lines):
            at = frame.time(row) if number == 0 else frame.no_time
            cells = drawn if number == 0 else behind
            yield f"{at}{cells}{paint(row.kind, text)}".rstrip()


class _Frame:
    """Where everything is: the time, a column for each lifeline, then the words."""

    def __init__(self, diagram: Diagram, width: int, times: bool) -> None:
        self._lifelines: Final = diagram.lifelines
        self._began_ns: Final = diagram.began_ns
        self._times: Final = times
        self.no_time: Final = " " * _TIME if times else ""
        longest = max((len(name) for name in diagram.lifelines), default=0)
        room = (width - len(self.no_time) - _LEAST_WORDS) // max(len(diagram.lifelines), 1)
        self._column: Final = max(5, min(longest + 2, room))
        self.words_width: Final = max(width - len(self.no_time) - self._column * len(diagram.lifelines) - 1, 16)

    def heads(self) -> list[str]:
        """The names of the lifelines, each over its own."""
        names = [name[: self._column - 1].center(self._column) for name in self._lifelines]
        head = f"{'ms':>{_TIME - 3}}   " if self._times else ""
        return [head + "".join(names)]

    def time(self, row: Row) -> str:
        """When a row was over, in ms since the first step."""
        return f"{(row.at_ns - self._began_ns) / 1e6:>{_TIME - 3}.2f}   " if self._times else ""

    def cells(self, signs: Signs, held: set[str]) -> str:
        """The lifelines as they run on."""
        life = [(signs.held if name in held else signs.life) for name in self._lifelines]
        return "".join(self._cell(sign) for sign in life) + " "

    def marked(self, cells: str, row: Row, signs: Signs) -> str:
        """The lifelines with a row on them."""
        line = list(cells)
        if row.kind in (Kind.SENDS, Kind.IN_VAIN) and row.actor != row.to and row.to in self._lifelines:
            self._arrow(line, row, signs)
        elif row.actor in self._lifelines:
            sign = {Kind.HELD: signs.stands, Kind.GOES_ON: signs.goes}.get(row.kind, signs.does)
            line[self._at(row.actor)] = sign
        return "".join(line)

    def _arrow(self, line: list[str], row: Row, signs: Signs) -> None:
        start, end = self._at(row.actor), self._at(row.to)
        step = 1 if end > start else -1
        crossed = {self._at(name) for name in self._lifelines} - {start, end}
        line[start] = signs.does
        for at in range(start + step, end, step):
            line[at] = signs.cross if at in crossed else signs.line
        if row.kind is Kind.IN_VAIN:
            line[end - step * 2] = signs.lost
            line[end - step] = " "
        else:
            line[end - step] = signs.right if step > 0 else signs.left

    def _at(self, name: str) -> int:
        return self._lifelines.index(name) * self._column + self._column // 2

    def _cell(self, sign: str) -> str:
        cell = [" "] * self._column
        cell[self._column // 2] = sign
        return "".join(cell)
