"""Latencies without losing the tail: an HdrHistogram a stage, and the formats in which other tools read them.

Values are nanoseconds from 1 to 60 s, three significant digits. `.hgrm` is the percentile text of HdrHistogram's
plotters, `.hlog` its interval log (v1.2), one tagged line a stage.
"""

from __future__ import annotations

import math
import time
from collections.abc import Container, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Final

from hdrh.histogram import HdrHistogram

from tools import svg
from tools.nouns import counted

MOST_NS: Final = 60_000_000_000
DIGITS: Final = 3
PERCENTILES: Final = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p999": 99.9}
US: Final = 1_000.0
MOST_BY_CHANCE: Final = 10
"""A percentile with fewer samples beyond it moves from run to run by more than any limit."""
MOST_PARTS: Final = 5
"""Parts of a run that are compared with each other, to see how much a percentile moves by itself."""


def histogram_of(samples: Iterable[int], tag: str = "") -> HdrHistogram:
    """A histogram of nanoseconds; what is beyond its ends counts as its ends."""
    histogram = HdrHistogram(1, MOST_NS, DIGITS)
    if tag:
        histogram.set_tag(tag)
    for sample in samples:
        histogram.record_value(min(max(sample, 1), MOST_NS))
    return histogram


def nearest_rank(count: int, percent: float) -> int:
    """Which of so many sorted samples, counted from 1, is the first that `percent` of them do not exceed."""
    # The decimal number that was meant: 99.9 as a float is a little more, and the rank then one too high.
    return max(1, math.ceil(count * Fraction(str(percent)) / 100))


def value_at(histogram: HdrHistogram, percent: float) -> int:
    """The value at a percentile, by the nearest rank.

    The library rounds the rank: of 87 samples it gives the 86th for p99, which more than 1 % of them exceed.
    """
    count = int(histogram.get_total_count())
    return int(histogram.get_value_at_percentile(100 * nearest_rank(count, percent) / count)) if count else 0


def figures_of(histogram: HdrHistogram) -> dict[str, int]:
    """count, p50_ns, p90_ns, p99_ns, p999_ns, max_ns."""
    figures = {"count": int(histogram.get_total_count())}
    for name, percentile in PERCENTILES.items():
        figures[f"{name}_ns"] = value_at(histogram, percentile)
    figures["max_ns"] = int(histogram.get_max_value())
    return figures


def beyond(count: int, name: str) -> int:
    """How many of so many samples lie beyond a percentile of `PERCENTILES`."""
    return count - nearest_rank(count, PERCENTILES[name]) if count else 0


def spread_of(samples: Sequence[int]) -> dict[str, float | None]:
    """Percentile name -> by which share its largest value in a part of the run is above its smallest one.

    `samples` are in the order in which they were taken. A part has `MOST_BY_CHANCE` samples beyond the percentile at
    least; None where there are not two such parts.
    """
    cut: dict[int, list[list[int]]] = {}
    spread: dict[str, float | None] = {}
    for name, percent in PERCENTILES.items():
        parts = min(MOST_PARTS, beyond(len(samples), name) // MOST_BY_CHANCE)
        if parts < 2:
            spread[name] = None
            continue
        size = len(samples) // parts
        if parts not in cut:
            cut[parts] = [sorted(samples[n * size : (n + 1) * size]) for n in range(parts)]
        values = [max(1, part[nearest_rank(size, percent) - 1]) for part in cut[parts]]
        spread[name] = round(max(values) / min(values) - 1, 4)
    return spread


def points_of(histogram: HdrHistogram) -> list[tuple[float, int]]:
    """(percentile, ns) along the curve, five points each time the distance to 100 % halves."""
    return [
        (float(one.percentile_level_iterated_to), int(one.value_iterated_to))
        for one in histogram.get_percentile_iterator(5)
    ]


def hgrm_text(histogram: HdrHistogram) -> str:
    """The percentile distribution in microseconds, with the footer that plotters expect.

    Written here: the library scales the mean by the unit, and the standard deviation not.
    """
    lines = [f"{'Value':>12} {'Percentile':>14} {'TotalCount':>10} {'1/(1-Percentile)':>14}", ""]
    for one in histogram.get_percentile_iterator(5):
        level = one.percentile_level_iterated_to / 100
        head = f"{one.value_iterated_to / US:12.3f} {level:2.12f} {one.total_count_to_this_value:10d}"
        lines.append(head if level >= 1 else f"{head} {1 / (1 - level):14.2f}")
    mean, deviation = histogram.get_mean_value() / US, histogram.get_stddev() / US
    lines.append(f"#[Mean    = {mean:12.3f}, StdDeviation   = {deviation:12.3f}]")
    lines.append(
        f"#[Max     = {histogram.get_max_value() / US:12.3f}, Total count    = {histogram.get_total_count():12d}]"
    )
    lines.append(f"#[Buckets = {histogram.bucket_count:12d}, SubBuckets     = {histogram.sub_bucket_count:12d}]")
    return "\n".join(lines) + "\n"


def hlog_text(histograms: Mapping[str, HdrHistogram], intervals: Mapping[str, tuple[float, float]]) -> str:
    """An interval log, a tagged line for each histogram; values are nanoseconds, Max is in ms.

    `intervals` are when each one's began (seconds since the epoch), and how many seconds it had.
    """
    began_s = min((intervals[tag][0] for tag in histograms), default=0.0)
    stamp = time.strftime("%a %b %d %H:%M:%S %Z %Y", time.gmtime(began_s))
    lines = [
        "#[Logged with vmbus-emu]",
        "#[Histogram log format version 1.2]",
        f"#[StartTime: {began_s:.3f} (seconds since epoch), {stamp}]",
        # Without it a reader guesses from the two times whether an interval's is absolute.
        f"#[BaseTime: {began_s:.3f} (seconds since epoch)]",
        '"StartTimestamp","Interval_Length","Interval_Max","Interval_Compressed_Histogram"',
    ]
    # In the order of time, as readers of logs expect.
    for tag in sorted(histograms, key=lambda tag: intervals[tag][0]):
        histogram, (from_s, seconds) = histograms[tag], intervals[tag]
        encoded = histogram.encode().decode()
        lines.append(f"Tag={tag},{from_s - began_s:.3f},{seconds:.3f},{histogram.get_max_value() / 1e6:.3f},{encoded}")
    return "\n".join(lines) + "\n"


# -- pictures -------------------------------------------------------------------------------------------------

_SHOWN: Final = (50.0, 90.0, 99.0, 99.9, 99.99, 100.0)
_LEAST_BAR, _MOST_BAR, _BESIDE_BAR = 8, 48, 26
"""Characters of the longest bar, and what its line needs besides: name, blanks, microseconds."""
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 380, 70, 580, 30, 40


def terminal_plot(histogram: HdrHistogram, columns: int = 80) -> list[str]:
    """The curve as bars: a line for each percentile, the length by the logarithm of its value.

    Lines are no longer than `columns` where that leaves the bars any room.
    """
    width = max(_LEAST_BAR, min(_MOST_BAR, columns - _BESIDE_BAR))
    values = [(level, value_at(histogram, level)) for level in _SHOWN]
    least, most = math.log(max(1, values[0][1]) / 2), math.log(max(2, values[-1][1]))
    lines = []
    for level, value in values:
        share = (math.log(max(1, value)) - least) / max(1e-9, most - least)
        name = "max" if level == 100.0 else f"p{level:g}"
        lines.append(f"{name:>7}  {'█' * max(1, round(share * width)):<{width}}  {value / US:,.1f} us")
    return lines


def svg_plot(histograms: Mapping[str, HdrHistogram], title: str) -> str:
    """The usual picture: percentiles to the right by the logarithm of their distance from 100 %, values upward.

    Only stages with samples; the axes end where the values and the number of samples do.
    """
    shown = {name: one for name, one in histograms.items() if one.get_total_count()}
    curves = {name: points_of(one) for name, one in shown.items()}
    values = [value for curve in curves.values() for _, value in curve] or [1, 10]
    axes = _Axes(min(values), max(values), max((one.get_total_count() for one in shown.values()), default=100))
    parts = axes.grid()
    for number, (name, curve) in enumerate(curves.items()):
        places = svg.points([(axes.x_of(level), axes.y_of(value)) for level, value in curve])
        # Where the colours begin again the lines are dashed.
        dashes = ' stroke-dasharray="5 3"' if number >= len(svg.COLORS) else ""
        stroke = f'stroke="{svg.COLORS[number % len(svg.COLORS)]}" stroke-width="2"{dashes}'
        y = 40 + 16 * number
        parts.append(f'<polyline points="{places}" fill="none" {stroke}/>')
        parts.append(svg.line(_RIGHT + 10, y - 4, _RIGHT + 28, y - 4, stroke))
        parts.append(svg.text(_RIGHT + 34, y, name))
    return svg.document(_WIDTH, _HEIGHT, _LEFT, title, parts)


class _Axes:
    """Where percentiles and nanoseconds are in the picture."""

    def __init__(self, least_ns: int, most_ns: int, count: int) -> None:
        self._least = math.floor(math.log10(max(1, least_ns)))
        self._most = max(self._least + 1, math.ceil(math.log10(max(1, most_ns))))
        # With n samples the curve is flat behind 1 - 1/n.
        self._nines = max(2.0, math.log10(count))

    def x_of(self, level: float) -> float:
        """Of a percentile."""
        distance = -math.log10(max(10.0**-self._nines, 1 - level / 100))
        return _LEFT + distance / self._nines * (_RIGHT - _LEFT)

    def y_of(self, value_ns: float) -> float:
        """Of a value."""
        height = _HEIGHT - _BOTTOM - _TOP
        return _HEIGHT - _BOTTOM - (math.log10(max(1.0, value_ns)) - self._least) / (self._most - self._least) * height

    def grid(self) -> list[str]:
        """Lines and labels: each nine, each power of ten."""
        parts = []
        for nines in range(int(self._nines) + 1):
            level = 100 * (1 - 10.0**-nines)
            x = self.x_of(level)
            parts.append(svg.line(x, _TOP, x, _HEIGHT - _BOTTOM))
            parts.append(svg.text(x, _HEIGHT - 20, f"{level:.{max(0, nines - 2)}f} %", anchor="middle"))
        for power in range(self._least, self._most + 1):
            y = self.y_of(10.0**power)
            parts.append(svg.line(_LEFT, y, _RIGHT, y))
            parts.append(svg.text(_LEFT - 6, y + 4, f"{10.0**power / US:g} us", anchor="end"))
        return parts


# -- comparing ------------------------------------------------------------------------------------------------


def regressions(
    old: Mapping[str, Any], new: Mapping[str, Any], limits: Mapping[str, float], unjudged: Container[str] = ()
) -> list[str]:
    """What got worse than its limit allows: `limits` is percentile name -> share (0.1: a tenth more).

    Nothing that is in `unjudged`, as `too_few` words it. Each says how far it can be believed.
    """
    found = []
    for stage, before in old.items():
        after = new.get(stage)
        if after is None:
            continue
        for name, share in limits.items():
            then, now = before[f"{name}_ns"], after[f"{name}_ns"]
            if now > then * (1 + share) and f"{stage} {name}" not in unjudged:
                found.append(
                    f"{stage} {name}: {then / US:.1f} us before, {now / US:.1f} us now "
                    f"(limit +{100 * share:g}%; {_believed(before, after, name)})"
                )
    return found


def _believed(before: Mapping[str, Any], after: Mapping[str, Any], name: str) -> str:
    """How many samples lie beyond a percentile that got worse, and whether a run by itself differs as much."""
    samples = beyond(int(min(before["count"], after["count"])), name)
    many = f"{counted(samples, 'sample')} beyond it"
    if samples < MOST_BY_CHANCE:
        return f"only {many}: it may be chance"
    spread = most_spread(before, after, name)
    if spread is None:
        return many
    within = after[f"{name}_ns"] <= before[f"{name}_ns"] * (1 + spread)
    return f"{many}; parts of a run differ by {spread:.0%}{': it may be chance' if within else ''}"


def most_spread(before: Mapping[str, Any], after: Mapping[str, Any], name: str) -> float | None:
    """By how much a percentile differs between parts of one of two runs, of the less steady one; None: not known."""
    known = [one for figures in (before, after) if (one := figures.get("spread", {}).get(name)) is not None]
    return max(known, default=None)


def within_spread(
    old: Mapping[str, Any], new: Mapping[str, Any], limits: Mapping[str, float], unjudged: Container[str] = ()
) -> list[str]:
    """Stages and percentiles whose limit is less than what parts of a run differ by, each with that."""
    return [
        f"{stage} {name} {spread:.0%}"
        for stage in old
        if stage in new
        for name, share in limits.items()
        if f"{stage} {name}" not in unjudged
        and (spread := most_spread(old[stage], new[stage], name)) is not None
        and share < spread
    ]


def too_few(old: Mapping[str, Any], new: Mapping[str, Any], limits: Iterable[str]) -> list[str]:
    """Stages, and which of the percentiles in `limits`, that have too few samples beyond it: worse would be chance."""
    return [
        f"{stage} {name}"
        for stage in old
        if stage in new
        for name in limits
        if beyond(int(min(old[stage]["count"], new[stage]["count"])), name) < MOST_BY_CHANCE
    ]
