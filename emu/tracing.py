"""The recorder: fixed-size records in the `trace` segment, one ring and one writer an actor.

A record is 64 bytes: time (CLOCK_MONOTONIC ns, u64), the writer's own sequence (u32), event (u16), VP index
(u8, 255 none), context (u8), six u64 arguments. Rings overwrite their oldest records; whoever drains counts
what it missed. Event names and argument names stand in `EVENTS`, the one table of the recorder.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from struct import error as struct_error
from typing import Final

from emu.control import ACTORS
from emu.errors import MissingPrerequisite
from emu.ipc.segments import Segment

RECORD: Final = Struct("<QIHBBQQQQQQ")
RECORD_BYTES: Final = RECORD.size
CAPACITY: Final = 8_192
_HEADS: Final = 4_096
_RINGS: Final = _HEADS + ACTORS * 64
TRACE_HEAD_BYTES: Final = _RINGS
"""What every reader touches: the heads of all rings. The rings get their memory from their writers."""
TRACE_BYTES: Final = _RINGS + ACTORS * CAPACITY * RECORD_BYTES
NO_VP: Final = 255
_U64: Final = (1 << 64) - 1


class Context(IntEnum):
    """Where in a process a record was made."""

    HOST = 0
    ISR = 1
    TASKLET = 2
    QUEUE = 3
    TASK = 4
    BOOT = 5


@dataclass(frozen=True, slots=True)
class EventSpec:
    """An event's number, name and the names of its (at most six) arguments."""

    number: int
    name: str
    arguments: tuple[str, ...]


def _table(*rows: tuple[str, str]) -> dict[str, EventSpec]:
    return {name: EventSpec(number, name, tuple(arguments.split())) for number, (name, arguments) in enumerate(rows, 1)}


EVENTS: Final = _table(
    ("offer", "relid generation connection_id sub_channel_index"),
    ("rescind", "relid generation"),
    ("release", "relid generation ret"),
    ("post", "connection_id msgtype size status"),
    ("slot_write", "position sint message_type msgtype serial queued"),
    ("slot_read", "sint message_type msgtype serial"),
    ("slot_free", "sint message_type serial pending"),
    ("eom", "position sint delivered"),
    ("flag_set", "position sint flag was_set"),
    ("flag_clear", "sint flag"),
    ("irq_raise", "position vector"),
    ("isr_enter", "vector"),
    ("isr_exit", "vector"),
    ("tasklet_sched", "tasklet relid"),
    ("tasklet_run", "tasklet relid"),
    ("mask", "relid side"),
    ("unmask", "relid side bytes_to_read"),
    ("ring_publish", "relid side write_index packets"),
    ("ring_release", "relid side read_index bytes"),
    ("pending_size", "relid side size"),
    ("signal", "relid side connection_id"),
    ("req_alloc", "msgtype key request"),
    ("req_complete", "msgtype key request status"),
    ("gpadl_add", "relid gpadl pages"),
    ("gpadl_drop", "relid gpadl"),
    ("page_alloc", "pfn pages owner"),
    ("page_free", "pfn pages"),
    ("map", "relid gpadl pages"),
    ("unmap", "relid gpadl"),
    ("target_change", "relid target_vp"),
    ("lock", "lock actor"),
    ("unlock", "lock actor"),
    ("wait", "what object"),
    ("wake", "what object actor"),
    ("cpu_online", "cpu vp_index"),
    ("cpu_offline", "cpu vp_index"),
    ("fault", "operation code"),
    ("point", "point action"),
    ("refused", "rule value"),
    ("state", "relid old new"),
    ("pending_set", "position sint resident"),
    ("work_queue", "queue function serial"),
    ("work_run", "queue function serial"),
    ("probe", "relid driver ret"),
    ("open", "relid openid gpadl ret"),
    ("close", "relid ret"),
    ("message_post", "position sint msgtype serial"),
    ("task_take", "relid packets"),
    ("uevent", "action relid seqnum"),
)
"""All events that a recording may hold; numbers never change, new ones go last."""

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


class Recorder:
    """Writes one actor's ring; `vp` and `context` are stamped on each record."""

    __slots__ = ("_at", "_base", "_memory", "_pack", "_store", "context", "count", "vp")

    def __init__(self, segment: Segment, slot: int, *, vp: int = NO_VP, context: int = Context.HOST) -> None:
        self._memory = segment.memory
        self._base = _RINGS + slot * CAPACITY * RECORD_BYTES
        try:
            # A first touch of a full tmpfs would be SIGBUS, in the middle of somewhere.
            segment.reserve(self._base, CAPACITY * RECORD_BYTES)
        except OSError as error:
            size = CAPACITY * RECORD_BYTES
            raise MissingPrerequisite(f"no room for {size} bytes of recording: {error.strerror}") from None
        head = segment.view.cell_u64(_HEADS + slot * 64)
        self._store = head.store
        self.count = head.load()
        self._pack = RECORD.pack_into
        self.vp = vp
        self.context = int(context)

    def record(self, event: int, a: int = 0, b: int = 0, c: int = 0, d: int = 0, e: int = 0, f: int = 0) -> None:
        """Write one record; the oldest one gives way when the ring is full.

        Arguments are u64; one that is not (an errno below 0) is stored modulo 2^64.
        """
        count = self.count
        at = self._base + (count & (CAPACITY - 1)) * RECORD_BYTES
        sequence = count & 0xFFFFFFFF
        now, vp, context = time.monotonic_ns(), self.vp, self.context
        try:
            self._pack(self._memory, at, now, sequence, event, vp, context, a, b, c, d, e, f)
        except struct_error:
            a, b, c, d, e, f = (value & _U64 for value in (a, b, c, d, e, f))
            self._pack(self._memory, at, now, sequence, event, vp, context, a, b, c, d, e, f)
        self.count = count + 1
        # After the bytes: the drain reads whole records only.
        self._store(count + 1)


class Drain:
    """Copies what actors recorded since the last look, oldest first; counts what was overwritten."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._heads = [segment.view.cell_u64(_HEADS + slot * 64) for slot in range(ACTORS)]
        self._taken = [0] * ACTORS
        self.dropped = 0

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
        torn = max(0, self._heads[slot].load() + 1 - CAPACITY - first)
        if torn:
            self.dropped += min(torn, head - first)
            raw = raw[torn * RECORD_BYTES :]
        self._taken[slot] = head
        return raw
