"""Records told in words: what each step is, and which function it stands for.

`TELLING` is the one table of sentences; an event that is not in it is told by its name and arguments. What goes through
a device's rings is told in sums, as it is most of the records and none of the story.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from emu.recording import TraceRecord
from hostproc.protocol import states as host
from hostproc.state_trace import REMOVED
from tools.event_names import name_of, shown_text
from tools.flows import Flow, Flows, Role, Step
from tools.invariants import is_host
from tools.nouns import counted
from tools.trace import as_json

TELLING: Final[Mapping[str, tuple[str, str]]] = {
    "offer": ("offers relid {relid}, generation {generation}", ""),
    "rescind": ("takes relid {relid} back, generation {generation}", ""),
    "release": ("gives relid {relid} up ({ret})", "vmbus_release_relid"),
    "post_begin": ("posts {msgtype}, {size} bytes", "vmbus_post_msg"),
    "post": ("post of {msgtype}: {status}", "HvCallPostMessage"),
    "message_post": ("posts {msgtype} (h{serial}) for the slot of VP page {position}, SINT {sint}", "HvPostMessage"),
    "message_take": ("takes {msgtype} (g{serial}) from the guest", "control plane"),
    "message_done": ("has handled {msgtype} (g{serial})", "control plane"),
    "pending_set": ("finds the slot of VP page {position} busy and sets its pending bit", "SynIC"),
    "slot_write": ("writes {msgtype} into the slot of VP page {position}; {queued} more wait", "SynIC"),
    "irq_raise": ("requests interrupt {vector} of VP page {position}", "SynIC"),
    "kick": ("reaches that VP: {how}", "APIC"),
    "isr_enter": ("takes interrupt {vector}", "vmbus_isr"),
    "isr_exit": ("ends interrupt {vector}", "vmbus_isr"),
    "tasklet_sched": ("schedules tasklet {tasklet}", "tasklet_schedule"),
    "tasklet_run": ("runs tasklet {tasklet}", "tasklet_action"),
    "tasklet_done": ("has run tasklet {tasklet}", "tasklet_action"),
    "slot_read": ("copies {msgtype} (h{serial}) out of the slot", "vmbus_on_msg_dpc"),
    "slot_free": ("empties the slot; pending bit {pending}", "vmbus_signal_eom"),
    "work_queue": ("queues {function} on {queue}", "queue_work"),
    "work_run": ("begins {function}", "process_one_work"),
    "work_done": ("has done {function}", "process_one_work"),
    "vmbus_on_msg_dpc": ("looks at its type: {msgtype}", "vmbus_on_msg_dpc"),
    "vmbus_on_message": ("handles {msgtype}", "vmbus_onmessage"),
    "vmbus_onoffer": ("makes a channel of the offer of relid {child_relid}, device {if_instance}", "vmbus_onoffer"),
    "vmbus_onoffer_rescind": ("begins the rescind of relid {child_relid}", "vmbus_onoffer_rescind"),
    "vmbus_onopen_result": ("learns that relid {child_relid} is open: status {status}", "vmbus_onopen_result"),
    "vmbus_ongpadl_created": ("learns that GPADL {gpadl} is there: status {status}", "vmbus_ongpadl_created"),
    "vmbus_ongpadl_torndown": ("learns that GPADL {gpadl} is gone", "vmbus_ongpadl_torndown"),
    "vmbus_open": ("asked to open relid {child_relid} for VP {target_vp} ({ret})", "__vmbus_open"),
    "vmbus_close_internal": ("closed relid {child_relid} ({ret})", "vmbus_close_internal"),
    "vmbus_establish_gpadl_header": ("described pages as GPADL {gpadl} ({ret})", "vmbus_establish_gpadl"),
    "vmbus_establish_gpadl_body": ("described more pages of GPADL {gpadl} ({ret})", "vmbus_establish_gpadl"),
    "vmbus_teardown_gpadl": ("asked for GPADL {gpadl} back ({ret})", "vmbus_teardown_gpadl"),
    "vmbus_release_relid": ("told the host that relid {child_relid} is free ({ret})", "vmbus_release_relid"),
    "req_alloc": ("waits for the answer to {msgtype}", "wait_for_completion"),
    "req_complete": ("wakes who waits for the answer to {msgtype}", "complete"),
    "req_free": ("waits for {msgtype} no more", "list_del"),
    "gpadl_add": ("has {pages} pages as GPADL {gpadl}", ""),
    "gpadl_drop": ("has given GPADL {gpadl} back", ""),
    "map": ("maps {pages} pages of GPADL {gpadl}", "device"),
    "unmap": ("lets go of the rings", "device"),
    "state": ("channel goes from {old} to {new}", ""),
    "host_state": ("channel goes from {old} to {new}", "control plane"),
    "gpadl_state": ("GPADL {gpadl} goes from {old} to {new}", "control plane"),
    "probe_start": ("lets driver {name} take the device", "vmbus_probe"),
    "probe": ("driver {name} has answered ({ret})", "vmbus_probe"),
    "remove_start": ("takes the device from driver {name}", "vmbus_remove"),
    "remove": ("driver {name} has let go", "vmbus_remove"),
    "open": ("channel is open ({ret})", "vmbus_open"),
    "close": ("closes the channel ({ret})", "vmbus_close_internal"),
    "uevent": ("tells user space of the {subject}: {action}", "kobject_uevent"),
    "refused": ("refuses something: {rule}", ""),
    "ignored": ("ignores something legal: {rule}", ""),
    "eom": ("end of message", "vmbus_signal_eom"),
    "timer_armed": ("sets timer {timer} of VP page {position} to expire at {expiration_time}", "SynIC"),
    "timer_expired": ("sees timer {timer} of VP page {position} expire, which was due at {expiration_time}", "SynIC"),
    "timer_delivered": ("has the message of timer {timer} for the slot of VP page {position}, SINT {sint}", "SynIC"),
    "timer_dropped": ("drops a tick of timer {timer} of VP page {position}", "SynIC"),
    "timer_withdrawn": ("takes back what timer {timer} of VP page {position} had to say", "SynIC"),
    "clock_event": ("has the clock event of timer {timer}, due at {expiration_time}", "hv_stimer0_isr"),
    "lock": ("has taken {name}", "mutex_lock"),
    "unlock": ("gives {name} back", "mutex_unlock"),
    "wait": ("sleeps for {name}", "schedule"),
    "wait_done": ("goes on", "schedule"),
    "wake": ("wakes actor {actor}", "try_to_wake_up"),
    "target_change": ("interrupts VP {target_vp} for it from now on", "control plane"),
    "fault_hit": ("is made to go wrong here: fault {kind}", ""),
    "reset": ("finds that the guest is gone, and drops {dropped} messages that waited for its slots", "SynIC"),
}
TELLING_OF_GUEST: Final[Mapping[str, tuple[str, str]]] = {
    "offer": ("has made a channel for relid {relid}", "alloc_channel"),
    "rescind": ("looks for the channel of relid {relid} and claims it", "vmbus_onoffer_rescind"),
    "post": ("is back from its post of {msgtype}: {status}", "hv_post_message"),
    "gpadl_add": ("knows that the host has {pages} pages as GPADL {gpadl}", "vmbus_establish_gpadl"),
    "gpadl_drop": ("has its pages of GPADL {gpadl} back", "vmbus_teardown_gpadl"),
}
"""What means something else where the guest records it."""
_WORDS: Final[Mapping[str, Mapping[str, str]]] = {
    "how": {
        "MERGED": "it had been asked already",
        "NONE": "it looks by itself",
        "SEMAPHORE": "it was halted, and gets a token",
        "SIGNAL": "it computes, and gets the kick signal",
    },
    "old": {"255": "nothing"},
    "new": {"255": "nothing"},
    "subject": {"DEVICE": "device", "CHANNEL": "channel's directory", "DRIVER": "driver", "BUS": "bus"},
    "ret": {"0": "it went well"},
}
TRAFFIC: Final = frozenset(
    ("ring_publish", "ring_release", "ring_room", "ring_full", "pending_size", "mask", "unmask", "signal", "flag_set",
     "flag_clear", "tasklet_sched", "tasklet_run", "vmbus_chan_sched", "vmbus_on_event", "vmbus_setevent", "task_take",
     "request_start", "request_end", "ring_attach")
)  # fmt: skip
"""What packets leave in a recording."""


@dataclass(frozen=True, slots=True)
class Told:
    """One line of a story: the record that it begins with, in words, and the function that it stands for."""

    record: TraceRecord
    text: str
    function: str
    role: str = ""

    @property
    def where(self) -> str:
        """Who did it, and in which context."""
        context = self.record.context.lower()
        return self.record.actor.name if context in ("host", "queue") else f"{self.record.actor.name} ({context})"

    def report(self, before_ns: int) -> dict[str, Any]:
        """The line as an object; `later_ns` counts from the step before."""
        return {
            "t_ns": self.record.t_ns,
            "later_ns": self.record.t_ns - before_ns,
            "actor": self.record.actor.name,
            "pid": self.record.actor.pid,
            "context": self.record.context.lower(),
            "role": self.role,
            "text": self.text,
            "function": self.function,
            "record": as_json(self.record),
        }


def tell(record: TraceRecord, role: str = "") -> Told:
    """One record in words."""
    name = record.event.name
    if role == Role.TAKEN:
        # The record is of the next message's write.
        return Told(record, f"finds the slot of VP page {record.values[0]} empty: it was taken out", "SynIC", role)
    sentence, function = (TELLING if is_host(record) or name not in TELLING_OF_GUEST else TELLING_OF_GUEST).get(
        name, ("", "")
    )
    if not sentence:
        return Told(record, f"{record.event.name}: {shown_text(record)}", "", role)
    pairs = record.event.pairs(record.values)
    words = {field.name: name_of(field, value) or _number(field.name, field.show(value)) for field, value in pairs}
    words = {name: _WORDS.get(name, {}).get(word, word) for name, word in words.items()}
    words.setdefault("name", words.get("driver", "?"))
    return Told(record, sentence.format_map(_Words(words)), function, role)


class _Words(dict[str, str]):
    """The arguments of a record; an older recording may lack some."""

    def __missing__(self, name: str) -> str:
        return "?"


def _number(name: str, shown: str) -> str:
    if name == "ret" and shown != "0":
        return f"errno {shown}"
    return hex(int(shown)) if name in ("gpadl", "gpadlhandle") and shown.isdecimal() else shown


def story_of_flow(records: Iterable[TraceRecord], flow: Flow) -> list[Told]:
    """A message's steps in the order of time, and where its work slept meanwhile."""
    told = [tell(step.record, step.role) for step in flow.steps]
    told += map(tell, _sleeps(records, flow.steps))
    return sorted(told, key=lambda one: one.record.t_ns)


def _sleeps(records: Iterable[TraceRecord], steps: Iterable[Step]) -> list[TraceRecord]:
    """The waits that began while one of these steps' work ran, and their ends."""
    edges = {(step.record.actor.slot, step.record.seq): step.role for step in steps}
    running: set[int] = set()
    found = []
    for record in records:
        slot, name = record.actor.slot, record.event.name
        role = edges.get((slot, record.seq))
        if role is Role.WORK_RUN:
            running.add(slot)
        elif role is Role.WORK_DONE:
            running.discard(slot)
        elif name in ("wait", "wait_done") and slot in running:
            found.append(record)
    return found


def story_of_relid(records: Sequence[TraceRecord], flows: Flows, relid: int) -> list[Told]:
    """Everything about a relid, by time; its traffic in sums. Of all devices that had it, if there were several."""
    subject = _Subject(relid)
    steps = [step for flow in _flows_of(flows, relid) for step in flow.steps]
    roles: dict[tuple[int, int], str] = {(step.record.actor.slot, step.record.seq): step.role for step in steps}
    sleeps = {(record.actor.slot, record.seq) for record in _sleeps(records, steps)}
    told: list[Told] = []
    traffic: list[TraceRecord] = []
    for record in records:
        role = roles.get((record.actor.slot, record.seq), "")
        asleep = (record.actor.slot, record.seq) in sleeps
        if not subject.told_by(record) and not role and not asleep:
            continue
        if record.event.name in TRAFFIC and not role:
            traffic.append(record)
            continue
        told += _sum_up(traffic)
        traffic.clear()
        told.append(tell(record, role))
    return told + _sum_up(traffic)


def _flows_of(flows: Flows, relid: int) -> list[Flow]:
    """The messages about a relid; also those that name none, where one about it led to them or is their answer."""
    named = flows.of_relid(relid)
    ids = {flow.id for flow in named} | {answer for flow in named for answer in flow.answers}
    return named + [flow for flow in flows if not flow.relid and (flow.cause in ids or flow.id in ids)]


class _Subject:
    """Which records are about a relid; it is to see all of them, in the order of time."""

    def __init__(self, relid: int) -> None:
        self._relid = relid
        self._owners: dict[int, int] = {}
        """By GPADL: the relid for which it was last used; another guest begins to count anew."""
        self._held = False
        """Whether the guest has it."""

    def told_by(self, record: TraceRecord) -> bool:
        """Whether a record names it, or a GPADL of it; or the end of the guest that holds it."""
        name, arguments = record.event.name, record.arguments
        if name == "reset":
            return self._held
        if name in ("flag_set", "flag_clear"):
            return arguments["flag"] == self._relid
        relid = arguments.get("relid", 0) or arguments.get("child_relid", 0)
        gpadl = arguments.get("gpadl", 0)
        if not relid:
            return self._owners.get(gpadl) == self._relid
        if gpadl:
            self._owners[gpadl] = relid
        if relid != self._relid:
            return False
        if name == "host_state":
            self._held = arguments["new"] not in (host.ChannelState.CLIENT_RELEASED, REMOVED)
        return True


def _sum_up(traffic: Sequence[TraceRecord]) -> list[Told]:
    """One line for a run of packets."""
    if not traffic:
        return []
    names = Counter(record.event.name for record in traffic)
    moved = [0, 0]
    for record in traffic:
        if record.event.name == "ring_publish":
            moved[record.values[1] & 1] += record.values[3]
    span_us = (traffic[-1].t_ns - traffic[0].t_ns) / 1e3
    text = (
        f"traffic for {span_us:,.1f} us: {moved[0]:,} bytes to the host, {moved[1]:,} to the guest in "
        f"{counted(names['ring_publish'], 'publish', 'publishes')}; {counted(names['signal'], 'signal')} to the host, "
        f"{names['flag_set']} to the guest; {counted(names['ring_full'], 'time')} full"
    )
    return [Told(traffic[0], text, "")]
