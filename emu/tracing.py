"""The recorder: fixed-size records in the `trace` segment, one ring and one writer an actor.

A record is 64 bytes: time (CLOCK_MONOTONIC ns, u64), the writer's own sequence (u32), event (u16), VP index
(u8, 255 none), context (u8), six u64 arguments. Rings overwrite their oldest records; whoever drains counts
what it missed. Event names, arguments and their types stand in `EVENTS`, the one table of the recorder.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Mapping
from enum import IntEnum
from struct import Struct
from struct import error as struct_error
from types import CellType
from typing import ClassVar, Final, NamedTuple

from emu.control import ACTORS
from emu.errors import MissingPrerequisite
from emu.event_fields import WORDS, EventSpec, parse_argument, text_value
from emu.ipc.segments import Segment
from emu.shared_variables import variables

RECORD: Final = Struct("<QIHBBQQQQQQ")
RECORD_BYTES: Final = RECORD.size
_PACKED: Final = Struct("@LIHBBLLLLLL")
"""The same, for who writes: packing is most of a record, and a native `L` takes half of a standard `Q`'s time. Where
this runs (x86-64, arm64) it is the same 8 bytes, the lowest first."""
_SAME_BYTES: Final = 52
_SAME: Final = Struct("@LI52s")
"""A record as time, sequence, and what is the same each time."""
_SAME_TWICE: Final = Struct("@LI52sLI52s")
WRITTEN_AT_ONCE: Final = 2
"""So many records may be on their way at once: the oldest ones of a full ring may be theirs already."""
_WORDS: Final = Struct("<5Q")
"""What a `bytes` record holds behind its first word."""
CAPACITY: Final = 16_384
"""Records of one actor's ring, 1 MiB: a stream makes 400,000 a second, and a drain may come 40 ms late."""
_HEADS: Final = 4_096
"""A row of 64 bytes for each actor: how many records it has written (u64, its own)."""
_DRAINED: Final = _HEADS + 8
"""How many of them were drained (u64, the drain's)."""
_RINGS: Final = _HEADS + ACTORS * 64
TRACE_HEAD_BYTES: Final = _RINGS
"""What every reader touches: the heads of all rings. The rings get their memory from their writers."""
TRACE_BYTES: Final = _RINGS + ACTORS * CAPACITY * RECORD_BYTES
NO_VP: Final = 255
assert _PACKED.pack(*range(11)) == RECORD.pack(*range(11)), "longs are not 8 bytes, the lowest first"
_U64: Final = (1 << 64) - 1
_LAST_SEQUENCE: Final = (1 << 32) - 1


class Context(IntEnum):
    """Where in a process a record was made."""

    HOST = 0
    ISR = 1
    TASKLET = 2
    QUEUE = 3
    TASK = 4
    BOOT = 5


class Side(IntEnum):
    """Which ring of a channel."""

    TO_HOST = 0
    TO_GUEST = 1


class Kick(IntEnum):
    """How a requested interrupt reached its VP."""

    MERGED = 0
    """It was requested already: whoever did that owed the kick."""
    NONE = 1
    """The VP looks by itself."""
    SEMAPHORE = 2
    SIGNAL = 3


class WaitedFor(IntEnum):
    """What a thread of the guest kernel waits for."""

    COMPLETION = 0
    WAIT_QUEUE = 1
    MUTEX = 2
    SPINLOCK = 3


def _table(*rows: tuple[str, str] | tuple[str, str, str] | tuple[str, str, str, str]) -> dict[str, EventSpec]:
    """Rows of name, arguments, and for the kernel's events the print format and the order of declaration."""
    specs = {}
    for number, (name, arguments, *rest) in enumerate(rows, 1):
        fields = tuple(map(parse_argument, arguments.split()))
        declared = tuple(rest[1].split()) if len(rest) > 1 else tuple(field.name for field in fields)
        specs[name] = EventSpec(number, name, fields, rest[0] if rest else "", declared)
    return specs


EVENTS: Final = _table(
    # -- the minimum vocabulary ---------------------------------------------------------------------------
    ("offer", "relid:u32 generation:u32 connection_id:x32 sub_channel_index:u16"),
    ("rescind", "relid:u32 generation:u32"),
    ("release", "relid:u32 generation:u32 ret:s32"),
    ("post", "connection_id:x32 msgtype:u32:MessageType size:u32 status:u16:HvStatus serial:u64 claimer:x32"),
    ("slot_write", "position:u32 sint:u8 message_type:x32 msgtype:u32:MessageType serial:u64 queued:u32"),
    ("slot_read", "sint:u8 message_type:x32 msgtype:u32:MessageType serial:u64"),
    ("slot_free", "sint:u8 message_type:x32 serial:u64 pending:u8"),
    ("eom", "position:u32 sint:u8 delivered:u32"),
    ("flag_set", "position:u32 sint:u8 flag:u32 was_set:u8"),
    ("flag_clear", "sint:u8 flag:u32"),
    ("irq_raise", "position:u32 vector:x8"),
    ("isr_enter", "vector:x8"),
    ("isr_exit", "vector:x8"),
    ("tasklet_sched", "tasklet:u32:Tasklets relid:u32"),
    ("tasklet_run", "tasklet:u32:Tasklets relid:u32"),
    ("mask", "relid:u32 side:u8:Side"),
    ("unmask", "relid:u32 side:u8:Side bytes_to_read:u32"),
    ("ring_publish", "relid:u32 side:u8:Side write_index:u32 bytes:u32"),
    ("ring_release", "relid:u32 side:u8:Side read_index:u32 bytes:u32"),
    ("pending_size", "relid:u32 side:u8:Side size:u32"),
    ("signal", "relid:u32 side:u8:Side connection_id:x32"),
    ("req_alloc", "msgtype:u32:MessageType key:x32 request:u32 relid:u32"),
    ("req_complete", "msgtype:u32:MessageType key:x32 request:u32 relid:u32"),
    # `pfn` is the first page where they are neighbours, else 0.
    ("gpadl_add", "relid:u32 gpadl:x32 pages:u32 pfn:x64"),
    ("gpadl_drop", "relid:u32 gpadl:x32"),
    ("page_alloc", "pfn:x64 pages:u32 owner:x64"),
    ("page_free", "pfn:x64 pages:u32"),
    ("map", "relid:u32 gpadl:x32 pages:u32"),
    ("unmap", "relid:u32 gpadl:x32"),
    ("target_change", "relid:u32 target_vp:u32"),
    # A mutex is taken, and given back. An object is the GPA of its word, a name that of reports.
    ("lock", "lock:x64 actor:x32 name:str32"),
    ("unlock", "lock:x64 actor:x32 name:str32"),
    # A thread is about to sleep; wait_done is recorded when it goes on, wake by whoever woke it.
    ("wait", "what:u32:WaitedFor object:x64 name:str32"),
    ("wake", "what:u32:WaitedFor object:x64 actor:x32"),
    ("cpu_online", "cpu:u32 vp_index:u32"),
    ("cpu_offline", "cpu:u32 vp_index:u32"),
    ("fault", "operation:u32:ExitOperation code:u32:Fault argument:x64"),
    ("point", "point:u32:Point action:u32:PointAction relid:u32"),
    # -- ours ---------------------------------------------------------------------------------------------
    ("refused", "rule:str40 value:u64"),
    ("state", "relid:u32 old:u32:ChannelState new:u32:ChannelState"),
    ("pending_set", "position:u32 sint:u8 resident:x32"),
    ("work_queue", "queue:u32:QueueNumber function:u32:Works serial:u64"),
    ("work_run", "queue:u32:QueueNumber function:u32:Works serial:u64"),
    ("probe", "relid:u32 driver:u32 ret:s32 name:str24"),
    ("open", "relid:u32 openid:u32 gpadl:x32 ret:s32"),
    ("close", "relid:u32 ret:s32"),
    ("message_post", "position:u32 sint:u8 msgtype:u32:MessageType serial:u64 cause:u64 relid:u32"),
    ("task_take", "relid:u32 packets:u32"),
    ("uevent", "action:u32:Action relid:u32 seqnum:u64 subject:u8:Subject"),
    # -- the kernel's trace system `hyperv`, in the order of drivers/hv/hv_trace.h -------------------------
    ("vmbus_on_msg_dpc", "msgtype:uint:MessageType", "msgtype=%u"),
    ("vmbus_on_message", "msgtype:uint:MessageType", "msgtype=%u"),
    (
        "vmbus_onoffer",
        "child_relid:u32 monitorid:u8 is_ddc_int:u16/1 connection_id:u32 if_type:guid if_instance:guid "
        "chn_flags:u16 mmio_mb:u16 sub_idx:u16",
        "child_relid 0x%x, monitorid 0x%x, is_dedicated %d, connection_id 0x%x, if_type %pUl, if_instance %pUl, "
        "chn_flags 0x%x, mmio_megabytes %d, sub_channel_index %d",
    ),
    ("vmbus_onoffer_rescind", "child_relid:u32", "child_relid 0x%x"),
    ("vmbus_onopen_result", "child_relid:u32 openid:u32 status:u32", "child_relid 0x%x, openid %d, status %d"),
    (
        "vmbus_ongpadl_created",
        "child_relid:u32 gpadl:u32 status:u32",
        "child_relid 0x%x, gpadl 0x%x, creation_status %d",
    ),
    ("vmbus_onmodifychannel_response", "child_relid:u32 status:u32", "child_relid 0x%x, status %d"),
    ("vmbus_ongpadl_torndown", "gpadl:u32", "gpadl 0x%x"),
    ("vmbus_onversion_response", "ver:u8", "version_supported %d"),
    ("vmbus_request_offers", "ret:s32", "sending ret %d"),
    (
        "vmbus_open",
        "child_relid:u32 openid:u32 gpadlhandle:u32 target_vp:u32 offset:u32 ret:s32",
        "sending child_relid 0x%x, openid %d, gpadlhandle 0x%x, target_vp 0x%x, offset 0x%x, ret %d",
    ),
    ("vmbus_close_internal", "child_relid:u32 ret:s32", "sending child_relid 0x%x, ret %d"),
    (
        "vmbus_establish_gpadl_header",
        "child_relid:u32 gpadl:u32 range_buflen:u16 rangecount:u16 ret:s32",
        "sending child_relid 0x%x, gpadl 0x%x, range_buflen %d rangecount %d, ret %d",
    ),
    (
        "vmbus_establish_gpadl_body",
        "msgnumber:u32 gpadl:u32 ret:s32",
        "sending msgnumber %d, gpadl 0x%x, ret %d",
    ),
    (
        "vmbus_teardown_gpadl",
        "child_relid:u32 gpadl:u32 ret:s32",
        "sending child_relid 0x%x, gpadl 0x%x, ret %d",
    ),
    (
        "vmbus_negotiate_version",
        "ver:u32 target_vcpu:u32 int_page:u64 mon_page1:u64 mon_page2:u64 ret:s32",
        "sending vmbus_version_requested %d, target_vcpu 0x%x, pages %llx:%llx:%llx, ret %d",
        "ver target_vcpu ret int_page mon_page1 mon_page2",
    ),
    ("vmbus_release_relid", "child_relid:u32 ret:s32", "sending child_relid 0x%x, ret %d"),
    (
        "vmbus_send_tl_connect_request",
        "guest_id:guid host_id:guid ret:s32",
        "sending guest_endpoint_id %pUl, host_service_id %pUl, ret %d",
    ),
    (
        "vmbus_send_modifychannel",
        "child_relid:u32 target_vp:u32 ret:s32",
        "binding child_relid 0x%x to target_vp 0x%x, ret %d",
    ),
    ("vmbus_chan_sched", "relid:u32", "relid 0x%x"),
    ("vmbus_setevent", "relid:u32", "relid 0x%x"),
    ("vmbus_on_event", "relid:u32", "relid 0x%x"),
    # -- ours, again --------------------------------------------------------------------------------------
    # How an interrupt that was requested (irq_raise) reached its VP.
    ("kick", "position:u32 vector:x8 how:u8:Kick"),
    ("poll", "paid:u8 waited_ns:u64"),
    ("halt", "timeout_ns:u64"),
    ("halt_end", "waited_ns:u64"),
    # The bytes of a ring's data area, once for each process that attaches to it: indices are modulo this.
    ("ring_attach", "relid:u32 side:u8:Side data_size:u32 write_index:u32 read_index:u32"),
    ("ring_full", "relid:u32 side:u8:Side needed:u32 free:u32"),
    ("ring_room", "relid:u32 side:u8:Side free:u32 wanted:u32"),
    ("req_free", "msgtype:u32:MessageType key:x32 request:u32 relid:u32"),
    ("host_state", "relid:u32 generation:u32 old:u32:HostChannelState new:u32:HostChannelState"),
    ("gpadl_state", "relid:u32 gpadl:x32 old:u32:GpadlState new:u32:GpadlState"),
    ("conn_state", "old:u32:ConnectionState new:u32:ConnectionState"),
    # The host's control plane takes a message of the guest's; its answers name it as their cause until message_done.
    ("message_take", "msgtype:u32:MessageType serial:u64 size:u32 relid:u32"),
    ("message_done", "msgtype:u32:MessageType serial:u64"),
    ("work_done", "queue:u32:QueueNumber function:u32:Works serial:u64"),
    ("tasklet_done", "tasklet:u32:Tasklets relid:u32"),
    ("probe_start", "relid:u32 driver:u32 name:str24"),
    ("remove_start", "relid:u32 driver:u32 name:str24"),
    ("remove", "relid:u32 driver:u32 name:str24"),
    ("doorbell", "connection_id:x32"),
    ("vmexit", "operation:u32:ExitOperation argument0:x64 argument1:x64 result:x64 fault:u32:Fault waited_ns:u64"),
    ("process_start", "pid:u32 kind:u8:ActorKind cpu:u32 name:str16"),
    ("process_stop", "pid:u32 status:s32 name:str16"),
    ("task_run", "program:u32:Program cpu:u32 relid:u32"),
    ("task_done", "program:u32:Program cpu:u32 state:u32:TaskState"),
    # A round trip of a guest program that waits for each answer (`latency`), by its transaction id.
    ("request_start", "relid:u32 trans_id:x64"),
    ("request_end", "relid:u32 trans_id:x64 packets:u32"),
    # A line of whoever watches: a finding, a death.
    ("mark", "text:str48"),
    # Legal, and led to nothing: a message on a channel that was taken back, say.
    ("ignored", "rule:str40 value:u64"),
    # The guest posts a message; `post` says what came of it, as the guest and the host see it.
    ("post_begin", "connection_id:x32 msgtype:u32:MessageType size:u32 relid:u32"),
    # Continues the record before it of the same actor: how many bytes are left, these included.
    ("bytes", "left:u64 data:hex40"),
    # The guest is gone (DETACH, or its death): so many messages that waited for its slots are dropped.
    ("reset", "dropped:u32"),
    # A fault of the plan struck: `value` is its time or number, `hits` how often it struck so far.
    ("fault_hit", "kind:u32:FaultKind relid:u32 value:x64 hits:u64"),
    # Synthetic timers; times are reference time (100 ns). A tick that is dropped, and a message that waited and is
    # taken back because its timer was written, never come.
    ("timer_armed", "position:u32 timer:u8 sint:u8 periodic:u8 count:u64 expiration_time:u64"),
    ("timer_expired", "position:u32 timer:u8 sint:u8 expiration_time:u64 missed:u64"),
    ("timer_delivered", "position:u32 timer:u8 sint:u8 expiration_time:u64 delivery_time:u64"),
    ("timer_dropped", "position:u32 timer:u8 sint:u8 expiration_time:u64"),
    ("timer_withdrawn", "position:u32 timer:u8 sint:u8 expiration_time:u64"),
    ("clock_event", "timer:u8 expiration_time:u64 delivery_time:u64"),
    # The host holds a processor because of signals without cause on a channel, and lets it run on.
    ("freeze", "position:u32 relid:u32 signals:u32"),
    ("thaw", "position:u32"),
    # Bytes of a ring that were loaded before the index that covers them: given to the reader, or refused.
    ("stale_read", "relid:u32 side:u8:Side read_index:u32 write_index:u32 refused:u8"),
    ("wait_done", "what:u32:WaitedFor object:x64"),
)
"""All events that a recording may hold; numbers never change, new ones go last, as do new arguments of one.

Types: `emu.event_fields`.
"""

HYPERV_EVENTS: Final = tuple(spec for spec in EVENTS.values() if spec.format)
"""The kernel's tracepoints of the system `hyperv`; `ret` is what the kernel function posted with, 0 or below."""

BY_NUMBER: Final = {spec.number: spec for spec in EVENTS.values()}

E_OFFER: Final = EVENTS["offer"].number
E_RESCIND: Final = EVENTS["rescind"].number
E_RELEASE: Final = EVENTS["release"].number
E_POST: Final = EVENTS["post"].number
E_SLOT_WRITE: Final = EVENTS["slot_write"].number
E_SLOT_READ: Final = EVENTS["slot_read"].number
E_SLOT_FREE: Final = EVENTS["slot_free"].number
E_EOM: Final = EVENTS["eom"].number
E_FLAG_SET: Final = EVENTS["flag_set"].number
E_FLAG_CLEAR: Final = EVENTS["flag_clear"].number
E_IRQ_RAISE: Final = EVENTS["irq_raise"].number
E_ISR_ENTER: Final = EVENTS["isr_enter"].number
E_ISR_EXIT: Final = EVENTS["isr_exit"].number
E_TASKLET_SCHED: Final = EVENTS["tasklet_sched"].number
E_TASKLET_RUN: Final = EVENTS["tasklet_run"].number
E_MASK: Final = EVENTS["mask"].number
E_UNMASK: Final = EVENTS["unmask"].number
E_RING_PUBLISH: Final = EVENTS["ring_publish"].number
E_RING_RELEASE: Final = EVENTS["ring_release"].number
E_PENDING_SIZE: Final = EVENTS["pending_size"].number
E_SIGNAL: Final = EVENTS["signal"].number
E_REQ_ALLOC: Final = EVENTS["req_alloc"].number
E_REQ_COMPLETE: Final = EVENTS["req_complete"].number
E_GPADL_ADD: Final = EVENTS["gpadl_add"].number
E_GPADL_DROP: Final = EVENTS["gpadl_drop"].number
E_PAGE_ALLOC: Final = EVENTS["page_alloc"].number
E_PAGE_FREE: Final = EVENTS["page_free"].number
E_MAP: Final = EVENTS["map"].number
E_UNMAP: Final = EVENTS["unmap"].number
E_TARGET_CHANGE: Final = EVENTS["target_change"].number
E_LOCK: Final = EVENTS["lock"].number
E_UNLOCK: Final = EVENTS["unlock"].number
E_WAIT: Final = EVENTS["wait"].number
E_WAKE: Final = EVENTS["wake"].number
E_CPU_ONLINE: Final = EVENTS["cpu_online"].number
E_CPU_OFFLINE: Final = EVENTS["cpu_offline"].number
E_FAULT: Final = EVENTS["fault"].number
E_POINT: Final = EVENTS["point"].number
E_REFUSED: Final = EVENTS["refused"].number
E_STATE: Final = EVENTS["state"].number
E_PENDING_SET: Final = EVENTS["pending_set"].number
E_WORK_QUEUE: Final = EVENTS["work_queue"].number
E_WORK_RUN: Final = EVENTS["work_run"].number
E_PROBE: Final = EVENTS["probe"].number
E_OPEN: Final = EVENTS["open"].number
E_CLOSE: Final = EVENTS["close"].number
E_MESSAGE_POST: Final = EVENTS["message_post"].number
E_TASK_TAKE: Final = EVENTS["task_take"].number
E_UEVENT: Final = EVENTS["uevent"].number
E_VMBUS_ON_MSG_DPC: Final = EVENTS["vmbus_on_msg_dpc"].number
E_VMBUS_ON_MESSAGE: Final = EVENTS["vmbus_on_message"].number
E_VMBUS_ONOFFER: Final = EVENTS["vmbus_onoffer"].number
E_VMBUS_ONOFFER_RESCIND: Final = EVENTS["vmbus_onoffer_rescind"].number
E_VMBUS_ONOPEN_RESULT: Final = EVENTS["vmbus_onopen_result"].number
E_VMBUS_ONGPADL_CREATED: Final = EVENTS["vmbus_ongpadl_created"].number
E_VMBUS_ONMODIFYCHANNEL_RESPONSE: Final = EVENTS["vmbus_onmodifychannel_response"].number
E_VMBUS_ONGPADL_TORNDOWN: Final = EVENTS["vmbus_ongpadl_torndown"].number
E_VMBUS_ONVERSION_RESPONSE: Final = EVENTS["vmbus_onversion_response"].number
E_VMBUS_REQUEST_OFFERS: Final = EVENTS["vmbus_request_offers"].number
E_VMBUS_OPEN: Final = EVENTS["vmbus_open"].number
E_VMBUS_CLOSE_INTERNAL: Final = EVENTS["vmbus_close_internal"].number
E_VMBUS_ESTABLISH_GPADL_HEADER: Final = EVENTS["vmbus_establish_gpadl_header"].number
E_VMBUS_ESTABLISH_GPADL_BODY: Final = EVENTS["vmbus_establish_gpadl_body"].number
E_VMBUS_TEARDOWN_GPADL: Final = EVENTS["vmbus_teardown_gpadl"].number
E_VMBUS_NEGOTIATE_VERSION: Final = EVENTS["vmbus_negotiate_version"].number
E_VMBUS_RELEASE_RELID: Final = EVENTS["vmbus_release_relid"].number
E_VMBUS_SEND_TL_CONNECT_REQUEST: Final = EVENTS["vmbus_send_tl_connect_request"].number
E_VMBUS_SEND_MODIFYCHANNEL: Final = EVENTS["vmbus_send_modifychannel"].number
E_VMBUS_CHAN_SCHED: Final = EVENTS["vmbus_chan_sched"].number
E_VMBUS_SETEVENT: Final = EVENTS["vmbus_setevent"].number
E_VMBUS_ON_EVENT: Final = EVENTS["vmbus_on_event"].number
E_KICK: Final = EVENTS["kick"].number
E_POLL: Final = EVENTS["poll"].number
E_HALT: Final = EVENTS["halt"].number
E_HALT_END: Final = EVENTS["halt_end"].number
E_RING_ATTACH: Final = EVENTS["ring_attach"].number
E_RING_FULL: Final = EVENTS["ring_full"].number
E_RING_ROOM: Final = EVENTS["ring_room"].number
E_REQ_FREE: Final = EVENTS["req_free"].number
E_HOST_STATE: Final = EVENTS["host_state"].number
E_GPADL_STATE: Final = EVENTS["gpadl_state"].number
E_CONN_STATE: Final = EVENTS["conn_state"].number
E_MESSAGE_TAKE: Final = EVENTS["message_take"].number
E_MESSAGE_DONE: Final = EVENTS["message_done"].number
E_WORK_DONE: Final = EVENTS["work_done"].number
E_TASKLET_DONE: Final = EVENTS["tasklet_done"].number
E_PROBE_START: Final = EVENTS["probe_start"].number
E_REMOVE_START: Final = EVENTS["remove_start"].number
E_REMOVE: Final = EVENTS["remove"].number
E_DOORBELL: Final = EVENTS["doorbell"].number
E_VMEXIT: Final = EVENTS["vmexit"].number
E_PROCESS_START: Final = EVENTS["process_start"].number
E_PROCESS_STOP: Final = EVENTS["process_stop"].number
E_TASK_RUN: Final = EVENTS["task_run"].number
E_TASK_DONE: Final = EVENTS["task_done"].number
E_REQUEST_START: Final = EVENTS["request_start"].number
E_REQUEST_END: Final = EVENTS["request_end"].number
E_MARK: Final = EVENTS["mark"].number
E_IGNORED: Final = EVENTS["ignored"].number
E_POST_BEGIN: Final = EVENTS["post_begin"].number
E_BYTES: Final = EVENTS["bytes"].number
E_RESET: Final = EVENTS["reset"].number
E_FAULT_HIT: Final = EVENTS["fault_hit"].number
E_TIMER_ARMED: Final = EVENTS["timer_armed"].number
E_TIMER_EXPIRED: Final = EVENTS["timer_expired"].number
E_TIMER_DELIVERED: Final = EVENTS["timer_delivered"].number
E_TIMER_DROPPED: Final = EVENTS["timer_dropped"].number
E_TIMER_WITHDRAWN: Final = EVENTS["timer_withdrawn"].number
E_CLOCK_EVENT: Final = EVENTS["clock_event"].number
E_FREEZE: Final = EVENTS["freeze"].number
E_THAW: Final = EVENTS["thaw"].number
E_STALE_READ: Final = EVENTS["stale_read"].number
E_WAIT_DONE: Final = EVENTS["wait_done"].number


def refused_words(rule: str, value: int = 0) -> tuple[int, ...]:
    """The words of a `refused` record: the rule that the peer broke, and what it held."""
    return EVENTS["refused"].pack(text_value(rule, 40), value & _U64)


Record = Callable[..., None]
"""`record(event, a, b, c, d, e, f)`: the event's number and up to six u64 words."""


Bound = Callable[[], None]
"""Records always the same event with the same words, but for time, sequence and context."""
BoundFirst = Callable[..., None]
"""`(a, b=0)`: the same for an event whose last words differ."""
BoundPair = Callable[[int], None]
"""Records always the same two events: the first at the time it is given (CLOCK_MONOTONIC ns), the second 1 ns later, so
that whoever sorts by time has them in order."""
BoundMove = Callable[[int], None]
"""`(index)`: stores an index of a ring, and records that and by how many bytes it moved."""


class Publishes(NamedTuple):
    """How to record the publishes of a ring where they are made, in one context: for a writer whose batches are so
    quick that a call is much (`emu.ring_producer`). Otherwise `publish` does it, and stores the index.

    The next record is `pack(memory, at, time, count, same, index, bytes moved)`, its sequence modulo 2^32. Then `count`
    is one more, `at` is `RECORD_BYTES` more, or `begin` where that is `end`, `store(count)` shows the record to the
    drain, and `before` is the index, which may be stored then. `shared` are these three, as `sharing` takes them: they
    are the recorder's, and whatever else is recorded goes on from there.
    """

    publish: BoundMove
    memory: mmap.mmap
    begin: int
    end: int
    pack: Callable[..., None]
    same: bytes
    store: Callable[[int], None]
    shared: Mapping[str, CellType]


Bind = Callable[..., Bound]
BindFirst = Callable[..., BoundFirst]
BindPair = Callable[[tuple[int, ...], tuple[int, ...]], BoundPair]
BindMove = Callable[..., BoundMove]
BindPublishes = Callable[..., Publishes]


def not_recorded(*_what: int) -> None:
    """What stands for `record` where a machine does not record."""


class OneByOne:
    """What binds by calling `record`: for whoever keeps records otherwise than in a ring."""

    now_ns = staticmethod(time.monotonic_ns)

    record: Record

    def bind(self, event: int, *words: int) -> Bound:
        """As `Recorder.bind`."""
        return lambda: self.record(event, *words)

    def bind_first(self, event: int, *words: int) -> BoundFirst:
        """As `Recorder.bind_first`."""
        return lambda *last: self.record(event, *words, *last)

    def bind_pair(self, first: tuple[int, ...], second: tuple[int, ...]) -> BoundPair:
        """As `Recorder.bind_pair`, at whatever time it is."""

        def both(_time_ns: int) -> None:
            self.record(*first)
            self.record(*second)

        return both

    def bind_publish(
        self, words: tuple[int, int], size: int, store: Callable[[int], None], load: Callable[[], int], *, sole: bool
    ) -> BoundMove:
        """As `Recorder.bind_publish`."""

        def publish(index: int) -> None:
            self.record(E_RING_PUBLISH, *words, index, (index - load()) % size)
            store(index)

        return publish

    def bind_publishes(self, *_what: object) -> None:
        """Nobody else records here: whoever publishes uses `bind_publish`."""

    def bind_release(
        self,
        words: tuple[int, int],
        size: int,
        store: Callable[[int], None],
        load: Callable[[], int],
        waited_for: Callable[[], int],
        room: Callable[[int, int], None],
        *,
        sole: bool,
    ) -> BoundMove:
        """As `Recorder.bind_release`."""

        def release(index: int) -> None:
            freed = (index - load()) % size
            store(index)
            self.record(E_RING_RELEASE, *words, index, freed)
            if waited_for():
                room(index, freed)

        return release


class Recorder:
    """Writes one actor's ring; `vp` and `context` are stamped on each record.

    `record` writes one; the oldest gives way when the ring is full. A word that is no u64 (an errno below 0) is stored
    modulo 2^64.

    What happens over and over with the same words is bound once: `bind` takes an event with all its words, `bind_first`
    with all but the last two (or the last one and none), `bind_pair` two events, each a tuple with all its words. The
    functions that these return take 0.75, 0.8 and, for both records together, 1.0 of what `record` takes.

    `bind_publish` and `bind_release` are a ring's stores of its indices, each with its record in one function: a
    publish records before it stores, since no effect may precede its cause, a release behind it. `words` are (relid,
    side), `load` loads the index; with `sole` nobody else stores it, so it is loaded once. A release then looks at
    `waited_for` and calls `room(index, freed bytes)` if that is not 0. `bind_publishes` is `bind_publish` with `sole`,
    together with what a writer needs that records by itself, in the context of now.
    """

    __slots__ = (
        "_drained",
        "_written",
        "bind",
        "bind_first",
        "bind_pair",
        "bind_publish",
        "bind_publishes",
        "bind_release",
        "context",
        "record",
        "vp",
    )

    now_ns = staticmethod(time.monotonic_ns)
    """The time that records have, for `bind_pair`."""
    record: Record
    bind: Bind
    bind_first: BindFirst
    bind_pair: BindPair
    bind_publish: BindMove
    bind_publishes: BindPublishes
    bind_release: BindMove

    keeps_bytes: ClassVar[bool] = False
    """Whether `keep` does anything: whoever has to collect the bytes first looks here when it attaches."""

    def __init__(self, segment: Segment, slot: int, *, vp: int = NO_VP, context: int = Context.HOST) -> None:
        try:
            # A first touch of a full tmpfs would be SIGBUS, in the middle of somewhere.
            segment.reserve(_RINGS + slot * CAPACITY * RECORD_BYTES, CAPACITY * RECORD_BYTES)
        except OSError as error:
            size = CAPACITY * RECORD_BYTES
            text = f"no room for {size} bytes of recording in /dev/shm: {error.strerror}; free some, or record nothing"
            raise MissingPrerequisite(text) from None
        self.vp = vp
        self.context = int(context)
        self._written = segment.view.cell_u64(_HEADS + slot * 64).load
        self._drained = segment.view.cell_u64(_DRAINED + slot * 64).load
        made = _functions(self, segment, slot)
        self.record, self.bind, self.bind_first, self.bind_pair = made.record, made.bind, made.first, made.pair
        self.bind_publish, self.bind_publishes, self.bind_release = made.publish, made.publishes, made.release

    def keep(self, data: bytes) -> None:
        """Keep the bytes that the record before this one is about: not here, only where that was asked for."""

    def behind(self) -> int:
        """How many of its records nobody has drained yet; where nobody drains, all of them."""
        return self._written() - self._drained()

    def start(self, pid: int, kind: int, cpu: int, name: str) -> None:
        """Say who records here: the first record of an actor."""
        self.record(E_PROCESS_START, *EVENTS["process_start"].pack(pid, kind, cpu, text_value(name, 16)))

    def stop(self, pid: int, name: str, status: int = 0) -> None:
        """Say that this actor ends of its own accord."""
        self.record(E_PROCESS_STOP, *EVENTS["process_stop"].pack(pid, status, text_value(name, 16)))


class _Functions(NamedTuple):
    """`record`, and what binds."""

    record: Record
    bind: Bind
    first: BindFirst
    pair: BindPair
    publish: BindMove
    publishes: BindPublishes
    release: BindMove


def _functions(recorder: Recorder, segment: Segment, slot: int) -> _Functions:
    """Make `record` and what binds: functions over variables that they share.

    A method over attributes takes a tenth longer.
    """
    memory, now = segment.memory, time.monotonic_ns
    pack, pack_same, pack_both = _PACKED.pack_into, _SAME.pack_into, _SAME_TWICE.pack_into
    head = segment.view.cell_u64(_HEADS + slot * 64)
    store, count = head.store, head.load()
    begin = _RINGS + slot * CAPACITY * RECORD_BYTES
    end = begin + CAPACITY * RECORD_BYTES
    step = RECORD_BYTES  # a variable that is shared is loaded in half of the time
    at = begin + count % CAPACITY * step

    def record(event: int, a: int = 0, b: int = 0, c: int = 0, d: int = 0, e: int = 0, f: int = 0) -> None:
        nonlocal at, count
        try:
            pack(memory, at, now(), count, event, recorder.vp, recorder.context, a, b, c, d, e, f)
        except struct_error:
            words = (value & _U64 for value in (a, b, c, d, e, f))
            pack(memory, at, now(), count & 0xFFFFFFFF, event, recorder.vp, recorder.context, *words)
        count += 1
        at += step
        if at == end:
            at = begin
        # After the bytes: the drain reads whole records only.
        store(count)

    def bind(event: int, *words: int) -> Bound:
        same = _by_context(recorder.vp, event, *words)

        def bound() -> None:
            nonlocal at, count
            try:
                pack_same(memory, at, now(), count, same[recorder.context])
            except struct_error:
                pack_same(memory, at, now(), count & 0xFFFFFFFF, same[recorder.context])
            count += 1
            at += step
            if at == end:
                at = begin
            store(count)

        return bound

    def bind_first(event: int, *words: int) -> BoundFirst:
        same_bytes, left = _SAME_BYTES - (WORDS - len(words)) * 8, WORDS - len(words) - 2
        pack_two = Struct(f"@LI{same_bytes}sLL{8 * left}x").pack_into
        same = tuple(record[:same_bytes] for record in _by_context(recorder.vp, event, *words))

        def bound_first(a: int, b: int = 0) -> None:
            nonlocal at, count
            try:
                pack_two(memory, at, now(), count, same[recorder.context], a, b)
            except struct_error:
                pack_two(memory, at, now(), count & 0xFFFFFFFF, same[recorder.context], a & _U64, b & _U64)
            count += 1
            at += step
            if at == end:
                at = begin
            store(count)

        return bound_first

    def bind_pair(first: tuple[int, ...], second: tuple[int, ...]) -> BoundPair:
        same, other = _by_context(recorder.vp, *first), _by_context(recorder.vp, *second)
        last = end - step

        def bound_pair(time_ns: int) -> None:
            nonlocal at, count
            context = recorder.context
            if at != last and count < _LAST_SEQUENCE:
                pack_both(memory, at, time_ns, count, same[context], time_ns + 1, count + 1, other[context])
                count += 2
                at += 2 * step
                if at == end:
                    at = begin
            else:
                for behind, part in enumerate((same, other)):
                    pack_same(memory, at, time_ns + behind, count & 0xFFFFFFFF, part[context])
                    count += 1
                    at = begin if at == last else at + step
            store(count)

        return bound_pair

    # One function each, from the index to its store: a call more and a remainder are a third of such a record.
    pack_move = Struct("@LI20sLL16x").pack_into

    def bind_publish(
        words: tuple[int, int], size: int, store_index: Callable[[int], None], load: Callable[[], int], *, sole: bool
    ) -> BoundMove:
        same = tuple(record[:20] for record in _by_context(recorder.vp, E_RING_PUBLISH, *words))
        before = load()

        def publish(index: int) -> None:
            nonlocal at, count, before
            moved = index - (before if sole else load())
            if moved < 0:
                moved += size
            try:
                pack_move(memory, at, now(), count, same[recorder.context], index, moved)
            except struct_error:
                pack_move(memory, at, now(), count & 0xFFFFFFFF, same[recorder.context], index, moved % size)
            count += 1
            at += step
            if at == end:
                at = begin
            store(count)
            before = index
            store_index(index)

        return publish

    def bind_publishes(
        words: tuple[int, int], size: int, store_index: Callable[[int], None], load: Callable[[], int]
    ) -> Publishes:
        publish = bind_publish(words, size, store_index, load, sole=True)
        same = _by_context(recorder.vp, E_RING_PUBLISH, *words)[recorder.context][:20]
        its = variables(publish)
        shared = {name: its[name] for name in ("at", "before", "count")}
        return Publishes(publish, memory, begin, end, pack_move, same, store, shared)

    def bind_release(
        words: tuple[int, int],
        size: int,
        store_index: Callable[[int], None],
        load: Callable[[], int],
        waited_for: Callable[[], int],
        room: Callable[[int, int], None],
        *,
        sole: bool,
    ) -> BoundMove:
        same = tuple(record[:20] for record in _by_context(recorder.vp, E_RING_RELEASE, *words))
        before = load()

        def release(index: int) -> None:
            nonlocal at, count, before
            moved = index - (before if sole else load())
            if moved < 0:
                moved += size
            store_index(index)
            try:
                pack_move(memory, at, now(), count, same[recorder.context], index, moved)
            except struct_error:
                pack_move(memory, at, now(), count & 0xFFFFFFFF, same[recorder.context], index, moved % size)
            count += 1
            at += step
            if at == end:
                at = begin
            store(count)
            before = index
            if waited_for():
                room(index, moved)

        return release

    return _Functions(record, bind, bind_first, bind_pair, bind_publish, bind_publishes, bind_release)


def _by_context(vp: int, event: int, *words: int) -> tuple[bytes, ...]:
    """A record without its time and sequence, for each context."""
    values = [value & _U64 for value in words] + [0] * (WORDS - len(words))
    return tuple(RECORD.pack(0, 0, event, vp, context, *values)[-_SAME_BYTES:] for context in Context)


class BytesRecorder(Recorder):
    """A recorder that also keeps the bytes of messages and of what rings publish, in records of their own."""

    __slots__ = ()

    keeps_bytes = True

    def keep(self, data: bytes) -> None:
        """Keep the bytes that the record before this one is about."""
        for at in range(0, len(data), _WORDS.size):
            words = _WORDS.unpack(data[at : at + _WORDS.size].ljust(_WORDS.size, b"\0"))
            self.record(E_BYTES, len(data) - at, *words)


def recorded_so_far(segment: Segment) -> int:
    """How many records all actors have written: two looks with the same answer have no record between them."""
    load = segment.view.load_u64
    return sum(load(_HEADS + slot * 64) for slot in range(ACTORS))


class Drain:
    """Copies what actors recorded since the last look, oldest first; counts what was overwritten."""

    def __init__(self, segment: Segment, *, tells: bool = False) -> None:
        """`tells`: actors learn how far it has come (`Recorder.behind`) and may wait for it; one drain of a machine."""
        self._segment = segment
        self._heads = [segment.view.cell_u64(_HEADS + slot * 64) for slot in range(ACTORS)]
        self._tell = [segment.view.cell_u64(_DRAINED + slot * 64).store for slot in range(ACTORS)] if tells else None
        self._taken = [0] * ACTORS
        self.dropped = 0

    def recorded(self) -> list[int]:
        """Slots of the actors that recorded since they were last taken."""
        return [slot for slot, head in enumerate(self._heads) if head.load() != self._taken[slot]]

    def take(self, slot: int) -> bytes:
        """New records of one actor as raw bytes (a multiple of 64)."""
        head = self._heads[slot].load()
        first = self._taken[slot]
        if head <= first:
            return b""
        if head - first > CAPACITY:
            self.dropped += head - CAPACITY - first
            first = head - CAPACITY
        base = _RINGS + slot * CAPACITY * RECORD_BYTES
        start, end = first & (CAPACITY - 1), head & (CAPACITY - 1)
        memory = self._segment.memory
        if start < end:
            raw = memory[base + start * RECORD_BYTES : base + end * RECORD_BYTES]
        else:
            raw = (
                memory[base + start * RECORD_BYTES : base + CAPACITY * RECORD_BYTES]
                + memory[base : base + end * RECORD_BYTES]
            )
        # The writer may have lapped us while we copied: what it overwrote meanwhile is not ours any more.
        torn = max(0, self._heads[slot].load() + WRITTEN_AT_ONCE - CAPACITY - first)
        if torn:
            self.dropped += min(torn, head - first)
            raw = raw[torn * RECORD_BYTES :]
        self._taken[slot] = head
        if self._tell is not None:
            self._tell[slot](head)
        return raw
