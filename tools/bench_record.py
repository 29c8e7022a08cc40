"""`bench record`: what it costs that a machine records, and that it could.

One event by itself, in a loop, given with its words and bound to them before. A machine that records (and is drained,
as `run --record` does) beside one that does not, in three ways:

    stream       batches of 32, one after the other, through the whole channel path (`tools.bench_path`): the host never
                 waits, and a batch is one publish, so this is what recording does to throughput
    exchange     a batch of 32 there, the same 32 back, then the next: in lockstep, so each batch is a round trip with
                 all its interrupts, and 24 events
    round trip   the same with a single packet, nearly all of which is events

What is not recorded costs one look at whether there is a recorder.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import repeat
from statistics import median
from typing import Final

from emu.ipc.segments import Segment
from emu.tracing import E_IRQ_RAISE, TRACE_BYTES, Recorder
from tools.anchors import Against, Anchor
from tools.bench_echo import round_trips
from tools.bench_path import Streamed, stream
from tools.exchanges import exchanged, exchanging_machine
from tools.nameless_file import nameless_file
from tools.pinned import pin
from tools.two_ends import Cpus, two_cpus

EVENTS: Final = 100_000
SHORT_EVENTS: Final = 5_000
WINDOW_S: Final = 0.5
SHORT_S: Final = 0.05
EVENT_GOAL_NS: Final = 350.0
RATE_GOAL: Final = 0.9
OFF_GOAL_NS: Final = 35.0
"""A tenth of an event that is recorded: nobody sees it among a packet's microseconds."""


def measure(runs: int, *, short: bool = False) -> list[Anchor]:
    """One event, on and off; stream, exchange and single round trips with and without recording."""
    window_s = SHORT_S if short else WINDOW_S
    cpus = two_cpus()
    streams = _streams(runs, cpus)
    rates: dict[bool, list[float]] = {False: [], True: []}
    trips: dict[bool, list[float]] = {False: [], True: []}
    events, bound, looks = [], [], []
    with ExitStack() as stack:
        machines = {record: stack.enter_context(exchanging_machine(1, 1, record=record)) for record in rates}
        if cpus is not None:
            # Or the scheduler has both ends of one machine on one core, and those of the other on two.
            for running in machines.values():
                pin(running, *cpus)
        recorder = stack.enter_context(bare_recorder())
        count = SHORT_EVENTS if short else EVENTS
        for _ in range(runs):
            events.append(event_ns(recorder, count))
            bound.append(call_ns(recorder.bind(E_IRQ_RAISE, 1, 0xF3), count))
            looks.append(event_ns(None, count))
            for record, running in machines.items():
                rates[record].append(exchanged(running, window_s).per_second)
                trips[record].append(median(round_trips(running, window_s)))
    plain, single = Against("not recording", median(rates[False])), Against("not recording", median(trips[False]))
    stream_plain = Against("not recording", median([one.rate for one in streams[False]]))
    return [
        Anchor.of("record-event", events, "ns", better="lower", goal=EVENT_GOAL_NS),
        Anchor.of("record-event-bound", bound, "ns", better="lower", goal=EVENT_GOAL_NS),
        Anchor.of("record-event-off", looks, "ns", better="lower", goal=OFF_GOAL_NS),
        Anchor.of(
            "record-stream",
            [one.rate for one in streams[True]],
            "packets/s",
            better="higher",
            against=stream_plain,
            goal=RATE_GOAL,
            floor=RATE_GOAL,
        ),
        Anchor.of(
            "record-stream-dropped",
            [float(one.dropped) for one in streams[True]],
            "records",
            better="lower",
            goal=0.0,
        ),
        Anchor.of("record-exchange", rates[True], "packets/s", better="higher", against=plain),
        Anchor.of("record-round-trip-p50", trips[True], "us", better="lower", against=single),
    ]


def _streams(runs: int, cpus: Cpus | None) -> dict[bool, list[Streamed]]:
    """Runs without and with recording, in turn: each in a machine of its own, whose luck with memory is its own."""
    streams: dict[bool, list[Streamed]] = {False: [], True: []}
    with nameless_file() as path:
        for _ in range(runs):
            for record, done in streams.items():
                done.append(stream(cpus, path if record else None))
    return streams


@contextmanager
def bare_recorder() -> Iterator[Recorder]:
    """A recorder without a machine, as an actor of one has it."""
    fd = os.memfd_create("bench-record")
    os.ftruncate(fd, TRACE_BYTES)
    with closing(Segment("bench-record", fd, TRACE_BYTES)) as segment:
        yield Recorder(segment, 0)


def event_ns(recorder: Recorder | None, count: int) -> float:
    """Nanoseconds of an event where a recorder is, or is not; the loop's own taken away."""
    began = time.perf_counter_ns()
    for _ in repeat(None, count):
        if recorder:
            recorder.record(E_IRQ_RAISE, 1, 0xF3)
    return max(time.perf_counter_ns() - began - _loop_ns(count), 1) / count


def call_ns(record: Callable[[], None], count: int) -> float:
    """Nanoseconds of an event that is bound; the loop's own taken away."""
    began = time.perf_counter_ns()
    for _ in repeat(None, count):
        record()
    return max(time.perf_counter_ns() - began - _loop_ns(count), 1) / count


def _loop_ns(count: int) -> int:
    began = time.perf_counter_ns()
    for _ in repeat(None, count):
        pass
    return time.perf_counter_ns() - began
