"""The stacked picture of a profile: processor time over time, a band for each process."""

from __future__ import annotations

from typing import Final

from tools import svg
from tools.nouns import counted
from tools.profile_samples import ProcessCost, Profile

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 800, 360, 60, 620, 36, 40
_STEPS: Final = 120
MOST_BANDS: Final = 18
"""What costs less than these is summed up in one band."""


def svg_of(found: Profile) -> str:
    """The picture as SVG."""
    bands = _bands(found)
    most = max((sum(values) for values in zip(*(band for _, band in bands), strict=True)), default=0.1)
    top = max(0.1, most * 1.1)
    parts = _grid(found.seconds, top)
    below = [0.0] * _STEPS
    for number, (name, band) in enumerate(bands):
        above = [low + share for low, share in zip(below, band, strict=True)]
        edge = [(_x(step), _y(value, top)) for step, value in enumerate(above)]
        edge += [(_x(step), _y(below[step], top)) for step in reversed(range(_STEPS))]
        # Where the colours begin again they are paler.
        fill = (
            f'fill="{svg.COLORS[number % len(svg.COLORS)]}" fill-opacity="{0.9 if number < len(svg.COLORS) else 0.5}"'
        )
        y = _TOP + 16 * number
        parts.append(f'<polygon points="{svg.points(edge)}" {fill}/>')
        parts.append(f'<rect x="{_RIGHT + 14}" y="{y}" width="10" height="10" {fill}/>')
        parts.append(svg.text(_RIGHT + 30, y + 9, name))
        below = above
    return svg.document(_WIDTH, _HEIGHT, _LEFT, "processor time by process (cores)", parts)


def _bands(found: Profile) -> list[tuple[str, list[float]]]:
    """Name and share of a core at each step, the most expensive process first (at the bottom)."""
    ordered = sorted(found.processes, key=lambda one: -one.cpu_ns)
    bands = [
        (f"{found.label(one)} {one.cpu_ns / 1e9:.2f} s", _resampled(one, found.seconds)) for one in ordered[:MOST_BANDS]
    ]
    rest = [_resampled(one, found.seconds) for one in ordered[MOST_BANDS:]]
    if rest:
        bands.append((counted(len(rest), "other"), [sum(values) for values in zip(*rest, strict=True)]))
    return bands


def _resampled(one: ProcessCost, seconds: float) -> list[float]:
    """The share at each of the picture's steps: of the sample that covers it; 0 before the first, behind the last."""
    shares = []
    samples = iter(one.timeline)
    current = next(samples, None)
    for step in range(_STEPS):
        at = (step + 0.5) * seconds / _STEPS
        while current is not None and current[1] < at:
            current = next(samples, None)
        shares.append(current[2] if current is not None and current[0] <= at else 0.0)
    return shares


def _grid(seconds: float, top: float) -> list[str]:
    parts = []
    for share, words in svg.ticks(top):
        parts.append(svg.line(_LEFT, _y(share, top), _RIGHT, _y(share, top)))
        parts.append(svg.text(_LEFT - 6, _y(share, top) + 4, words, anchor="end"))
    for at_s, words in svg.ticks(seconds):
        x = _LEFT + (_RIGHT - _LEFT) * at_s / seconds
        parts.append(svg.text(x, _HEIGHT - 18, f"{words} s", anchor="middle"))
    return parts


def _x(step: int) -> float:
    return _LEFT + (_RIGHT - _LEFT) * step / (_STEPS - 1)


def _y(value: float, top: float) -> float:
    return _HEIGHT - _BOTTOM - value / top * (_HEIGHT - _BOTTOM - _TOP)
