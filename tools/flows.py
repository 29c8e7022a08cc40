"""The flow of each message in a recording: every record that the message led to, from its post to its last effect.

A message of the host's is told by its serial, which the host counts and writes beside the slot (position and SINT), so
the messages of a foreign guest flow as far as the host sees them. A message of the guest's is told by the number that
the host gives each post; who posted it is who exited, so the guest's own records join it.

    host to guest   posted, (slot_busy), slot_write, irq, kick, isr, dpc, handler …, slot_free, (eom)
                    and where it sleeps: work_queued, work_run, handler, work_queued, work_run, probe_start …, work_done
    guest to host   posted, received, post_done, host_take, host_effect …, answer …, host_done

`flows_of` reads the records once, in the order of time. A step that was not recorded (it was overwritten, or the
guest is foreign) is left out; nothing is guessed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from emu.control import slot_of
from emu.recording import Recording, TraceRecord
from emu.wire.messages import MessageType
from emu.wire.synic import HVMSG_CHANNEL_MESSAGE, HYPERVISOR_CALLBACK_VECTOR
from guestproc.protocol.numbers import Tasklets


class Role(StrEnum):
    """What a record is in a message's flow."""

    POSTED = "posted"
    SLOT_BUSY = "slot_busy"
    SLOT_WRITE = "slot_write"
    IRQ = "irq"
    KICK = "kick"
    ISR = "isr"
    TASKLET_SCHED = "tasklet_sched"
    DPC = "dpc"
    SLOT_FREE = "slot_free"
    EOM = "eom"
    WORK_QUEUED = "work_queued"
    WORK_RUN = "work_run"
    WORK_DONE = "work_done"
    HANDLER = "handler"
    COMPLETES = "completes"
    PROBE_START = "probe_start"
    PROBE = "probe"
    EFFECT = "effect"
    RECEIVED = "received"
    REFUSED = "refused"
    POST_DONE = "post_done"
    HOST_TAKE = "host_take"
    HOST_EFFECT = "host_effect"
    ANSWER = "answer"
    HOST_DONE = "host_done"
    TAKEN = "taken"
    """Somebody who does not record took it out: the host found its slot empty for the next one."""
    DROPPED = "dropped"
    """The guest is gone: whatever was on its way to it, or from it, goes nowhere."""


PATH: Final = frozenset(
    {
        Role.POSTED,
        Role.SLOT_WRITE,
        Role.IRQ,
        Role.ISR,
        Role.DPC,
        Role.WORK_QUEUED,
        Role.WORK_RUN,
        Role.PROBE_START,
        Role.RECEIVED,
        Role.HOST_TAKE,
        Role.ANSWER,
    }
)
"""Roles at which a message moves on: what an arrow is drawn between."""


@dataclass(frozen=True, slots=True)
class Step:
    """One record of a flow, and what it is there."""

    role: Role
    record: TraceRecord


@dataclass(slots=True)
class Flow:
    """One message. `id` is `h` or `g` (host's, guest's) and its serial; `g?N` where no record of the host tells it.

    `position` and `sint` say into which slot it goes (-1 for a message to the host). `cause` is the flow in whose
    course it was sent ("" for none), `answers` are the flows of what the host sent in its course.
    """

    id: str
    to_guest: bool
    serial: int
    msgtype: int
    relid: int
    position: int = -1
    sint: int = -1
    cause: str = ""
    answers: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The message's name, or its number where it has none."""
        try:
            return MessageType(self.msgtype).name
        except ValueError:
            return f"msgtype {self.msgtype}"

    def add(self, role: Role, record: TraceRecord) -> None:
        """Note a step."""
        self.steps.append(Step(role, record))

    def step(self, role: Role) -> TraceRecord | None:
        """The first record of a role."""
        return next((step.record for step in self.steps if step.role is role), None)

    @property
    def path(self) -> list[Step]:
        """The steps at which it moves on, in order: an arrow goes from each to the next."""
        return [step for step in self.steps if step.role in PATH]

    @property
    def ended(self) -> bool:
        """Whether it came to its end: taken out of its slot and its work done; or taken and handled by the host."""
        roles = [step.role for step in self.steps]
        if Role.DROPPED in roles or Role.TAKEN in roles:
            return True
        if not self.to_guest:
            return Role.HOST_DONE in roles or Role.REFUSED in roles
        works = roles.count(Role.WORK_QUEUED), roles.count(Role.WORK_DONE)
        return Role.SLOT_FREE in roles and works[0] == works[1]


class Flows:
    """All flows of a recording, by id, in the order of their posts."""

    def __init__(self, flows: Mapping[str, Flow], of_record: Mapping[tuple[int, int], str]) -> None:
        self.flows = flows
        self._of_record = of_record

    def __iter__(self) -> Iterator[Flow]:
        return iter(self.flows.values())

    def __len__(self) -> int:
        return len(self.flows)

    def get(self, flow_id: str) -> Flow | None:
        """The flow of this id."""
        return self.flows.get(flow_id)

    def of_record(self, record: TraceRecord) -> str:
        """The id of the flow that a record is a step of; "" for none."""
        return self._of_record.get((record.actor.slot, record.seq), "")

    def of_relid(self, relid: int) -> list[Flow]:
        """The flows of messages about one relid."""
        return [flow for flow in self if flow.relid == relid]


_HANDLERS: Final = frozenset(
    {
        "vmbus_on_msg_dpc",
        "vmbus_on_message",
        "vmbus_onoffer",
        "vmbus_onoffer_rescind",
        "vmbus_onopen_result",
        "vmbus_ongpadl_created",
        "vmbus_ongpadl_torndown",
        "vmbus_onmodifychannel_response",
        "vmbus_onversion_response",
    }
)
_PLAIN: Final[Mapping[str, Role]] = {
    **dict.fromkeys(_HANDLERS, Role.HANDLER),
    "req_complete": Role.COMPLETES,
    "probe_start": Role.PROBE_START,
    "probe": Role.PROBE,
    **dict.fromkeys(
        ("offer", "rescind", "release", "open", "close", "gpadl_add", "gpadl_drop", "state", "uevent", "remove_start",
         "remove", "refused", "fault_hit", "vmbus_open", "vmbus_establish_gpadl_header", "vmbus_establish_gpadl_body",
         "vmbus_close_internal", "vmbus_teardown_gpadl", "vmbus_release_relid"),
        Role.EFFECT,
    ),
}  # fmt: skip
_OF_HOST: Final = frozenset(
    ("host_state", "gpadl_state", "gpadl_add", "gpadl_drop", "map", "unmap", "target_change", "refused", "ignored",
     "offer", "rescind", "fault_hit")
)  # fmt: skip


class _Reader:
    """Goes through the records once; what is under way is known by actor, by slot, and by serial."""

    def __init__(self, vp_indices: Sequence[int]) -> None:
        self.flows: dict[str, Flow] = {}
        self.of_record: dict[tuple[int, int], str] = {}
        self._positions = {vp_index: position for position, vp_index in enumerate(vp_indices)}
        self._waiting: dict[tuple[int, int], deque[Flow]] = {}
        self._resident: dict[tuple[int, int], Flow] = {}
        self._written: dict[int, Flow | None] = {}  # by actor: whose interrupt the next irq_raise is
        self._current: dict[int, list[Flow]] = {}  # by actor: what it works for, innermost last
        self._freed: dict[int, Flow] = {}  # by actor: the message whose EOM would come now
        self._posting: dict[int, Flow] = {}  # by actor: the post that it is about to make
        self._taken: Flow | None = None
        self._unknown = 0
        self._actions = {
            "message_post": self._message_post,
            "pending_set": self._pending_set,
            "slot_write": self._slot_write,
            "flag_set": self._flag_set,
            "irq_raise": self._irq_raise,
            "kick": self._kick,
            "isr_enter": self._isr_enter,
            "tasklet_sched": self._tasklet_sched,
            "slot_read": self._slot_read,
            "slot_free": self._slot_free,
            "eom": self._eom,
            "work_queue": self._work_queue,
            "work_run": self._work_run,
            "work_done": self._work_done,
            "post_begin": self._post_begin,
            "post": self._post,
            "message_take": self._message_take,
            "message_done": self._message_done,
            "reset": self._reset,
        }

    def read(self, records: Iterable[TraceRecord]) -> None:
        """Take all records, in the order of time."""
        actions = self._actions
        for record in records:
            name = record.event.name
            action = actions.get(name)
            if action is not None:
                action(record)
            elif record.actor.kind == "HYPERVISOR":
                if self._taken is not None and name in _OF_HOST:
                    self._add(self._taken, Role.HOST_EFFECT, record)
            elif (role := _PLAIN.get(name)) and (current := self._current.get(record.actor.slot)):
                self._add(current[-1], role, record)

    def _add(self, flow: Flow, role: Role, record: TraceRecord) -> None:
        flow.steps.append(Step(role, record))
        self.of_record.setdefault((record.actor.slot, record.seq), flow.id)

    def _new(self, flow: Flow) -> Flow:
        self.flows[flow.id] = flow
        return flow

    def _to_guest(self, serial: int) -> Flow | None:
        return self.flows.get(f"h{serial}") if serial else None

    # -- host to guest ------------------------------------------------------------------------------

    def _message_post(self, record: TraceRecord) -> None:
        position, sint, msgtype, serial, *more = record.values
        # Recordings of before the cause was recorded have neither.
        cause, relid = more if len(more) == 2 else (0, 0)
        flow = self._new(Flow(f"h{serial}", True, serial, msgtype, relid, position, sint))
        self._add(flow, Role.POSTED, record)
        self._waiting.setdefault((position, sint), deque()).append(flow)
        asked = self.flows.get(f"g{cause}") if cause else None
        if asked is not None:
            flow.cause = asked.id
            asked.answers.append(flow.id)
            self._add(asked, Role.ANSWER, record)

    def _pending_set(self, record: TraceRecord) -> None:
        waiting = self._waiting.get((record.values[0], record.values[1]))
        if waiting:
            self._add(waiting[0], Role.SLOT_BUSY, record)

    def _slot_write(self, record: TraceRecord) -> None:
        position, sint, message_type, msgtype, serial, _queued = record.values
        if message_type != HVMSG_CHANNEL_MESSAGE:
            # The hypervisor's own, a timer's, say: nobody's flow, and so is the interrupt behind it.
            self._written[record.actor.slot] = None
            self._was_taken(record, self._resident.pop((position, sint), None))
            return
        flow = self._to_guest(serial)
        if flow is None:
            # Posted before the recording began, or its record is gone.
            flow = self._new(Flow(f"h{serial}", True, serial, msgtype, 0, position, sint))
        waiting = self._waiting.get((position, sint))
        if waiting and flow in waiting:
            waiting.remove(flow)
        self._add(flow, Role.SLOT_WRITE, record)
        self._was_taken(record, self._resident.get((position, sint)))
        self._resident[position, sint] = flow
        self._written[record.actor.slot] = flow

    def _was_taken(self, record: TraceRecord, before: Flow | None) -> None:
        """The host found the slot empty: whoever took out what was in it need not have said so."""
        if before is not None and before.step(Role.DPC) is None:
            self._add(before, Role.TAKEN, record)

    def _flag_set(self, record: TraceRecord) -> None:
        # The interrupt behind it is that flag's.
        self._written[record.actor.slot] = None

    def _irq_raise(self, record: TraceRecord) -> None:
        flow = self._written.get(record.actor.slot)
        if flow is not None and flow.position == record.values[0]:
            self._add(flow, Role.IRQ, record)

    def _kick(self, record: TraceRecord) -> None:
        flow = self._written.pop(record.actor.slot, None)
        if flow is not None and flow.position == record.values[0]:
            self._add(flow, Role.KICK, record)

    def _isr_enter(self, record: TraceRecord) -> None:
        if record.values[0] == HYPERVISOR_CALLBACK_VECTOR:
            self._first_time(record, Role.ISR)

    def _tasklet_sched(self, record: TraceRecord) -> None:
        if record.values[0] == Tasklets.VMBUS_ON_MSG_DPC:
            self._first_time(record, Role.TASKLET_SCHED)

    def _first_time(self, record: TraceRecord, role: Role) -> None:
        """A step of whatever is in the slots of this processor, if that has none of its kind yet."""
        position = self._positions.get(-1 if record.vp is None else record.vp, -1)
        for (at, _sint), flow in self._resident.items():
            if at == position and flow.step(role) is None:
                self._add(flow, role, record)

    def _slot_read(self, record: TraceRecord) -> None:
        flow = self._to_guest(record.values[3])
        if flow is not None:
            self._add(flow, Role.DPC, record)
            self._current.setdefault(record.actor.slot, []).append(flow)

    def _slot_free(self, record: TraceRecord) -> None:
        flow = self._to_guest(record.values[2])
        if flow is None:
            return
        self._add(flow, Role.SLOT_FREE, record)
        self._leave(record, flow)
        if self._resident.get((flow.position, flow.sint)) is flow:
            del self._resident[flow.position, flow.sint]
        if record.values[3]:
            self._freed[record.actor.slot] = flow

    def _eom(self, record: TraceRecord) -> None:
        flow = self._freed.pop(record.actor.slot, None)
        if flow is not None:
            self._add(flow, Role.EOM, record)

    def _work_queue(self, record: TraceRecord) -> None:
        flow = self._to_guest(record.values[2])
        if flow is not None:
            self._add(flow, Role.WORK_QUEUED, record)

    def _work_run(self, record: TraceRecord) -> None:
        flow = self._to_guest(record.values[2])
        if flow is not None:
            self._add(flow, Role.WORK_RUN, record)
            self._current.setdefault(record.actor.slot, []).append(flow)

    def _work_done(self, record: TraceRecord) -> None:
        flow = self._to_guest(record.values[2])
        if flow is not None:
            self._add(flow, Role.WORK_DONE, record)
            self._leave(record, flow)

    def _leave(self, record: TraceRecord, flow: Flow) -> None:
        current = self._current.get(record.actor.slot)
        if current and flow in current:
            del current[current.index(flow) :]

    # -- guest to host ------------------------------------------------------------------------------

    def _post_begin(self, record: TraceRecord) -> None:
        _connection, msgtype, _size, relid = record.values
        slot = record.actor.slot
        self._unknown += 1
        flow = Flow(f"g?{self._unknown}", False, 0, msgtype, relid)
        if current := self._current.get(slot):
            flow.cause = current[-1].id
        flow.add(Role.POSTED, record)
        self._posting[slot] = flow

    def _post(self, record: TraceRecord) -> None:
        _connection, msgtype, _size, status, serial, claimer = (*record.values, 0, 0)[:6]
        if record.actor.kind == "HYPERVISOR":
            self._received(record, msgtype, status, serial, claimer)
            return
        flow = self._posting.pop(record.actor.slot, None)
        if flow is not None:
            self._keep(flow)
            self._add(flow, Role.POST_DONE, record)

    def _received(self, record: TraceRecord, msgtype: int, status: int, serial: int, claimer: int) -> None:
        flow = self._posting.get(slot_of(claimer))
        if flow is None or flow.serial or flow.msgtype != msgtype:
            flow = Flow("", False, 0, msgtype, 0)
        if serial:
            flow.serial, flow.id = serial, f"g{serial}"
        elif not flow.id:
            self._unknown += 1
            flow.id = f"g?{self._unknown}"
        self._keep(flow)
        self._add(flow, Role.REFUSED if status else Role.RECEIVED, record)

    def _keep(self, flow: Flow) -> None:
        """Enter a flow under the id that it has now; what it had before, nobody has seen."""
        if flow.id not in self.flows:
            self.flows[flow.id] = flow
            for step in flow.steps:
                self.of_record.setdefault((step.record.actor.slot, step.record.seq), flow.id)

    def _message_take(self, record: TraceRecord) -> None:
        msgtype, serial, _size, relid = record.values
        flow = self.flows.get(f"g{serial}") or self._new(Flow(f"g{serial}", False, serial, msgtype, relid))
        flow.relid = flow.relid or relid
        self._add(flow, Role.HOST_TAKE, record)
        self._taken = flow

    def _message_done(self, record: TraceRecord) -> None:
        if self._taken is not None:
            self._add(self._taken, Role.HOST_DONE, record)
        self._taken = None

    def _reset(self, record: TraceRecord) -> None:
        for flow in self.flows.values():
            if not flow.ended:
                self._add(flow, Role.DROPPED, record)
        self._waiting.clear()
        self._resident.clear()


def flows_of(records: Iterable[TraceRecord], vp_indices: Sequence[int] = ()) -> Flows:
    """The flows in these records, which come in the order of time; `vp_indices[position]` as in a recording's head."""
    reader = _Reader(vp_indices)
    reader.read(records)
    return Flows(reader.flows, reader.of_record)


def flows_in(recording: Recording) -> Flows:
    """The flows of a whole recording."""
    return flows_of(recording.records(), recording.head.get("vp_indices", ()))
