"""The frame of our pictures: one SVG with a white ground, a title, and whatever is drawn into it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final
from xml.sax.saxutils import escape

COLORS: Final = ("#1f6feb", "#2da44e", "#d29922", "#cf222e", "#8250df", "#0a7ea4", "#bf3989", "#57606a", "#9a6700")


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


def points(places: Sequence[tuple[float, float]]) -> str:
    """Places as polylines and polygons want them."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
