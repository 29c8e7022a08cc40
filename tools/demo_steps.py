"""The steps of `vmbus-emu demo`: which records of a run are told, and the kernel function each was made in.

One rule a step: event, context, and what it must hold; the first rule that fits tells the record, and a record
without a rule is passed over. A step's time is its record's; what it took is the time since the step before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from emu.recording import TraceRecord
from emu.wire.messages import MessageType
from emu.wire.synic import HYPERVISOR_CALLBACK_VECTOR, VMBUS_MESSAGE_SINT
from guestproc.kernel.layout import ChannelState
from guestproc.kernel.workqueue import QueueNumber
from guestproc.protocol.numbers import Tasklets, Works
from tools.nouns import counted

Values = dict[str, int]
_QUEUES: Final = "kworker/"


@dataclass(frozen=True, slots=True)
class Step:
    """One line of the demo: when, in which process and context, and what."""

    at_ns: int
    took_ns: int
    process: str
    pid: int
    context: str
    text: str
    milestone: bool
    event: str

    def report(self) -> dict[str, Any]:
        """As `demo --json` has it."""
        return {
            "at_us": round(self.at_ns / 1e3, 1),
            "took_us": round(self.took_ns / 1e3, 1),
            "process": self.process,
            "pid": self.pid,
            "context": self.context,
            "event": self.event,
            "step": self.text,
        }


@dataclass(frozen=True, slots=True)
class Rule:
    """Tells a record of `event` in `context` whose arguments hold `wanted`; a milestone is told of every device."""

    event: str
    context: str
    wanted: Values
    text: str | Callable[[Values], str]
    milestone: bool = False


def _rules() -> tuple[Rule, ...]:
    rule = Rule
    sint = VMBUS_MESSAGE_SINT
    msg_dpc = {"tasklet": int(Tasklets.VMBUS_ON_MSG_DPC)}
    vector = {"vector": HYPERVISOR_CALLBACK_VECTOR}
    onmessage = {"function": int(Works.VMBUS_ONMESSAGE_WORK)}
    add_channel = {"function": int(Works.VMBUS_ADD_CHANNEL_WORK)}
    work, rescind = {"queue": int(QueueNumber.WORK)}, {"queue": int(QueueNumber.RESCIND)}
    opening = {"new": int(ChannelState.OPENING_STATE)}
    closing = {"old": int(ChannelState.OPENED_STATE), "new": int(ChannelState.OPEN_STATE)}
    gpadl, opened = {"msgtype": int(MessageType.GPADL_HEADER)}, {"msgtype": int(MessageType.OPENCHANNEL)}
    # fmt: off
    return (
        rule("offer", "HOST", {}, lambda v: f"OFFERCHANNEL for relid {v['relid']}", True),
        rule("rescind", "HOST", {}, lambda v: f"RESCIND_CHANNELOFFER of relid {v['relid']}", True),
        rule("slot_write", "HOST", {"sint": sint}, lambda v: f"message slot: {MessageType(v['msgtype']).name}"),
        rule("irq_raise", "HOST", vector, lambda v: f"interrupt {v['vector']:#x} requested"),
        rule("isr_enter", "ISR", vector, "hyperv_vector_handler"),
        rule("tasklet_sched", "ISR", msg_dpc, "vmbus_isr: schedules msg_dpc"),
        rule("slot_read", "TASKLET", {"sint": sint}, "vmbus_on_msg_dpc: copies the slot"),
        rule("work_queue", "TASKLET", onmessage | work, "queue_work: an offer may sleep", True),
        rule("work_queue", "TASKLET", onmessage | rescind, "queue_work: a rescind may sleep"),
        rule("req_complete", "TASKLET", gpadl, "vmbus_ongpadl_created: complete()", True),
        rule("req_complete", "TASKLET", opened, "vmbus_onopen_result: complete()", True),
        rule("slot_free", "TASKLET", {"sint": sint}, "vmbus_signal_eom: slot is free"),
        rule("work_run", "QUEUE", onmessage, "vmbus_onmessage", True),
        rule("offer", "QUEUE", {}, "vmbus_onoffer: vmbus_process_offer"),
        rule("rescind", "QUEUE", {}, "vmbus_onoffer_rescind"),
        rule("work_queue", "QUEUE", add_channel, "queue_work(add_channel_work)"),
        rule("work_run", "QUEUE", add_channel, "vmbus_add_channel_work", True),
        rule("state", "QUEUE", opening, "the driver's probe: vmbus_open"),
        rule("req_alloc", "QUEUE", gpadl, "vmbus_establish_gpadl: waits"),
        rule("gpadl_add", "HOST", {}, lambda v: f"GPADL of {counted(v['pages'], 'page')} accepted", True),
        rule("req_alloc", "QUEUE", opened, "OPENCHANNEL: waits"),
        rule("map", "HOST", {}, "device attached to both rings", True),
        rule("open", "QUEUE", {"ret": 0}, "vmbus_open: the channel is open", True),
        rule("probe", "QUEUE", {"ret": 0}, "vmbus_probe: the driver has it", True),
        rule("unmap", "HOST", {}, "device detached from its rings"),
        rule("state", "QUEUE", closing, "the driver's remove: vmbus_close", True),
        rule("post", "HOST", {"msgtype": int(MessageType.CLOSECHANNEL)}, "CLOSECHANNEL arrives"),
        rule("gpadl_drop", "QUEUE", {}, "vmbus_teardown_gpadl: pages back"),
        rule("post", "HOST", {"msgtype": int(MessageType.RELID_RELEASED)}, "RELID_RELEASED arrives", True),
        rule("release", "QUEUE", {"ret": 0}, "vmbus_release_relid: it is over", True),
    )
    # fmt: on


RULES: Final = _rules()
_BEGINNINGS: Final = ("offer", "rescind")
"""What the host does first."""
_OF_A_MESSAGE: Final = ("slot_write", "slot_read", "slot_free", "work_queue", "work_run")
"""Events whose serial is that of a message of the host (0: of none)."""


def steps_of(records: Iterable[TraceRecord], relid: int, last_event: str) -> list[Step]:
    """The steps of one device's appearing, or going, by time from the first one.

    They begin where the host offers the device, or takes it back, and end with the guest's `last_event`. Nobody
    waits for a tasklet to free the slot of its last message, and it may have lost its core before that: what follows
    from messages before this device's first one belongs to another story.
    """
    steps: list[Step] = []
    first = last = 0
    for record, rule in _told(records, relid):
        if not steps:
            first = record.t_ns
        text = rule.text if isinstance(rule.text, str) else rule.text(record.arguments)
        step = Step(
            at_ns=record.t_ns - first,
            took_ns=record.t_ns - last if steps else 0,
            process=process_of(record),
            pid=record.actor.pid,
            context=context_of(record),
            text=text,
            milestone=rule.milestone,
            event=record.event.name,
        )
        last = record.t_ns
        steps.append(step)
        if record.event.name == last_event and record.context == "QUEUE":
            break
    return steps


def _told(records: Iterable[TraceRecord], relid: int) -> Iterator[tuple[TraceRecord, Rule]]:
    """Each record that is told of a device, with its rule."""
    begun = written = False
    first_serial = 0
    for record in records:
        arguments, event = record.arguments, record.event.name
        ours = arguments.get("relid") == relid
        begun = begun or (ours and record.context == "HOST" and event in _BEGINNINGS)
        if not begun:
            continue
        if event == "message_post" and ours and not first_serial:
            first_serial = arguments["serial"]
        if event in _OF_A_MESSAGE and 0 < arguments["serial"] < first_serial:
            continue
        written = written or (event == "slot_write" and arguments["serial"] == first_serial)
        # 0 where it does not apply: a tasklet that is no channel's. Before the first message is in its slot, whoever
        # names no device is at work for somebody else.
        if not ours and (arguments.get("relid") or not written):
            continue
        rule = next((one for one in RULES if _fits(one, record, arguments)), None)
        if rule is not None:
            yield record, rule


def _fits(rule: Rule, record: TraceRecord, arguments: Values) -> bool:
    if (rule.event, rule.context) != (record.event.name, record.context):
        return False
    return all(arguments.get(name) == value for name, value in rule.wanted.items())


def milestones(steps: list[Step]) -> list[Step]:
    """The steps that are told of every device; each took the time since the milestone before it."""
    chosen = [step for step in steps if step.milestone]
    before = [0, *(step.at_ns for step in chosen)]
    return [
        Step(one.at_ns, one.at_ns - earlier, one.process, one.pid, one.context, one.text, one.milestone, one.event)
        for one, earlier in zip(chosen, before, strict=False)
    ]


def process_of(record: TraceRecord) -> str:
    """The process: a worker is a thread of the workqueue's."""
    return "workqueue" if record.actor.name.startswith(_QUEUES) else record.actor.name


def context_of(record: TraceRecord) -> str:
    """Where in the process: the host's loop, an interrupt, a tasklet, or a named queue."""
    if record.context == "QUEUE":
        return f"queue {record.actor.name.removeprefix(_QUEUES)}"
    return record.context if record.context == "ISR" else record.context.lower()
