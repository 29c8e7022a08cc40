"""The frame of our pictures: one SVG with a white ground, a title, and whatever is drawn into it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final
from xml.sax.saxutils import escape

COLORS: Final = ("#1f6feb", "#2da44e", "#d29922", "#cf222e", "#8250df", "#0a7ea4", "#bf3989", "#57606a", "#9a6700")

_MOST_INTERVALS: Final = 5
"""Into how many parts a grid divides an axis."""


def document(width: int, height: int, left: int, title: str, parts: Iterable[str]) -> str:
    """The whole file; `left` is where the title begins."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
    lines = [
        f'{head} font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        text(left, 20, title, size=14),
        *parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 12) -> str:
    """Words at a place."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, style: str = 'stroke="#ddd"') -> str:
    """A straight line; by default of a grid."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'


def ticks(span: float) -> list[tuple[float, str]]:
    """Round values from 0 to `span` (more than 0) for the grid of an axis, three to six, with what to write there."""
    exponent = math.floor(math.log10(span / _MOST_INTERVALS))
    steps = ((e, unit) for e in (exponent, exponent + 1) for unit in (1, 2, 5))
    exponent, unit = next((e, unit) for e, unit in steps if span <= _MOST_INTERVALS * unit * 10.0**e)
    step, digits = unit * 10.0**exponent, max(0, -exponent)
    return [(number * step, f"{number * step:.{digits}f}") for number in range(math.floor(span / step + 1e-9) + 1)]


def points(places: Sequence[tuple[float, float]]) -> str:
    """Places as polylines and polygons want them."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
