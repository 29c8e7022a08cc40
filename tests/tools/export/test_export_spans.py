"""Spans of time, and bytes in rings, out of records."""

from __future__ import annotations

from emu.event_fields import text_value
from emu.recording import RecordedActor, TraceRecord
from emu.tracing import EVENTS
from tools.export.rings import Rings
from tools.export.spans import Spans

VCPU = RecordedActor(3, "vcpu0", "VCPU", 71, 0)


def at(t_ns: int, event: str, *values: int, context: str = "TASK") -> TraceRecord:
    """A record of a processor."""
    spec = EVENTS[event]
    filled = (*values, *[0] * (len(spec.fields) - len(values)))
    return TraceRecord(t_ns, t_ns, VCPU, 0, context, spec, filled)


def spans_of(*records: TraceRecord) -> list[tuple[str, str, int, int]]:
    """Name, context, begin and end of each span, in the order in which they ended."""
    spans = Spans()
    ended = [span for record in records for span in spans.feed(record)]
    return [(one.name, one.context.lower(), one.begin_ns, one.end_ns) for one in [*ended, *spans.close()]]


def test_interrupt_lies_over_the_tasklet_it_interrupts() -> None:
    """Each on its own track; both last from their begin to their end."""
    assert spans_of(
        at(1, "tasklet_run", 1, context="TASKLET"),
        at(2, "isr_enter", 0xF3, context="ISR"),
        at(3, "isr_exit", 0xF3, context="ISR"),
        at(4, "tasklet_done", 1, context="TASKLET"),
    ) == [("hyperv_vector_handler 0xf3", "isr", 2, 3), ("vmbus_on_msg_dpc", "tasklet", 1, 4)]


def test_probe_lies_in_its_work() -> None:
    """The inner one ends first."""
    assert spans_of(
        at(1, "work_run", 2, 2, context="QUEUE"),
        at(2, "probe_start", 7, context="QUEUE"),
        at(3, "probe", 7, context="QUEUE"),
        at(4, "work_done", 2, 2, context="QUEUE"),
    ) == [("probe relid 7", "queue", 2, 3), ("vmbus_add_channel_work", "queue", 1, 4)]


def test_mutexes_are_held_one_in_another_and_slept_for() -> None:
    """Each from its lock to its unlock, by its name; what sleeps inside lies inside."""
    name = text_value("m", 32)
    assert spans_of(
        at(1, "lock", 8, 1, name),
        at(2, "lock", 16, 1, name),
        at(3, "wait", 0, 24, name),
        at(4, "wait_done", 0, 24),
        at(5, "unlock", 16, 1, name),
        at(6, "unlock", 8, 1, name),
    ) == [("waits for m", "task", 3, 4), ("holds m", "task", 2, 5), ("holds m", "task", 1, 6)]


def test_span_without_an_end_lasts_as_long_as_something_is_recorded_in_it() -> None:
    """Its end is lost, or the recording is older than the event: the last record in its context is the end."""
    ended = spans_of(
        at(1, "tasklet_run", 2, 7, context="TASKLET"),
        at(2, "unmask", 7, context="TASKLET"),
        at(5, "halt"),
        at(9, "tasklet_run", 99, context="TASKLET"),
    )

    assert sorted(ended) == [
        ("halt", "task", 5, 5),
        ("tasklet 99", "tasklet", 9, 9),
        ("vmbus_on_event", "tasklet", 1, 2),
    ]


def test_end_without_a_begin_is_nothing() -> None:
    """The begin was overwritten."""
    assert spans_of(at(1, "isr_exit", 0xF3), at(2, "halt_end")) == []


def test_ring_is_as_large_as_its_users_say() -> None:
    """Attaching tells the size; over the end of the ring the fill goes on."""
    rings = Rings()
    for record in (
        at(1, "map", 7, 1, 8),
        at(2, "ring_attach", 7, 0, 4096, 0, 0),
        at(3, "ring_publish", 7, 0, 4000, 4000),
        at(4, "ring_release", 7, 0, 4000, 4000),
        at(5, "ring_attach", 7, 0, 4096, 4000, 4000),
        at(6, "ring_publish", 7, 0, 24, 120),
    ):
        rings.feed(record)

    assert rings.rings[7, 0].fill == 120


def test_nothing_waits_in_rings_that_the_host_has_let_go_of() -> None:
    """A channel was taken back with something unread in it; the next opening has rings of its own."""
    rings, fills = Rings(), []
    for record in (
        at(1, "unmap", 7, 0),
        at(2, "map", 7, 1, 8),
        at(3, "ring_publish", 7, 0, 4000, 4000),
        at(4, "unmap", 7, 0),
        at(5, "ring_publish", 7, 0, 4080, 80),
        at(6, "map", 7, 2, 8),
        at(7, "ring_publish", 7, 0, 16, 16),
    ):
        fills.append({side: rings.rings[relid, side].fill for relid, side in rings.feed(record)})

    assert fills == [{}, {0: 0, 1: 0}, {0: 4000}, {0: 0, 1: 0}, {0: 0}, {0: 0, 1: 0}, {0: 16}]


def test_recording_that_begins_late_begins_with_what_is_there() -> None:
    """Nobody saw the channel opened: the first who attaches says what waits."""
    rings = Rings()
    rings.feed(at(1, "ring_attach", 7, 1, 4096, 64, 4040))

    assert rings.rings[7, 1].fill == 120
