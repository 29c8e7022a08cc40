"""`bench scale`: what more channels and more processors cost, and whether polling hurts where it cannot help.

    channels    one vCPU, all its channels active with the same batch each: time a packet
    vCPUs       each with a channel of its own, on whatever cores there are: packets a second in all
    busy        both ends' cores kept busy by somebody else: throughput and p99 with and without polling

The machines that are compared run at the same time and are measured in turn; who is not measured sleeps.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Final

from tools.anchors import Against, Anchor
from tools.bench_echo import p99_of, round_trips
from tools.exchanges import exchanged, exchanging_machine

CHANNELS: Final = (1, 8, 64, 512)
SHORT_CHANNELS: Final = (1, 16)
VCPUS: Final = (1, 2, 4, 8, 16)
SHORT_VCPUS: Final = (1, 4)
WINDOW_S: Final = 0.5
SHORT_S: Final = 0.05
CHANNELS_GOAL: Final = 1.3
VCPUS_GOAL: Final = 0.8
BUSY_GOAL: Final = 1.1


def measure(runs: int, *, short: bool = False) -> list[Anchor]:
    """All three."""
    window_s = SHORT_S if short else WINDOW_S
    return [
        *_channels(runs, SHORT_CHANNELS if short else CHANNELS, window_s),
        *_vcpus(runs, SHORT_VCPUS if short else VCPUS, window_s),
        *_busy(runs, window_s),
    ]


def _channels(runs: int, counts: tuple[int, ...], window_s: float) -> list[Anchor]:
    figures: dict[int, list[float]] = {count: [] for count in counts}
    with ExitStack() as stack:
        machines = {count: stack.enter_context(exchanging_machine(1, count)) for count in counts}
        for _ in range(runs):
            for count, running in machines.items():
                figures[count].append(exchanged(running, window_s).per_packet_ns)
    against = Against("a packet with 1 channel", median(figures[1]))
    return [
        Anchor.of(
            f"scale-{count}-channels", figures[count], "ns/packet", better="lower", against=against, goal=CHANNELS_GOAL
        )
        for count in counts
        if count > 1
    ]


def _vcpus(runs: int, counts: tuple[int, ...], window_s: float) -> list[Anchor]:
    figures: dict[int, list[float]] = {count: [] for count in counts}
    with ExitStack() as stack:
        machines = {count: stack.enter_context(exchanging_machine(count, count)) for count in counts}
        for _ in range(runs):
            for count, running in machines.items():
                figures[count].append(exchanged(running, window_s).per_second)
    best = max(counts, key=lambda count: median(figures[count]))
    against = Against(f"the best, {best} vCPUs", median(figures[best]))
    return [
        Anchor.of(
            f"scale-{count}-vcpus", figures[count], "packets/s", better="higher", against=against, goal=VCPUS_GOAL
        )
        for count in counts
    ]


def _busy(runs: int, window_s: float) -> list[Anchor]:
    rates: dict[str, list[float]] = {"adaptive": [], "off": []}
    tails: dict[str, list[float]] = {"adaptive": [], "off": []}
    with ExitStack() as stack:
        machines = {poll: stack.enter_context(exchanging_machine(1, 1, poll=poll)) for poll in rates}
        stack.enter_context(busy_cores())
        for _ in range(runs):
            for poll, running in machines.items():
                rates[poll].append(exchanged(running, window_s).per_second)
                tails[poll].append(p99_of(round_trips(running, window_s)))
    rate, tail = (Against("poll off", median(figures["off"])) for figures in (rates, tails))
    return [
        Anchor.of(
            "scale-busy-cores-rate", rates["adaptive"], "packets/s", better="higher", against=rate, goal=1 / BUSY_GOAL
        ),
        Anchor.of("scale-busy-cores-p99", tails["adaptive"], "us", better="lower", against=tail, goal=BUSY_GOAL),
    ]


@contextmanager
def busy_cores() -> Iterator[None]:
    """Every core has a process that computes, at everybody's priority, for as long as the block runs."""
    context = multiprocessing.get_context("fork")
    ours = os.getpid()
    hogs = [context.Process(target=_compute, args=(core, ours), daemon=True) for core in os.sched_getaffinity(0)]
    try:
        for hog in hogs:
            hog.start()
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.join()


def _compute(core: int, parent: int) -> None:
    os.sched_setaffinity(0, {core})
    # For as long as there is whoever wants that: a bench may be killed.
    while os.getppid() == parent:
        sum(range(10_000))
