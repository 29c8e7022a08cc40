"""What a recording leaves owed: who owes whom what, and since when.

A debt is read off the records alone: a message that stopped on its way, work that has not begun or not ended, an answer
to a message or a packet that has not come, room in a ring, a look at bytes in one, a mutex. An answer for which nobody
waits any more, since the time for it was over, stays owed; its sentence says that its asker gave up. A guest that is
gone is owed nothing, and owes nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from emu.control import ActorKind
from emu.recording import TraceRecord
from emu.tracing import Side, WaitedFor
from emu.wire.messages import MessageType
from tools.event_names import name_of
from tools.flows import Flow, Flows, Role
from tools.invariants import is_host

ANSWERS: Final = {
    MessageType.INITIATE_CONTACT: MessageType.VERSION_RESPONSE,
    MessageType.REQUESTOFFERS: MessageType.ALLOFFERS_DELIVERED,
    MessageType.UNLOAD: MessageType.UNLOAD_RESPONSE,
}
"""What a guest asks for its connection, and how it is answered: also of a guest that records no request of its own."""


@dataclass(frozen=True, slots=True)
class Debt:
    """Something that has not happened: who owes it, to whom, what, since when.

    `now_ns` is the end of the recording; or when the asker gave up, if it has. `messages` are the ids of the messages
    that it is about, the first one first.
    """

    who: str
    whom: str
    what: str
    since_ns: int
    now_ns: int
    relid: int = 0
    messages: tuple[str, ...] = ()
    given_up: bool = False

    @property
    def text(self) -> str:
        """In one sentence."""
        length = f"{(self.now_ns - self.since_ns) / 1e6:,.3f} ms"
        if self.given_up:
            return f"{self.who} never gave {self.whom} {self.what}, for {length}; then {self.whom} gave up"
        return f"{self.who} owes {self.whom} {self.what}, for {length} now"

    def report(self) -> dict[str, Any]:
        """As an object."""
        return {
            "who": self.who,
            "whom": self.whom,
            "what": self.what,
            "since_ns": self.since_ns,
            "for_ns": self.now_ns - self.since_ns,
            "given_up": self.given_up,
            "relid": self.relid,
            "message": self.messages[0] if self.messages else "",
        }


def debts_of(records: Sequence[TraceRecord], flows: Flows) -> list[Debt]:
    """Everything that is owed when the records end, the oldest first."""
    if not records:
        return []
    now_ns = records[-1].t_ns
    found = [debt for flow in flows for debt in (_debt_of_flow(flow, now_ns), _debt_of_work(flow, now_ns)) if debt]
    requests = _Requests(flows)
    for record in records:
        requests.take(record)
    found += requests.debts(now_ns)
    found += _debts_of_connection(records, flows, {one for debt in found for one in debt.messages}, now_ns)
    found += _debts_of_rescinds(records, now_ns)
    found += _debts_of_writers(records, now_ns)
    found += _debts_of_readers(records, now_ns)
    found += _debts_of_holders(records, now_ns)
    found += _debts_of_devices(records, now_ns)
    return sorted(found, key=lambda debt: debt.since_ns)


def _debt_of_flow(flow: Flow, now_ns: int) -> Debt | None:
    """Where a message has stopped on its way into the guest; its work may wait beside that."""
    if flow.ended:
        return None
    last = {step.role: step.record for step in flow.steps}
    posted = flow.steps[0].record
    if not flow.to_guest:
        if Role.RECEIVED not in last or Role.HOST_TAKE in last:
            return None
        received = last[Role.RECEIVED]
        what = f"the handling of {flow.name} ({flow.id})"
        # Of somebody else's guest the host alone records what it posts.
        whom = "the guest" if is_host(posted) else posted.actor.name
        return Debt("hypervisor", whom, what, received.t_ns, now_ns, flow.relid, (flow.id,))
    if Role.SLOT_WRITE not in last:
        what = f"the delivery of {flow.name} ({flow.id}): its slot was never free"
        return Debt("hypervisor", f"VP page {flow.position}", what, posted.t_ns, now_ns, flow.relid, (flow.id,))
    if Role.DPC not in last:
        what = f"a look at {flow.name} ({flow.id}) in its slot"
        since = last[Role.SLOT_WRITE]
        return Debt(f"VP page {flow.position}", "hypervisor", what, since.t_ns, now_ns, flow.relid, (flow.id,))
    if Role.SLOT_FREE not in last:
        what = f"the end of message {flow.name} ({flow.id})"
        since = last[Role.DPC]
        return Debt(since.actor.name, "hypervisor", what, since.t_ns, now_ns, flow.relid, (flow.id,))
    return None


def _debt_of_work(flow: Flow, now_ns: int) -> Debt | None:
    """Work of a message that has not begun, or not ended."""
    if flow.ended:
        return None
    counts = Counter(step.role for step in flow.steps)
    last = {step.role: step.record for step in flow.steps}
    if counts[Role.WORK_QUEUED] > counts[Role.WORK_RUN]:
        queued = last[Role.WORK_QUEUED]
        queue = name_of(queued.event.fields[0], queued.values[0]).lower()
        what = f"the work of {flow.name} ({flow.id})"
        return Debt(f"kworker/{queue}", queued.actor.name, what, queued.t_ns, now_ns, flow.relid, (flow.id,))
    if counts[Role.WORK_RUN] > counts[Role.WORK_DONE]:
        running = last[Role.WORK_RUN]
        what = f"the end of the work of {flow.name} ({flow.id})"
        return Debt(running.actor.name, "its queue", what, running.t_ns, now_ns, flow.relid, (flow.id,))
    return None


@dataclass(slots=True)
class _Request:
    """A guest's thread that waits for an answer: since when, by which messages, whether the answer is there."""

    asked: TraceRecord
    messages: list[str]
    posted: bool = False
    completed: bool = False

    def debt(self, now_ns: int, *, given_up: bool = False) -> Debt:
        msgtype, key, _request, relid = (*self.asked.values, 0)[:4]
        name = MessageType(msgtype).name if msgtype in set(MessageType) else f"msgtype {msgtype}"
        what = f"the answer to {name} ({f'relid {relid}, ' if relid else ''}key {key:#x})"
        whom, since_ns = self.asked.actor.name, self.asked.t_ns
        return Debt("the host", whom, what, since_ns, now_ns, relid, tuple(self.messages), given_up)


class _Requests:
    """Requests that nobody has answered, or nobody before who asked gave up.

    A rescind is an answer, too; and to what could not be posted nobody owes any.
    """

    def __init__(self, flows: Flows) -> None:
        self._flows = flows
        self._waiting: dict[int, _Request] = {}
        self._asking: dict[int, _Request] = {}  # by actor: what it asks now
        self._rescinded: set[int] = set()
        self._given_up: list[Debt] = []

    def take(self, record: TraceRecord) -> None:
        """The next record, by time."""
        match record.event.name:
            case "req_alloc":
                request = _Request(record, [])
                self._waiting[record.values[2]] = self._asking[record.actor.slot] = request
            case "req_complete" if record.values[2] in self._waiting:
                self._waiting[record.values[2]].completed = True
            case "req_free":
                self._leave(record)
            case "post_begin" | "post" if not is_host(record) and record.actor.slot in self._asking:
                self._post(record, self._asking[record.actor.slot])
            case "rescind" if not is_host(record):
                self._rescinded.add(record.values[0])
            case "offer" if not is_host(record):
                self._rescinded.discard(record.values[0])
            case "reset":
                self._waiting.clear()
                self._asking.clear()
                self._rescinded.clear()

    def _post(self, record: TraceRecord, request: _Request) -> None:
        if record.event.name == "post_begin":
            request.messages += [one for one in [self._flows.of_record(record)] if one]
        elif not record.values[3]:
            request.posted = True

    def _leave(self, record: TraceRecord) -> None:
        request = self._waiting.pop(record.values[2], None)
        if self._asking.get(record.actor.slot) is request:
            self._asking.pop(record.actor.slot, None)
        if request is None or request.completed or not request.posted:
            return
        debt = request.debt(record.t_ns, given_up=True)
        if debt.relid not in self._rescinded:
            self._given_up.append(debt)

    def debts(self, now_ns: int) -> list[Debt]:
        """What is owed when the records end."""
        waiting = [one.debt(now_ns) for one in self._waiting.values() if not one.completed]
        return self._given_up + waiting


def _debts_of_connection(records: Iterable[TraceRecord], flows: Flows, known: set[str], now_ns: int) -> list[Debt]:
    """What the guest asked for its connection, and the host took and did not answer; but what is `known`."""
    asked: dict[int, Flow] = {}
    taken: dict[int, TraceRecord] = {}
    for record in records:
        name, msgtype = record.event.name, record.values[0] if record.values else 0
        if name == "message_take" and msgtype in ANSWERS:
            if msgtype != MessageType.REQUESTOFFERS:
                # It begins or ends the connection: nothing that was asked before is answered any more.
                asked.clear()
            if (flow := flows.get(flows.of_record(record))) is not None:
                asked[msgtype], taken[msgtype] = flow, record
        elif name == "message_post":
            for one in [one for one in asked if ANSWERS[MessageType(one)] == record.values[2]]:
                del asked[one]
        elif name == "reset":
            asked.clear()
    debts = []
    for msgtype, flow in asked.items():
        if flow.id in known:
            continue
        posted = flow.steps[0].record
        whom = "the guest" if is_host(posted) else posted.actor.name
        debts.append(
            Debt("the host", whom, f"the answer to {flow.name}", taken[msgtype].t_ns, now_ns, messages=(flow.id,))
        )
    return debts


def _debts_of_rescinds(records: Iterable[TraceRecord], now_ns: int) -> list[Debt]:
    """Relids that were taken back and not given up."""
    rescinded: dict[int, TraceRecord] = {}
    for record in records:
        name = record.event.name
        if name == "rescind" and is_host(record):
            rescinded[record.values[0]] = record
        elif name == "message_take" and record.values[0] in (
            MessageType.RELID_RELEASED, MessageType.UNLOAD, MessageType.INITIATE_CONTACT,
        ):  # fmt: skip
            if record.values[0] == MessageType.RELID_RELEASED:
                rescinded.pop(record.values[3], None)
            else:
                rescinded.clear()
        elif name == "reset":
            rescinded.clear()
    return [
        Debt("the guest", "the host", f"RELID_RELEASED of relid {relid}", record.t_ns, now_ns, relid)
        for relid, record in rescinded.items()
    ]


def _debts_of_writers(records: Iterable[TraceRecord], now_ns: int) -> list[Debt]:
    """Writers that wait for room in a ring."""
    wishes: dict[tuple[int, int], TraceRecord] = {}
    for record in records:
        name = record.event.name
        if name == "pending_size":
            wishes[record.values[0], record.values[1]] = record
        elif name == "close" or (name == "rescind" and not is_host(record)):
            for side in (0, 1):
                wishes.pop((record.values[0], side), None)
        elif name == "reset":
            wishes.clear()
    return [
        Debt(
            "the reader",
            record.actor.name,
            f"{record.values[2]} bytes of room in a ring of relid {relid}",
            record.t_ns,
            now_ns,
            relid,
        )
        for (relid, _side), record in wishes.items()
        if record.values[2]
    ]


class _Unread:
    """What was published in one ring and not released: each publish with the bytes of it that are left.

    `size`: bytes of its data area; 0 as long as the recording has not told, which one that begins late never does.
    """

    def __init__(self) -> None:
        self.size = 0
        self.publishes: deque[tuple[TraceRecord, int]] = deque()
        self.bytes = 0

    def publish(self, record: TraceRecord, nbytes: int) -> None:
        """So many bytes more."""
        self.publishes.append((record, nbytes))
        self.bytes += nbytes

    def release(self, read_index: int, freed: int) -> None:
        """The reader has come to this index, by so many bytes."""
        if not self.publishes:
            return
        last = self.publishes[-1][0].values[2]
        if read_index == last:
            left = 0
        elif self.size:
            # By the indices: what is missing in the recording does no harm then.
            left = (last - read_index) % self.size
        else:
            left = self.bytes - freed
        while self.publishes and self.bytes > left:
            record, nbytes = self.publishes.popleft()
            rest = max(0, nbytes - (self.bytes - left))
            self.bytes -= nbytes - rest
            if rest:
                self.publishes.appendleft((record, rest))


def _debts_of_readers(records: Iterable[TraceRecord], now_ns: int) -> list[Debt]:
    """Bytes of a ring that its reader has not released, whoever sent them: since the oldest publish that is left.

    A guest that records nothing (a foreign one) releases unseen: nobody can say then what it has read.
    """
    rings: defaultdict[tuple[int, int], _Unread] = defaultdict(_Unread)
    guest_records = False
    for record in records:
        name = record.event.name
        guest_records = guest_records or record.actor.kind == ActorKind.VCPU.name
        if name == "ring_attach":
            rings[record.values[0], record.values[1]].size = record.values[2]
        elif name == "ring_publish":
            rings[record.values[0], record.values[1]].publish(record, record.values[3])
        elif name == "ring_release":
            rings[record.values[0], record.values[1]].release(*record.values[2:4])
        elif name == "close" or (name == "rescind" and not is_host(record)):
            # Its rings are given back, whatever is in them.
            for which in Side:
                rings.pop((record.values[0], which), None)
        elif name == "reset":
            rings.clear()
    debts = []
    for (relid, side), ring in rings.items():
        if not ring.publishes or (side == Side.TO_GUEST and not guest_records):
            continue
        oldest, _left = ring.publishes[0]
        who = "the host" if side == Side.TO_HOST else "the guest"
        what = f"a look at {ring.bytes:,} bytes of relid {relid}"
        debts.append(Debt(who, oldest.actor.name, what, oldest.t_ns, now_ns, relid))
    return debts


def _debts_of_devices(records: Iterable[TraceRecord], now_ns: int) -> list[Debt]:
    """Packets of a program that measures round trips, which a device has not answered; it answers in their order.

    Of other programs no packet is recorded: only that bytes of theirs are unread (`_debts_of_readers`).
    """
    waiting: dict[tuple[int, str], deque[TraceRecord]] = {}
    debts = []

    def owe(relid: int, whom: str, packets: deque[TraceRecord], until_ns: int, *, given_up: bool) -> None:
        if packets:
            what = f"the answer to {len(packets)} packet{'s' if len(packets) > 1 else ''}"
            since_ns = packets[0].t_ns
            debts.append(Debt(f"the device of relid {relid}", whom, what, since_ns, until_ns, relid, given_up=given_up))

    for record in records:
        name, relid = record.event.name, record.values[0] if record.values else 0
        if name == "request_start":
            waiting.setdefault((relid, record.actor.name), deque()).append(record)
        elif name == "request_end" and (packets := waiting.get((relid, record.actor.name))):
            for _ in range(min(record.values[2], len(packets))):
                packets.popleft()
        elif name == "close":
            for key in [key for key in waiting if key[0] == relid]:
                owe(*key, waiting.pop(key), record.t_ns, given_up=True)
        elif name == "reset":
            waiting.clear()
    for key, packets in waiting.items():
        owe(*key, packets, now_ns, given_up=False)
    return debts


def _debts_of_holders(records: Iterable[TraceRecord], now_ns: int) -> list[Debt]:
    """Mutexes that somebody sleeps for."""
    holders: dict[int, TraceRecord] = {}
    waits: dict[int, TraceRecord] = {}
    for record in records:
        name = record.event.name
        if name == "lock":
            holders[record.values[0]] = record
        elif name == "unlock":
            holders.pop(record.values[0], None)
        elif name == "wait" and record.values[0] == WaitedFor.MUTEX:
            waits[record.actor.slot] = record
        elif name == "wait_done":
            waits.pop(record.actor.slot, None)
        elif name == "reset":
            holders.clear()
            waits.clear()
    return [
        Debt(holders[object_].actor.name, record.actor.name, str(record.shown["name"]), record.t_ns, now_ns)
        for record in waits.values()
        if (object_ := record.values[1]) in holders
    ]
