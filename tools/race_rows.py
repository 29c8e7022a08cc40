"""A recorded run of a schedule as the rows of a sequence diagram: who did what to whom, between the steps.

Lifelines are actors: the host, processors, workers, threads of user space. A row is a step of the schedule, something
that an actor did, or something that went from one actor to another (a message, work, a signal). What an exhibit is not
about is left out: `FAMILIES` says which records its points and invariants make interesting. What is still too much goes
by weight, the least telling first.

Two orders: by time, for who reads times; or *told*, in which only what is ordered by cause is, so that it is the same
for every run of the same schedule: what is concurrent comes in a fixed order, and a message is followed where it goes.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from emu.control import ActorKind, slot_of
from emu.recording import Recording, TraceRecord
from emu.syncpoint import Point, PointAction
from emu.wire.messages import MessageType
from emu.wire.synic import HYPERVISOR_CALLBACK_VECTOR
from guestproc.kernel.workqueue import QueueNumber
from guestproc.protocol.numbers import Tasklets, Works
from tools.event_names import name_of
from tools.flows import Flow, Flows, Role, flows_of
from tools.invariants import is_host
from tools.nouns import counted
from tools.race_run import RunNote
from tools.schedule import Schedule, Step

MOST_ROWS: Final = 40
HOST: Final = "host"
_SEVERAL: Final[Mapping[str, int]] = {"user": 1, "system": 0}
"""What threads are called of which there are several alike, and the number of the first."""


class Kind(StrEnum):
    """What a row is."""

    STEP = "step"
    DOES = "does"
    SENDS = "sends"
    IN_VAIN = "in_vain"
    """It left, and never arrived."""
    HELD = "held"
    GOES_ON = "goes_on"
    LEFT_OUT = "left_out"


@dataclass(frozen=True, slots=True)
class Row:
    """One row: `actor` did it (a lifeline; "" for a step), at `t_ns`; `to` is where it arrived, at `to_ns`.

    `weight`: 0 is never left out, 3 first. `count`: how many like it in a row.
    """

    kind: Kind
    text: str
    t_ns: int
    actor: str = ""
    to: str = ""
    to_ns: int = 0
    weight: int = 0
    count: int = 1

    @property
    def at_ns(self) -> int:
        """When it is over."""
        return self.to_ns or self.t_ns

    @property
    def words(self) -> str:
        """Its text, and how often."""
        return f"{self.text} ({self.count} times)" if self.count > 1 else self.text

    def touches(self) -> tuple[tuple[str, int], ...]:
        """The lifelines that it is drawn on, and when it is there."""
        ends = ((self.actor, self.t_ns), (self.to, self.at_ns))
        return tuple(end for end in ends if end[0])


@dataclass(frozen=True, slots=True)
class Diagram:
    """A run, ready to be drawn: lifelines from left to right, rows from top to bottom, and what is said below them."""

    lifelines: tuple[str, ...]
    rows: tuple[Row, ...]
    began_ns: int
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Lifelines of one of several equal threads, which are called otherwise here: which of them it is, is chance."""


class Family(StrEnum):
    """Kinds of records that only some exhibits are about."""

    SLOT = "slot"
    POST = "post"
    INTERRUPT = "interrupt"
    RING = "ring"
    PAGES = "pages"
    TIMER = "timer"


FAMILIES: Final[Mapping[str, tuple[Family, ...]]] = {
    "g.msg.": (Family.SLOT,),
    "h.syn.": (Family.SLOT, Family.TIMER),
    "h.vp.": (Family.SLOT, Family.INTERRUPT),
    "g.unload.": (Family.SLOT,),
    "g.post.": (Family.POST,),
    "g.isr.": (Family.INTERRUPT, Family.RING),
    "g.chan.": (Family.RING,),
    "g.ring.": (Family.RING,),
    "g.drv.poller": (Family.RING,),
    "g.drv.before_tx": (Family.RING,),
    "g.close.before_ring": (Family.RING,),
    "g.req.": (Family.RING,),
    "h.vsp.": (Family.RING,),
    "h.ctl.on_modify": (Family.RING,),
    "INV-07": (Family.SLOT,),
    "INV-08": (Family.SLOT,),
    "INV-09": (Family.SLOT,),
    "INV-10": (Family.SLOT,),
    "INV-11": (Family.POST,),
    "INV-12": (Family.PAGES,),
    "INV-16": (Family.INTERRUPT, Family.RING),
    "INV-17": (Family.RING,),
    "INV-18": (Family.RING,),
    "INV-19": (Family.RING,),
    "INV-20": (Family.RING,),
    "INV-21": (Family.RING,),
    "INV-22": (Family.RING,),
    "INV-24": (Family.RING,),
}
"""What the name of a point begins with, or an invariant, and what an exhibit with it is about."""


@dataclass(frozen=True, slots=True)
class Telling:
    """How a record is told: by the guest, by the host ("" for not at all), how telling it is, in which family."""

    guest: str = ""
    host: str = ""
    weight: int = 2
    family: Family | None = None


def _guest(text: str, weight: int, family: Family | None = None) -> Telling:
    return Telling(text, "", weight, family)


def _host(text: str, weight: int, family: Family | None = None) -> Telling:
    return Telling("", text, weight, family)


def _both(text: str, weight: int, family: Family | None = None) -> Telling:
    return Telling(text, text, weight, family)


TELLINGS: Final[Mapping[str, Telling]] = {
    "offer": _guest("makes the channel of relid {relid}", 3),
    "probe_start": _guest("probes relid {relid} with {name}", 1),
    "probe": _guest("probe of relid {relid}: {ret}", 2),
    "remove_start": _guest("removes {name} from relid {relid}", 1),
    "remove": _guest("{name} is off relid {relid}", 3),
    "open": _guest("opens relid {relid}: {ret}", 1),
    "close": _guest("closes relid {relid}: {ret}", 1),
    "req_alloc": _guest("puts itself on the list: waits for the answer to {msgtype}", 2),
    "req_free": _guest("waits for {msgtype} no more", 3),
    "ignored": _both("ignores it: {rule}", 1),
    "refused": _both("refuses it: {rule}", 1),
    "fault": _both("a fault, {code}", 1),
    "fault_hit": _both("the fault strikes: {kind}", 0),
    "reset": _host("the guest is gone; drops {dropped} messages", 0),
    "cpu_online": _guest("CPU {cpu} is online", 1),
    "cpu_offline": _guest("CPU {cpu} goes offline", 1),
    "target_change": _both("interrupts of relid {relid} go to VP {target_vp}", 1),
    "task_run": _guest("program {program} begins on relid {relid}", 1),
    "task_done": _guest("program {program} ends: {state}", 1),
    "gpadl_add": Telling("lends {pages} pages of relid {relid}", "has {pages} pages of relid {relid}", 2, Family.PAGES),
    "gpadl_drop": Telling("has its pages back", "gives the pages of relid {relid} back", 1, Family.PAGES),
    "map": _host("maps {pages} pages of relid {relid}", 1, Family.PAGES),
    "unmap": _host("unmaps the pages of relid {relid}", 1, Family.PAGES),
    "page_free": _guest("returns {pages} pages to the allocator", 1, Family.PAGES),
    "page_alloc": _guest("takes {pages} pages from the allocator", 2, Family.PAGES),
    "isr_enter": _guest("enters vmbus_isr", 2, Family.INTERRUPT),
    "flag_clear": _guest("takes event flag {flag}", 1, Family.RING),
    "vmbus_on_event": _guest("drains relid {relid}", 2, Family.RING),
    "mask": _guest("masks the ring {side}, relid {relid}", 1, Family.RING),
    "unmask": _guest("unmasks the ring {side}, relid {relid}", 1, Family.RING),
    "ring_publish": _both("writes {bytes} bytes {side}, relid {relid}", 1, Family.RING),
    "ring_release": _both("takes {bytes} bytes {side}, relid {relid}", 1, Family.RING),
    "ring_full": _both("needs {needed} bytes {side}: {free} are free", 1, Family.RING),
    "ring_room": _both("finds {free} bytes of room {side}", 2, Family.RING),
    "pending_size": _both("asks for {size} bytes of room {side}", 1, Family.RING),
    "timer_armed": _host("arms timer {timer}", 1, Family.TIMER),
    "timer_expired": _host("sees timer {timer} expire", 1, Family.TIMER),
    "timer_delivered": _host("has the message of timer {timer}", 1, Family.TIMER),
    "timer_dropped": _host("drops a tick of timer {timer}", 1, Family.TIMER),
    "timer_withdrawn": _host("takes back the message of timer {timer}", 1, Family.TIMER),
    "clock_event": _guest("has the clock event of timer {timer}", 1, Family.TIMER),
}
"""Records that are one actor's own. What goes between two is made of pairs of records, below."""

_WORDS: Final[Mapping[str, str]] = {"TO_HOST": "for the host", "TO_GUEST": "for the guest"}
_WEIGHTS: Final[Mapping[int, int]] = {
    MessageType.GPADL_BODY: 3,
    MessageType.GPADL_HEADER: 2,
    MessageType.GPADL_CREATED: 2,
    MessageType.GPADL_TEARDOWN: 2,
    MessageType.GPADL_TORNDOWN: 2,
}
"""Of messages that are not told first; the others weigh 1."""


def diagram_of(recording: Recording, note: RunNote, schedule: Schedule, *, told: bool = False) -> Diagram:
    """The diagram of a schedule's run; `told` instead of by time."""
    records = [record for record in recording.records() if record.t_ns <= note.ended_ns]
    flows = flows_of(records, recording.head.get("vp_indices", ()))
    rows = sorted(_Rows(records, flows, schedule, note).rows(), key=lambda row: row.at_ns)
    renamed = equal_threads(rows) if told else {}
    rows = [replace(row, actor=renamed.get(row.actor, row.actor), to=renamed.get(row.to, row.to)) for row in rows]
    rows = cut(folded(told_order(rows) if told else rows))
    kinds = {renamed.get(name, name): kind for name, kind in ((lifeline_of(one), one.actor.kind) for one in records)}
    used = {name for row in rows for name, _at in row.touches()}
    lifelines = sorted(used, key=lambda name: (name != HOST, _place(name, kinds.get(name, "")), name))
    return Diagram(tuple(lifelines), tuple(rows), note.began_ns[0] if note.began_ns else 0, renamed)


def _place(name: str, kind: str) -> int:
    """Where a lifeline stands: processors and their tasks, then the queues' threads in the order of the queues, then
    other threads."""
    if kind in (ActorKind.VCPU.name, ActorKind.TASK.name):
        return 0
    queue = name.partition("/")[0].upper()
    return 1 + QueueNumber[queue] if queue in QueueNumber.__members__ else 1 + len(QueueNumber)


def equal_threads(rows: Iterable[Row]) -> dict[str, str]:
    """Other names for threads of which there are several alike: in the order in which they come, by their first."""
    found: dict[str, list[str]] = {kind: [] for kind in _SEVERAL}
    for name in (name for row in rows for name, _at in row.touches()):
        kind, slash, _number = name.partition("/")
        if slash and kind in found and name not in found[kind]:
            found[kind].append(name)
    return {name: f"{kind}/{at}" for kind, names in found.items() for at, name in enumerate(names, _SEVERAL[kind])}


def lifeline_of(record: TraceRecord) -> str:
    """Whose lifeline a record is on."""
    return HOST if is_host(record) else record.actor.name.removeprefix("kworker/")


def families_of(schedule: Schedule) -> frozenset[Family]:
    """What an exhibit is about, by its points and its invariants."""
    names = [step.words[0] for step in schedule.steps if step.verb == "arm"]
    # What is left undone (28) can be anything, and is said beside every hang.
    names += schedule.invariants
    found = [families for begin, families in FAMILIES.items() for name in names if name.startswith(begin)]
    return frozenset(family for families in found for family in families)


# -- rows of a run ---------------------------------------------------------------------------------------


class _Rows:
    """The rows of one run, in no order."""

    def __init__(self, records: Sequence[TraceRecord], flows: Flows, schedule: Schedule, note: RunNote) -> None:
        self._records: Final = records
        self._flows: Final = flows
        self._schedule: Final = schedule
        self._note: Final = note
        self._families: Final = families_of(schedule)
        self._began_ns: Final = note.began_ns[0] if note.began_ns else 0
        processors = {record.actor.cpu: record.actor.name for record in records if _is_processor(record)}
        self._lifelines: Final = {record.actor.slot: lifeline_of(record) for record in records}
        self._processors: Final = [name for _cpu, name in sorted(processors.items())]

    def rows(self) -> Iterator[Row]:
        """All of them that began with the first step or later."""
        yield from self._steps()
        for flow in self._flows:
            rows = self._into_slot(flow) if flow.to_guest else self._to_host(flow)
            yield from (row for row in rows if row.t_ns >= self._began_ns)
        late = [record for record in self._records if record.t_ns >= self._began_ns]
        yield from self._work(late)
        yield from self._answers(late)
        for record in late:
            yield from self._own(record)

    def _steps(self) -> Iterator[Row]:
        for step, t_ns in zip(self._schedule.steps, self._note.began_ns, strict=False):
            if not step.verb.startswith("until"):
                yield Row(Kind.STEP, self._step_text(step), t_ns)

    def _step_text(self, step: Step) -> str:
        relid = self._note.relids.get(step.label)
        return f"{step.number}. {step.text}" + (f" (relid {relid})" if relid else "")

    # -- messages ------------------------------------------------------------------------------------

    def _into_slot(self, flow: Flow) -> Iterator[Row]:
        """A message of the host's: one arrow; or each of its steps, where the slot is what it is about."""
        posted, written = flow.step(Role.POSTED), flow.step(Role.SLOT_WRITE)
        read = flow.step(Role.DPC)
        name, to = _name(flow), self._processor(flow.position)
        weight = _WEIGHTS.get(flow.msgtype, 1)
        if read is not None:
            to = lifeline_of(read)
        if read is None or Family.SLOT in self._families:
            yield from self._slot_steps(flow, to)
        elif written is not None:
            yield Row(Kind.SENDS, name, written.t_ns, HOST, to, read.t_ns, weight)
        if posted is not None and written is None:
            yield Row(Kind.IN_VAIN, f"{name} waits for the slot", posted.t_ns, HOST, to)

    def _slot_steps(self, flow: Flow, to: str) -> Iterator[Row]:
        name = _name(flow)
        for step in flow.steps:
            record = step.record
            if step.role is Role.SLOT_BUSY:
                yield Row(Kind.DOES, "finds the slot full, and sets its pending bit", record.t_ns, HOST, weight=1)
            elif step.role is Role.SLOT_WRITE:
                read = flow.step(Role.DPC)
                if read is None:
                    yield Row(Kind.IN_VAIN, f"{name} lies in the slot, unread", record.t_ns, HOST, to)
                else:
                    yield Row(Kind.SENDS, f"{name}, into the slot", record.t_ns, HOST, to, record.t_ns, 1)
            elif step.role is Role.DPC and record.event.name == "slot_read":
                yield Row(Kind.DOES, f"copies {flow.name} out of the slot", record.t_ns, lifeline_of(record), weight=2)
            elif step.role is Role.SLOT_FREE:
                text = f"empties the slot; pending bit read as {record.arguments['pending']}"
                yield Row(Kind.DOES, text, record.t_ns, lifeline_of(record), weight=1)

    def _to_host(self, flow: Flow) -> Iterator[Row]:
        first, taken = flow.steps[0].record, flow.step(Role.HOST_TAKE)
        begun = next((step.record for step in flow.steps if not is_host(step.record)), None)
        weight = _WEIGHTS.get(flow.msgtype, 1)
        if begun is None:
            claimer = first.arguments.get("claimer", 0)
            if taken is not None and claimer:
                actor = self._lifelines.get(slot_of(claimer), HOST)
                yield Row(Kind.SENDS, f"{_name(flow)}, which nobody meant", first.t_ns, actor, HOST, taken.t_ns, 1)
            return
        actor = lifeline_of(begun)
        if taken is None:
            yield Row(Kind.IN_VAIN, f"{_name(flow)}, which the host has not taken", begun.t_ns, actor, HOST)
        else:
            yield Row(Kind.SENDS, _name(flow), begun.t_ns, actor, HOST, taken.t_ns, weight)

    def _processor(self, position: int) -> str:
        return self._processors[position] if 0 <= position < len(self._processors) else "vcpu?"

    # -- what goes between two of the guest's --------------------------------------------------------

    def _work(self, records: Sequence[TraceRecord]) -> Iterator[Row]:
        """Work from who queues it to who begins it."""
        waiting: dict[tuple[int, ...], deque[TraceRecord]] = defaultdict(deque)
        for record in records:
            if record.event.name == "work_queue":
                waiting[record.values].append(record)
            elif record.event.name == "work_run" and waiting[record.values]:
                queued = waiting[record.values].popleft()
                text, to = self._work_text(record), lifeline_of(record)
                yield Row(Kind.SENDS, text, queued.t_ns, lifeline_of(queued), to, record.t_ns, 1)
        for left in waiting.values():
            for queued in left:
                queue = QueueNumber(queued.values[0]).name.lower()
                text = f"{self._work_text(queued)}, which waits in its queue"
                yield Row(Kind.IN_VAIN, text, queued.t_ns, lifeline_of(queued), queue)

    def _work_text(self, record: TraceRecord) -> str:
        function, serial = record.arguments["function"], record.arguments["serial"]
        flow = self._flows.get(f"h{serial}")
        what = _name(flow) if flow is not None else ""
        if function == Works.VMBUS_ONMESSAGE_WORK:
            return f"work: {what or 'a message'}"
        name = name_of(record.event.fields[1], function).lower() or f"work {function}"
        about = f" of relid {flow.relid}" if flow is not None and flow.relid else ""
        return f"{name}{about}"

    def _answers(self, records: Sequence[TraceRecord]) -> Iterator[Row]:
        """Who wakes whom that waits for the host; what the guest finds of its own; where somebody was held."""
        waits: dict[int, TraceRecord] = {}
        for record in records:
            name = record.event.name
            if name == "req_alloc":
                waits[record.values[2]] = record
            elif name == "req_complete" and record.values[2] in waits:
                waiter = lifeline_of(waits[record.values[2]])
                what = name_of(record.event.fields[0], record.values[0])
                text = f"answer to {what}: wakes who waits"
                yield Row(Kind.SENDS, text, record.t_ns, lifeline_of(record), waiter, record.t_ns, 2)

    # -- one actor's own -----------------------------------------------------------------------------

    def _own(self, record: TraceRecord) -> Iterator[Row]:
        name, actor, values = record.event.name, lifeline_of(record), record.arguments
        if name == "point":
            yield self._at_point(record)
        elif name == "rescind" and not is_host(record):
            found = f"claims the channel of relid {values['relid']}"
            lost = f"finds no channel of relid {values['relid']}, and drops the rescind"
            yield Row(Kind.DOES, found if values["generation"] else lost, record.t_ns, actor, weight=1)
        elif name == "eom" and Family.SLOT in self._families:
            to = self._processor(values["position"])
            yield Row(Kind.SENDS, "EOM: the slot is free", record.t_ns, to, HOST, record.t_ns, 1)
        elif name == "flag_set" and Family.RING in self._families:
            again = ", which was set already" if values["was_set"] else ""
            to = self._processor(values["position"])
            yield Row(Kind.SENDS, f"event flag {values['flag']}{again}", record.t_ns, HOST, to, record.t_ns, 1)
        elif name == "signal" and Family.RING in self._families and not is_host(record):
            yield Row(Kind.SENDS, f"signals relid {values['relid']}", record.t_ns, actor, HOST, record.t_ns, 1)
        elif name == "tasklet_run" and values["tasklet"] != Tasklets.VMBUS_ON_MSG_DPC and Family.RING in self._families:
            yield Row(Kind.DOES, _tasklet_text(record), record.t_ns, actor, weight=3)
        elif name == "isr_enter" and values["vector"] != HYPERVISOR_CALLBACK_VECTOR:
            return
        elif (telling := TELLINGS.get(name)) is not None:
            yield from self._told(record, telling)

    def _told(self, record: TraceRecord, telling: Telling) -> Iterator[Row]:
        sentence = telling.host if is_host(record) else telling.guest
        if not sentence or (telling.family is not None and telling.family not in self._families):
            return
        pairs = record.event.pairs(record.values)
        words = {one.name: name_of(one, value) or one.show(value) for one, value in pairs}
        words = {name: _WORDS.get(word, word) for name, word in words.items()}
        if "ret" in words:
            words["ret"] = "it went well" if words["ret"] == "0" else f"errno {words['ret']}"
        yield Row(Kind.DOES, sentence.format_map(words), record.t_ns, lifeline_of(record), weight=telling.weight)

    def _at_point(self, record: TraceRecord) -> Row:
        number, action = record.values[:2]
        point = next((one for one in Point if one == number), None)
        name, where = (point.text, point.where) if point is not None else (f"point {number}", "")
        if action == PointAction.HELD:
            return Row(Kind.HELD, f"held at {name}: {where}", record.t_ns, lifeline_of(record))
        return Row(Kind.GOES_ON, f"goes on from {name}", record.t_ns, lifeline_of(record))


def _is_processor(record: TraceRecord) -> bool:
    return record.actor.kind == ActorKind.VCPU.name


def _name(flow: Flow) -> str:
    return f"{flow.name} of relid {flow.relid}" if flow.relid else flow.name


def _tasklet_text(record: TraceRecord) -> str:
    name = name_of(record.event.fields[0], record.values[0]).lower()
    return f"runs tasklet {name} of relid {record.values[1]}"


# -- order, and how much ---------------------------------------------------------------------------------


def told_order(rows: Iterable[Row]) -> list[Row]:
    """An order that depends on causes alone: steps divide, each lifeline keeps its own order, and between rows that no
    lifeline binds the one goes first that goes on where the last one ended, then the leftmost by name and words.
    """
    by_time = sorted(rows, key=lambda row: row.at_ns)
    steps = [row for row in by_time if row.kind is Kind.STEP]
    parts: list[list[Row]] = [[] for _ in range(len(steps) + 1)]
    for row in by_time:
        if row.kind is not Kind.STEP:
            parts[sum(step.t_ns <= row.at_ns for step in steps)].append(row)
    ordered = _part_in_order(parts[0])
    for step, part in zip(steps, parts[1:], strict=True):
        ordered += [step, *_part_in_order(part)]
    return ordered


def _part_in_order(rows: Sequence[Row]) -> list[Row]:
    left, ordered, last = list(rows), [], ""
    while left:
        free = [row for row in left if _first_everywhere(row, left)]
        # Two messages that cross on the way are both second somewhere.
        chosen = min(free or left[:1], key=lambda row: (row.actor != last, row.actor != HOST, row.actor, row.text))
        left.remove(chosen)
        ordered.append(chosen)
        last = chosen.to if chosen.kind is Kind.SENDS else chosen.actor
    return ordered


def _first_everywhere(row: Row, left: Iterable[Row]) -> bool:
    """Whether no other row is on one of its lifelines before it."""
    mine = dict(row.touches())
    return not any(
        at < mine[name] for other in left if other is not row for name, at in other.touches() if name in mine
    )


def folded(rows: Iterable[Row]) -> list[Row]:
    """Rows that repeat the one before them are counted there."""
    result: list[Row] = []
    for row in rows:
        before = result[-1] if result else None
        alike = before is not None and (before.kind, before.actor, before.to, before.text) == (
            row.kind, row.actor, row.to, row.text,
        )  # fmt: skip
        if before is not None and alike and row.kind is not Kind.STEP:
            result[-1] = replace(before, count=before.count + row.count)
        else:
            result.append(row)
    return result


def cut(rows: Sequence[Row], most: int = MOST_ROWS) -> list[Row]:
    """At most so many rows: the least telling go first; then the earliest, as a race is at the end of its schedule.

    Steps and points stay whatever there are of them.
    """
    kept = list(rows)
    for weight in (3, 2):
        if len(kept) > most:
            kept = folded(row for row in kept if row.weight < weight)
    return _without_earliest(kept, len(kept) - most + 1) if len(kept) > most else kept


def _without_earliest(rows: Sequence[Row], count: int) -> list[Row]:
    """The earliest rows that have a weight give way to one that says how many they were."""
    going = [number for number, row in enumerate(rows) if row.weight][:count]
    if not going:
        return list(rows)
    first, gone = rows[going[0]], set(going)
    things = sum(rows[number].count for number in going)
    said = Row(Kind.LEFT_OUT, f"… {counted(things, 'thing')} more …", first.t_ns)
    return [said if number == going[0] else row for number, row in enumerate(rows) if number not in gone - {going[0]}]
