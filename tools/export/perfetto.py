"""The `perfetto` format: a stream of TracePackets, as ui.perfetto.dev and `trace_processor` read it.

A process is a group of tracks, with a track for each context of each of its threads: ISR, tasklet, queue, task, and
driver, where a driver has the device (its probe, its remove), whatever runs that.
Every record is an instant of category `record` on its track, with its arguments. Around them lie slices of
category `span` (`tools.export.spans`). Each message is a flow: an arrow from its post through slot, interrupt, DPC and
work to the probe, and from a guest's message to the host's answers. Counters show how many bytes each ring holds.
Records under the kernel's own names are ftrace events as well, and so is each interrupt.

Field numbers are those of protos/perfetto/trace (perfetto.dev, "Synthetic TrackEvent").
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Final

from emu.event_fields import Argument, EventSpec
from emu.recording import RecordedActor, Recording, TraceRecord
from tools.event_names import name_of
from tools.export.events import KERNEL_SYSTEM, system_of
from tools.export.protobuf import data, fixed64, number, text
from tools.export.rings import SIDES, Rings
from tools.export.spans import Span, Spans
from tools.export.threads import Thread, Threads
from tools.flows import Flows, flows_in

_SEQUENCE: Final = 1
_REALTIME, _MONOTONIC, _BOOTTIME = 1, 3, 6
_SLICE_BEGIN, _SLICE_END, _INSTANT, _COUNTER = 1, 2, 3, 4
_UNIT_BYTES: Final = 3
_EXPLICIT: Final = 3
"""TrackDescriptor.child_ordering: by `sibling_order_rank`."""
DRIVER: Final = "DRIVER"
_OF_DRIVERS: Final = frozenset(("probe_start", "probe", "remove_start", "remove"))
RANK: Final = {"HOST": 0, "ISR": 1, "TASKLET": 2, "QUEUE": 3, "TASK": 4, "BOOT": 5, DRIVER: 6}
"""How the tracks of one thread lie: interrupts above what they interrupt, a driver below who calls it."""
IRQ_NAME: Final = "Hyper-V VMbus"


def perfetto(recording: Recording) -> Iterator[bytes]:
    """The packets of a whole trace, each as the field `packet` of the one Trace message."""
    trace = _Trace(Threads.of_recording(recording), arrows(flows_in(recording)))
    yield _packet(_clocks(int(recording.head.get("began_ns", 0)), int(recording.head.get("began_unix_ns", 0))))
    for record in recording.records():
        yield from trace.record(record)
    yield from trace.close()


class _Trace:
    """Writes what records become, each track's descriptor before its first event."""

    def __init__(self, threads: Threads, flow_ids: Mapping[tuple[int, int], list[int]]) -> None:
        self._threads = threads
        self._flow_ids = flow_ids
        self._spans = Spans()
        self._rings = Rings()
        self._tracks: dict[object, int] = {}
        self._forms: dict[int, _Form] = {}

    def record(self, record: TraceRecord) -> Iterator[bytes]:
        """Everything that one record becomes."""
        track = yield from self._context_track(record.actor, lane_of(record))
        yield _at(record.t_ns, track, _INSTANT, self._instant(record))
        for span in self._spans.feed(record):
            yield from self._slice(span)
        for key in self._rings.feed(record):
            counter = yield from self._counter_track(*key)
            yield _at(record.t_ns, counter, _COUNTER, number(30, self._rings.rings[key].fill))
        if system_of(record.event) == KERNEL_SYSTEM:
            yield self._ftrace(record.actor, record.t_ns, data(327, _generic(record)))

    def _instant(self, record: TraceRecord) -> bytes:
        """TrackEvent: name, arguments as debug annotations, flows."""
        form = self._forms.get(record.event.number)
        if form is None:
            form = self._forms[record.event.number] = _Form(record.event)
        flow_ids = self._flow_ids.get((record.actor.slot, record.seq), ())
        return form.instant(record.values) + b"".join([fixed64(47, flow_id) for flow_id in flow_ids])

    def close(self) -> Iterator[bytes]:
        """The spans that nothing ended."""
        for span in self._spans.close():
            yield from self._slice(span)

    def _slice(self, span: Span) -> Iterator[bytes]:
        """A slice; its packets may lie behind those of what it contains: readers sort by time."""
        track = yield from self._context_track(span.actor, lane_of(span.first))
        yield _at(span.begin_ns, track, _SLICE_BEGIN, text(22, "span") + text(23, span.name))
        yield _at(span.end_ns, track, _SLICE_END, b"")
        if span.first.event.name == "isr_enter":
            vector = number(1, span.first.values[0])
            yield self._ftrace(span.actor, span.begin_ns, data(36, vector + text(2, IRQ_NAME)))
            yield self._ftrace(span.actor, span.end_ns, data(37, vector + number(2, 1)))

    def _ftrace(self, actor: RecordedActor, t_ns: int, event: bytes) -> bytes:
        """One ftrace event, in a bundle of its processor."""
        thread = self._threads.of(actor)
        return _packet(data(1, number(1, thread.cpu) + data(2, number(1, t_ns) + number(2, thread.tid) + event)))

    # -- tracks -----------------------------------------------------------------------------------

    def _context_track(self, actor: RecordedActor, context: str) -> Generator[bytes, None, int]:
        thread = self._threads.of(actor)
        if (actor, context) in self._tracks:
            return self._tracks[actor, context]
        process_name = self._threads.process_of(thread)
        descriptor = data(3, number(1, thread.pid) + text(6, process_name))
        process = yield from self._track(("process", thread.pid), descriptor)
        parent = yield from self._track(("thread", thread.tid), number(5, process) + _thread(thread))
        # One of several threads is told by its name; Perfetto itself shows numbers only.
        name = context.lower() if thread.name == process_name else f"{thread.name} {context.lower()}"
        rank = number(12, RANK.get(context, len(RANK)))
        return (yield from self._track((actor, context), number(5, parent) + text(2, name) + rank))

    def _counter_track(self, relid: int, side: int) -> Generator[bytes, None, int]:
        group = yield from self._track("rings", text(2, "rings"))
        name = f"channel {relid} {SIDES[side & 1]}"
        return (
            yield from self._track((relid, side), number(5, group) + text(2, name) + data(8, number(3, _UNIT_BYTES)))
        )

    def _track(self, key: object, descriptor: bytes) -> Generator[bytes, None, int]:
        """The uuid of a track, which is described when it is first asked for."""
        uuid = self._tracks.get(key)
        if uuid is None:
            uuid = self._tracks[key] = len(self._tracks) + 1
            yield _packet(data(60, number(1, uuid) + descriptor))
        return uuid


class _Form:
    """What all instants of one event share: the category, its name, its arguments' names."""

    def __init__(self, spec: EventSpec) -> None:
        self._head = text(22, "record") + text(23, spec.name)
        self._arguments = [(field, text(10, field.name), text(10, f"{field.name}_name")) for field in spec.fields]
        self._named: dict[tuple[int, int], bytes] = {}

    def instant(self, values: Sequence[int]) -> bytes:
        """Name and arguments, each a DebugAnnotation; a number that has a name is followed by that."""
        out = [self._head]
        for at, ((field, name, _named), value) in enumerate(zip(self._arguments, values, strict=True)):
            out.append(data(4, name + _typed(field, value, signed=4, unsigned=3, string=6)))
            if field.enum:
                out.append(self._name(at, value))
        return b"".join(out)

    def _name(self, at: int, value: int) -> bytes:
        """The annotation with the name of a value; nothing when it has none."""
        made = self._named.get((at, value))
        if made is None:
            field, _name, named = self._arguments[at]
            known = name_of(field, value)
            made = self._named[at, value] = data(4, named + text(6, known)) if known else b""
        return made


def lane_of(record: TraceRecord) -> str:
    """On which of its thread's tracks a record lies."""
    return DRIVER if record.event.name in _OF_DRIVERS else record.context


def _thread(thread: Thread) -> bytes:
    """ThreadDescriptor, and that the tracks below it are ordered."""
    return data(4, number(1, thread.pid) + number(2, thread.tid) + text(5, thread.name)) + number(11, _EXPLICIT)


def arrows(flows: Flows) -> dict[tuple[int, int], list[int]]:
    """By slot and sequence of a record: the numbers of the flows in whose course the message moves on there."""
    ids: dict[tuple[int, int], list[int]] = {}
    for number_, flow in enumerate(flows, 1):
        for step in flow.path:
            ids.setdefault((step.record.actor.slot, step.record.seq), []).append(number_)
    return ids


def _generic(record: TraceRecord) -> bytes:
    """GenericFtraceEvent: an event that Perfetto has no type for."""
    return text(1, record.event.name) + b"".join(
        data(2, text(1, field.name) + _typed(field, value, signed=4, unsigned=5, string=3))
        for field, value in record.event.pairs(record.values)
    )


def _typed(field: Argument, value: int, *, signed: int, unsigned: int, string: int) -> bytes:
    """A value in the field that a message has for its type."""
    if field.text:
        return text(string, field.show(value))
    return number(signed if field.signed else unsigned, value)


def _clocks(began_ns: int, began_unix_ns: int) -> bytes:
    """ClockSnapshot: our times are CLOCK_MONOTONIC, and what the wall clock said then."""
    clocks = ((_BOOTTIME, began_ns), (_MONOTONIC, began_ns), (_REALTIME, began_unix_ns))
    # Perfetto counts in CLOCK_BOOTTIME, which differs from ours by the time the computer slept: shown as one.
    return data(6, b"".join(data(1, number(1, clock) + number(2, time)) for clock, time in clocks))


def _at(t_ns: int, track: int, kind: int, event: bytes) -> bytes:
    """A packet with one TrackEvent."""
    return _packet(number(8, t_ns) + number(10, _SEQUENCE) + data(11, number(9, kind) + number(11, track) + event))


def _packet(content: bytes) -> bytes:
    return data(1, content)
