"""A sequence diagram as SVG: lifelines downwards, an arrow for what goes from one to another, words beside them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Final

from tools import svg
from tools.race_rows import Diagram, Kind, Row

_LEFT: Final = 70
_COLUMN: Final = 96
_WORDS: Final = 560
_WORD_LETTERS: Final = 84
_TOP: Final = 64
_ROW: Final = 22
_LINE: Final = 15
_INK: Final = "#24292f"
_GREY: Final = "#8c959f"
_COLORS: Final = {Kind.SENDS: "#1f6feb", Kind.IN_VAIN: "#cf222e", Kind.HELD: "#d29922", Kind.GOES_ON: "#2da44e"}


def picture_of(diagram: Diagram, title: str, outcome: Sequence[str]) -> str:
    """The whole file: the rows with their times, and below them what came of the run."""
    end = [line for text in outcome for line in textwrap.wrap(text, 130)]
    width = _LEFT + _COLUMN * len(diagram.lifelines) + _WORDS
    heights = [_height(row) for row in diagram.rows]
    bottom = _TOP + sum(heights)
    height = bottom + 30 + _LINE * len(end)
    parts = [*_lifelines(diagram, heights, bottom)]
    y = float(_TOP)
    for row, high in zip(diagram.rows, heights, strict=True):
        parts += _row(diagram, row, y + _ROW / 2, width)
        y += high
    parts += [_colored(16, bottom + 30 + _LINE * n, line, "#cf222e", bold=True) for n, line in enumerate(end)]
    return svg.document(width, height, 16, title, parts)


def _words_of(row: Row) -> list[str]:
    return textwrap.wrap(row.words, _WORD_LETTERS) or [""]


def _height(row: Row) -> int:
    return _ROW + _LINE * (len(_words_of(row)) - 1)


def _x(diagram: Diagram, name: str) -> float:
    return _LEFT + _COLUMN * (diagram.lifelines.index(name) + 0.5)


def _lifelines(diagram: Diagram, heights: Sequence[int], bottom: float) -> Iterator[str]:
    """Each lifeline with its name; thick and yellow while its actor is held."""
    for name in diagram.lifelines:
        x = _x(diagram, name)
        yield f'<rect x="{x - 40:.1f}" y="34" width="80" height="20" rx="4" fill="#eaeef2"/>'
        yield svg.text(x, 48, name, anchor="middle")
        yield svg.line(x, 54, x, bottom, f'stroke="{_GREY}"')
        begin, y = 0.0, float(_TOP)
        for row, high in zip(diagram.rows, heights, strict=True):
            if row.actor == name and row.kind is Kind.HELD:
                begin = y + _ROW / 2
            elif row.actor == name and row.kind is Kind.GOES_ON and begin:
                yield _held(x, begin, y + _ROW / 2)
                begin = 0.0
            y += high
        if begin:
            yield _held(x, begin, bottom)


def _held(x: float, begin: float, end: float) -> str:
    color = _COLORS[Kind.HELD]
    return f'<rect x="{x - 4:.1f}" y="{begin:.1f}" width="8" height="{end - begin:.1f}" fill="{color}" opacity="0.45"/>'


def _row(diagram: Diagram, row: Row, y: float, width: float) -> Iterator[str]:
    words_x = _LEFT + _COLUMN * len(diagram.lifelines) + 12
    color = _COLORS.get(row.kind, _INK)
    if row.kind is Kind.STEP:
        place = f'x="8" y="{y - _ROW / 2 + 2:.1f}" width="{width - 16:.1f}" height="{_ROW - 4}"'
        yield f'<rect {place} fill="#ddf4ff" opacity="0.6"/>'
    yield svg.text(_LEFT - 14, y + 4, f"{(row.at_ns - diagram.began_ns) / 1e6:.2f}", anchor="end", size=11)
    for number, line in enumerate(_words_of(row)):
        yield _colored(words_x, y + 4 + _LINE * number, line, _INK, bold=row.kind is Kind.STEP)
    if row.actor not in diagram.lifelines:
        return
    start = _x(diagram, row.actor)
    if row.kind in (Kind.SENDS, Kind.IN_VAIN) and row.to in diagram.lifelines and row.to != row.actor:
        yield from _arrow(start, _x(diagram, row.to), y, color, lost=row.kind is Kind.IN_VAIN)
    radius = 5 if row.kind in (Kind.HELD, Kind.GOES_ON) else 3.5
    yield f'<circle cx="{start:.1f}" cy="{y:.1f}" r="{radius}" fill="{color}"/>'


def _arrow(start: float, end: float, y: float, color: str, *, lost: bool) -> Iterator[str]:
    """To the other lifeline; one that is lost ends short of it, in a cross."""
    way = 1 if end > start else -1
    tip = end - way * (18 if lost else 1)
    dashes = ' stroke-dasharray="5 3"' if lost else ""
    yield svg.line(start, y, tip, y, f'stroke="{color}" stroke-width="1.5"{dashes}')
    if lost:
        style = f'stroke="{color}" stroke-width="2"'
        yield svg.line(tip - 5, y - 5, tip + 5, y + 5, style)
        yield svg.line(tip - 5, y + 5, tip + 5, y - 5, style)
    else:
        corners = svg.points([(tip, y), (tip - way * 9, y - 4.5), (tip - way * 9, y + 4.5)])
        yield f'<polygon points="{corners}" fill="{color}"/>'


def _colored(x: float, y: float, words: str, color: str, *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<g fill="{color}"{weight}>{svg.text(x, y, words)}</g>'
