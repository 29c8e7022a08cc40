"""`bench points`: what sync points cost where nothing is armed.

A point by itself, as the code that has one asks it: in a machine that may run schedules, and in any other. Then batches
and single round trips through a machine that may run schedules beside one that does not, in turn. A plain machine has
no point on its packet path at all (`tests/tools/test_bench_points.py` shows that), so it *is* a build without them, and
what `bench ring echo` measures; the ratio, which has no goal, is what it costs a machine that runs schedules.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import repeat
from statistics import median
from typing import Final

from emu.syncpoint import NOT_ARMED, Armed, Point, Tickets, unreachable
from tools.anchors import Against, Anchor
from tools.bench_echo import round_trips
from tools.exchanges import exchanged, exchanging_machine
from tools.pinned import pin, two_cores

LOOKS: Final = 200_000
SHORT_LOOKS: Final = 5_000
WINDOW_S: Final = 0.5
SHORT_S: Final = 0.05
DISARMED_GOAL_NS: Final = 50.0
_AT: Final = int(Point.CHAN_AFTER_CALLBACK)


class Holder:
    """Whoever comes to points, as `guestproc.current.Current` does."""

    def __init__(self, armed: Armed) -> None:
        self.armed: Final = armed
        self.reach: Final[Callable[..., None]] = unreachable


def measure(runs: int, *, short: bool = False) -> list[Anchor]:
    """A disarmed point; batches and round trips of a machine that may run schedules against a plain one's."""
    window_s, looks = (SHORT_S, SHORT_LOOKS) if short else (WINDOW_S, LOOKS)
    cores = two_cores()
    disarmed, plain = [], []
    rates: dict[bool, list[float]] = {False: [], True: []}
    trips: dict[bool, list[float]] = {False: [], True: []}
    with ExitStack() as stack:
        machines = {races: stack.enter_context(exchanging_machine(1, 1, races=races)) for races in rates}
        for running in machines.values():
            pin(running, *cores)
        armed = Tickets(machines[True].machine.control).armed()
        stack.callback(armed.close)
        for number in range(runs):
            disarmed.append(look_ns(Holder(armed), looks))
            plain.append(look_ns(Holder(NOT_ARMED), looks))
            # Who is first changes from run to run, so that neither always has the warmer core.
            for races in (False, True) if number % 2 else (True, False):
                rates[races].append(exchanged(machines[races], window_s).per_second)
                trips[races].append(median(round_trips(machines[races], window_s)))
    batches, single = (Against("without sync points", median(figures[False])) for figures in (rates, trips))
    return [
        Anchor.of("point-disarmed", disarmed, "ns", better="lower", goal=DISARMED_GOAL_NS),
        Anchor.of("point-plain", plain, "ns", better="lower", goal=DISARMED_GOAL_NS),
        Anchor.of("points-batches", rates[True], "packets/s", better="higher", against=batches),
        Anchor.of("points-round-trip-p50", trips[True], "us", better="lower", against=single),
    ]


def look_ns(holder: Holder, count: int) -> float:
    """Nanoseconds of a point that is not armed, of this thread's own time; the loop's taken away."""
    began = time.thread_time_ns()
    for _ in repeat(None, count):
        if holder.armed[_AT]:
            holder.reach(_AT, 1)
    looked = time.thread_time_ns()
    for _ in repeat(None, count):
        pass
    return max(looked - began - (time.thread_time_ns() - looked), 1) / count
