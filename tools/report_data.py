"""What the report's page is made of: one recording as plain values, small enough to be carried in a page.

    meta        which machine, when, how many records of what, what is missing
    topology    channels with their class, VP and connection; processors; threads that recorded
    flows       every message as its steps (`tools.flows`), as far as the page has room; the rest is counted
    stages      percentiles of each stage of a round trip (`tools.latency_stages`)
    activity    records of each process over time, and the share of time in which it was not halted
    findings    which invariants are broken (`tools.check`), what was refused, lost, left unfinished, or is owed

Times are nanoseconds from the first record on. The recording is read once for each of them that needs it, so that a
long one takes time and not memory.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from emu.recording import RecordedActor, Recording, TraceRecord
from emu.wire.device_classes import class_of
from tools.check import run_of, told_of, verdicts_of
from tools.debts import debts_of
from tools.event_names import name_of
from tools.flows import PATH, Flow, Flows, flows_in
from tools.histograms import nearest_rank
from tools.invariants import Verdict, is_host, missing_of
from tools.invariants_messages import is_in_good_faith
from tools.latency_stages import Step, stages_of
from tools.nouns import counted, noun

BUCKETS: Final = 240
FLOW_BYTES: Final = 1_000_000
"""How much of the page messages may take, deflated; those behind it are counted."""
MOST_FLOWS: Final = 10_000
MOST_FINDINGS: Final = 200
MOST_CHANNELS: Final = 2_048
PERCENTILES: Final = (50.0, 90.0, 99.0, 99.9)
CURVE: Final = (0, 1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99, 99.5, 99.9, 100)
"""Where the curve of a stage's distribution is looked at, in percent."""


def report_of(recording: Recording) -> dict[str, Any]:
    """Everything the page shows, as JSON has it."""
    seen = _Seen()
    for record in recording.records():
        seen.take(record)
    flows = flows_in(recording)
    verdicts = verdicts_of(recording)
    return {
        "meta": _meta(recording, seen),
        "topology": seen.topology(recording.head.get("vp_indices", [])),
        "roles": sorted({str(step.role) for flow in flows for step in flow.steps}),
        "path": sorted(map(str, PATH)),
        "flows": _flows(flows, seen, FLOW_BYTES),
        "stages": _stages(recording),
        "activity": _activity(recording, seen),
        "findings": findings_of(recording, seen, flows, verdicts),
        "invariants": {
            "held": sum(not one.count and not one.undecided for one in verdicts),
            "broken": sum(one.count > 0 for one in verdicts),
            "undecided": [f"{one.name}: {one.undecided}" for one in verdicts if one.undecided],
        },
    }


# -- once through ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Channel:
    """What the records say of one relid, as it was last."""

    relid: int
    class_name: str = "unknown"
    connection_id: int = 0
    sub_channel_index: int = 0
    target_vp: int | None = None
    driver: int | None = None
    was_open: bool = False
    gone: bool = False

    def shown(self) -> dict[str, Any]:
        """As JSON has it."""
        states = [word for word, true in (("opened", self.was_open), ("released", self.gone)) if true]
        return {
            "relid": self.relid,
            "class": self.class_name,
            "connection": hex(self.connection_id),
            "sub": self.sub_channel_index,
            "vp": self.target_vp,
            "state": ", ".join(states) or "offered",
            "opened": self.was_open,
        }


class _Seen:
    """What is gathered in one walk over all records."""

    def __init__(self) -> None:
        self.first_ns = self.last_ns = 0
        self.count = 0
        self.actors: dict[int, RecordedActor] = {}
        self.by_event: Counter[str] = Counter()
        self.refused: Counter[tuple[str, str]] = Counter()
        """By who refused, and the rule: what a recording has of that and is somebody's fault (as in INV-30)."""
        self.marks: list[tuple[int, str]] = []
        self._channels: dict[int, _Channel] = {}

    def take(self, record: TraceRecord) -> None:
        """Look at one record."""
        if not self.count:
            self.first_ns = record.t_ns
        self.last_ns = record.t_ns
        self.count += 1
        self.actors.setdefault(record.actor.slot, record.actor)
        name = record.event.name
        self.by_event[name] += 1
        handler = _HANDLERS.get(name)
        if handler is not None:
            handler(self, record.shown, record)

    def channel(self, relid: int) -> _Channel:
        """What is known of a relid."""
        return self._channels.setdefault(relid, _Channel(relid))

    def topology(self, vp_indices: Sequence[int]) -> dict[str, Any]:
        """Processors, threads, channels."""
        return {
            "vps": [{"vp": vp, "position": position} for position, vp in enumerate(vp_indices)],
            "actors": [
                {"slot": one.slot, "name": one.name, "kind": one.kind.lower(), "pid": one.pid, "cpu": one.cpu}
                for one in self.actors.values()
            ],
            "channels": [one.shown() for _, one in sorted(self._channels.items())][:MOST_CHANNELS],
        }

    def _onoffer(self, shown: Mapping[str, Any], _record: TraceRecord) -> None:
        # A relid that is offered again is another channel's.
        relid = shown["child_relid"]
        if self.channel(relid).gone:
            self._channels[relid] = _Channel(relid)
        known = class_of(_uuid(shown.get("if_type")))
        channel = self.channel(relid)
        channel.class_name = known.name if known is not None else "unknown"
        channel.connection_id = shown.get("connection_id", 0)
        channel.sub_channel_index = shown.get("sub_idx", 0)

    def _offered(self, shown: Mapping[str, Any], _record: TraceRecord) -> None:
        channel = self.channel(shown["relid"])
        channel.connection_id = shown.get("connection_id", 0)
        channel.sub_channel_index = shown.get("sub_channel_index", 0)

    def _target(self, shown: Mapping[str, Any], _record: TraceRecord) -> None:
        self.channel(shown["relid"]).target_vp = shown["target_vp"]

    def _open_sent(self, shown: Mapping[str, Any], _record: TraceRecord) -> None:
        self.channel(shown["child_relid"]).target_vp = shown["target_vp"]

    def _opened(self, shown: Mapping[str, Any], _record: TraceRecord) -> None:
        self.channel(shown["relid"]).was_open |= shown.get("ret", 0) == 0

    def _gone(self, shown: Mapping[str, Any], _record: TraceRecord) -> None:
        self.channel(shown["relid"]).gone = True

    def _refused(self, shown: Mapping[str, Any], record: TraceRecord) -> None:
        if not is_in_good_faith(rule := str(shown["rule"])):
            self.refused["the host" if is_host(record) else "the guest", rule] += 1

    def _marked(self, shown: Mapping[str, Any], record: TraceRecord) -> None:
        self.marks.append((record.t_ns, str(shown["text"])))


_HANDLERS: Final = {
    "offer": _Seen._offered,
    "vmbus_onoffer": _Seen._onoffer,
    "target_change": _Seen._target,
    "vmbus_open": _Seen._open_sent,
    "open": _Seen._opened,
    "release": _Seen._gone,
    "refused": _Seen._refused,
    "mark": _Seen._marked,
}


def _uuid(text: object) -> Any:
    from uuid import UUID

    try:
        return UUID(str(text))
    except ValueError:
        return UUID(int=0)


def _meta(recording: Recording, seen: _Seen) -> dict[str, Any]:
    head = recording.head
    return {
        "machine": head.get("machine", ""),
        "seconds": (seen.last_ns - seen.first_ns) / 1e9,
        "records": seen.count,
        "dropped": recording.dropped,
        "damage": recording.damage,
        "events": dict(seen.by_event.most_common()),
    }


# -- messages ----------------------------------------------------------------------------------------------


def _flows(flows: Flows, seen: _Seen, room: int) -> dict[str, Any]:
    """As many messages as there is room for, in the order of their posts; each step a short list.

    A step: role, ns since the first record, actor's slot, context, event, what it says.
    """
    shown: list[dict[str, Any]] = []
    deflate = zlib.compressobj()
    used = 0
    for flow in flows:
        one = _flow(flow, seen)
        used += len(deflate.compress(json.dumps(one, separators=(",", ":")).encode()))
        if used > room or len(shown) == MOST_FLOWS:
            break
        shown.append(one)
    return {"shown": shown, "left_out": len(flows) - len(shown)}


def _flow(flow: Flow, seen: _Seen) -> dict[str, Any]:
    return {
        "id": flow.id,
        "name": flow.name,
        "to_guest": flow.to_guest,
        "relid": flow.relid,
        "cause": flow.cause,
        "answers": flow.answers,
        "ended": flow.ended,
        "steps": [
            [
                str(step.role),
                step.record.t_ns - seen.first_ns,
                step.record.actor.slot,
                step.record.context.lower(),
                step.record.event.name,
                _said(step.record),
            ]
            for step in flow.steps
        ],
    }


def _said(record: TraceRecord) -> str:
    """The arguments of a record in a line; a number that has a name is that name."""
    words = []
    for spec, value in zip(record.event.fields, record.values, strict=False):
        words.append(f"{spec.name}={name_of(spec, value) or spec.show(value)}")
    return " ".join(words)


# -- figures -------------------------------------------------------------------------------------------------


def _stages(recording: Recording) -> list[dict[str, Any]]:
    """Percentiles of every stage that has a sample, in ns."""
    positions = {vp: position for position, vp in enumerate(recording.head.get("vp_indices", ()))}
    steps = (
        Step(one.t_ns, one.event.number, one.values, positions.get(-1 if one.vp is None else one.vp, -1))
        for one in recording.records()
    )
    return [stage_of(name, samples) for name, samples in stages_of(steps).all().items()]


def stage_of(name: str, samples: Iterable[int]) -> dict[str, Any]:
    """Count, percentiles and the curve of the distribution."""
    ordered = sorted(samples)
    return {
        "name": name,
        "count": len(ordered),
        **{f"p{percent:g}": at_percent(ordered, percent) for percent in PERCENTILES},
        "max": ordered[-1],
        "curve": [at_percent(ordered, percent) for percent in CURVE],
    }


def at_percent(ordered: Sequence[int], percent: float) -> int:
    """The value that so many percent of the samples do not exceed (the nearest rank)."""
    return ordered[nearest_rank(len(ordered), percent) - 1]


class Halts:
    """How long an actor was halted in each of the equal pieces of a time of `length` ns."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._halted = [0] * BUCKETS
        self._since: int | None = None
        self.count = 0

    def begin(self, at: int) -> None:
        """It halts."""
        self._since = at
        self.count += 1

    def end(self, at: int) -> None:
        """It goes on, or the time is over; nothing when it was not halted."""
        since, self._since = self._since, None
        while since is not None and since < at:
            bucket = since * BUCKETS // self._length
            until = min(at, self._begin_of(bucket + 1))
            self._halted[bucket] += until - since
            since = until

    def busy(self) -> list[float]:
        """Percent of each piece in which it was not halted."""
        # By its own width in whole nanoseconds: or a piece of a short time, halted throughout, would not be idle.
        widths = [self._begin_of(number + 1) - self._begin_of(number) for number in range(BUCKETS)]
        shares = [1 - ns / width if width else 1.0 for ns, width in zip(self._halted, widths, strict=True)]
        return [round(100 * min(1.0, max(0.0, share)), 1) for share in shares]

    def _begin_of(self, bucket: int) -> int:
        """The first nanosecond of a piece."""
        return -(-bucket * self._length // BUCKETS)


def _activity(recording: Recording, seen: _Seen) -> dict[str, Any]:
    """Records and the share of time not halted, of each process, in equal pieces of the recording's time."""
    length = max(1, seen.last_ns - seen.first_ns + 1)
    counts = {slot: [0] * BUCKETS for slot in seen.actors}
    halts = {slot: Halts(length) for slot in seen.actors}
    for record in recording.records():
        slot, at = record.actor.slot, record.t_ns - seen.first_ns
        counts[slot][at * BUCKETS // length] += 1
        if record.event.name == "halt":
            halts[slot].begin(at)
        elif record.event.name == "halt_end":
            halts[slot].end(at)
    for one in halts.values():
        one.end(length)
    return {
        "bucket_ns": length / BUCKETS,
        "actors": [
            {
                "slot": slot,
                "name": seen.actors[slot].name,
                "records": counts[slot],
                "busy": halts[slot].busy() if halts[slot].count else None,
            }
            for slot in counts
        ],
    }


# -- findings ------------------------------------------------------------------------------------------------


def findings_of(recording: Recording, seen: _Seen, flows: Flows, verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """What somebody should look at, the gravest first: each a kind, a sentence, and the messages that show it."""
    found: list[dict[str, Any]] = []
    for verdict in verdicts:
        for one in verdict.violations:
            ids = dict.fromkeys(filter(None, map(flows.of_record, one.records)))
            found.append(_finding(one.name, f"{one.text} ({verdict.rule.TITLE})", list(ids)))
    for name, text in told_of(verdicts, run_of(recording)):
        found.append(_finding(name, f"{text} (found in the machine itself, at the end of its run)"))
    if recording.flight:
        found.append(_finding("flight", f"a flight recorder wrote it: {recording.flight}"))
    if recording.damage:
        found.append(_finding("damage", f"the file is damaged: {recording.damage}"))
    if recording.dropped:
        told = counted(recording.dropped, "record was overwritten before it", "records were overwritten before they")
        found.append(_finding("dropped", f"{told} {noun(recording.dropped, 'was', 'were')} written"))
    found += [_finding("mark", text) for _at, text in seen.marks]
    for (who, rule), count in seen.refused.items():
        found.append(_finding("refused", f"{who} refused: {rule}, {counted(count, 'time')}"))
    open_ends = [flow for flow in flows if not flow.ended]
    if open_ends and not missing_of(recording):
        names = Counter(flow.name for flow in open_ends)
        which = ", ".join(f"{count} {name}" for name, count in names.most_common(5))
        shown_in = [flow.id for flow in open_ends]
        lost = counted(len(open_ends), "message did not come to its end", "messages did not come to their end")
        found.append(_finding("unfinished", f"{lost}: {which}", shown_in))
    if not missing_of(recording):
        found += [_finding("owed", debt.text, debt.messages) for debt in debts_of(list(recording.records()), flows)]
    if more := len(found[MOST_FINDINGS:]):
        left_out = counted(more, "more is", "more are")
        found[MOST_FINDINGS:] = [_finding("more", f"{left_out} not shown; `vmbus-emu check --json` lists violations")]
    return found


def _finding(kind: str, text: str, flows: Sequence[str] = ()) -> dict[str, Any]:
    return {"kind": kind, "text": text, "flows": list(flows)[:20]}
