"""A record of the guest kernel as plain values, field by field under the kernel's names.

The record classes are the layout, so what a record says follows from its fields: words and atomic words are
numbers, locks are who holds them, completions and wait queues who waits. What means more than its number has a
line in `MEANINGS`. Links of lists and a driver's private words are left out; nothing is locked, nothing written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final
from uuid import UUID

from emu.wire.device_classes import class_of
from emu.wire.messages import MessageType
from emu.wire.versions import version_text
from guestproc.kernel.functions import CHANNEL_CALLBACKS, DRIVERS, TASKLET_FUNCTIONS
from guestproc.kernel.layout import (
    CallbackMode,
    Channel,
    ChannelState,
    Connection,
    ConnectionState,
    Cpu,
    Device,
    Driver,
    Request,
)
from guestproc.kernel.lists import ListHead, ListLink
from guestproc.kernel.locks import Mutex, Spinlock
from guestproc.kernel.napi import Napi
from guestproc.kernel.records import INDEX_MASK, Record, Table
from guestproc.kernel.smp import CallRecord
from guestproc.kernel.tasklet import Tasklet
from guestproc.kernel.wait import Completion, WaitQueue
from guestproc.kernel.waiters import Waiter
from tools.state_node import Value

NameOf = Callable[[int], str]
"""Name of an actor number."""

SKIPPED: Final = frozenset({"offermsg", "driver_state", "hash_next", "response", "numa_cpus", "hv_numa_map"})


def record_values(record: Record, name_of: NameOf, waiters: Table[Waiter]) -> dict[str, Value | dict[str, Value]]:
    """Every field that means something to a reader, by name. AssertionError: the record went meanwhile."""
    meanings = MEANINGS.get(type(record), {})
    found: dict[str, Value | dict[str, Value]] = {}
    for field in record.FIELDS:
        if field.name in SKIPPED:
            continue
        raw = getattr(record, field.name)
        if isinstance(raw, ListHead | ListLink | CallRecord):
            continue
        value = _plain(raw, name_of, waiters)
        meaning = meanings.get(field.name)
        found[field.name] = value if meaning is None else meaning(value)
    return found


def _plain(raw: Any, name_of: NameOf, waiters: Table[Waiter]) -> Any:
    if isinstance(raw, int):
        return raw
    if isinstance(raw, bytes):
        return raw.hex()
    if isinstance(raw, memoryview):
        return raw.tolist()
    if isinstance(raw, Spinlock | Mutex):
        return name_of(raw.owner) if raw.owner else "free"
    if isinstance(raw, Tasklet):
        return _tasklet(raw)
    if isinstance(raw, Napi):
        return {"scheduled": raw.scheduled, **_tasklet(raw.tasklet)}
    if isinstance(raw, Completion | WaitQueue):
        done = {"done": raw.done} if isinstance(raw, Completion) else {}
        return {**done, "waiters": [name_of(number) for number in raw.waiters(waiters)]}
    return raw.load()


def _tasklet(tasklet: Tasklet) -> dict[str, Value]:
    return {
        "function": TASKLET_FUNCTIONS.name_of(tasklet.function),
        "scheduled": tasklet.scheduled,
        "running": tasklet.running,
        "disable_count": tasklet.disable_count,
    }


def _guid(value: str) -> str:
    return str(UUID(bytes_le=bytes.fromhex(value)))


def _class(value: str) -> str:
    known = class_of(UUID(_guid(value)))
    return f"{_guid(value)} ({known.name})" if known else _guid(value)


def _handle(value: int) -> str | None:
    """A record's name as reports write it: [index]@generation."""
    return f"[{(value & INDEX_MASK) - 1}]@{value >> 32}" if value else None


def _text(value: str) -> str:
    return bytes.fromhex(value).rstrip(b"\0").decode(errors="replace")


def _guids(value: str) -> list[str]:
    """Those of a list that is filled up with zeros."""
    ones = (value[at : at + 32] for at in range(0, len(value), 32))
    return [_guid(one) for one in ones if int(one, 16)]


def _member(enum: Any, suffix: str = "") -> Callable[[int], str]:
    """Name of a number in an enumeration; one that is in none keeps its number."""

    def name(value: int) -> str:
        return enum(value).name.removesuffix(suffix) if value in set(enum) else f"?{value}"

    return name


def _message_type(value: int) -> str:
    return MessageType(value).name if value in set(MessageType) else f"?{value}"


Meaning = Callable[[Any], Value]
MEANINGS: Final[Mapping[type[Record], Mapping[str, Meaning]]] = {
    Channel: {
        "state": _member(ChannelState, "_STATE"),
        "callback_mode": _member(CallbackMode),
        "onchannel_callback": CHANNEL_CALLBACKS.name_of,
        "sc_creation_callback": CHANNEL_CALLBACKS.name_of,
        "rescind_callback": CHANNEL_CALLBACKS.name_of,
        "channel_callback_context": _handle,
        "primary_channel": _handle,
        "device_obj": _handle,
        "if_type": _class,
        "if_instance": _guid,
        "rescind": bool,
        "ring_gpa": hex,
        "ring_pfns_gpa": hex,
        "rqstor_gpa": hex,
        "ringbuffer_gpadlhandle": hex,
        "sig_event": hex,
    },
    Connection: {
        "conn_state": _member(ConnectionState),
        "vmbus_proto_version": version_text,
        "next_gpadl_handle": hex,
        "int_page_gpa": hex,
        "monitor_page_gpas": lambda pages: [hex(page) for page in pages],
        "user_calls": hex,
    },
    Cpu: {
        "synic_message_page_gpa": hex,
        "synic_event_page_gpa": hex,
        "post_msg_page_gpa": hex,
    },
    Request: {"msgtype": _message_type, "gpadl": hex, "waiting_channel": _handle},
    Device: {
        "channel": _handle,
        "driver": DRIVERS.name_of,
        "dev_instance": _guid,
        "dev_type": _class,
        "driver_override": _text,
    },
    Driver: {"name": _text, "unregistered": bool, "dynamic_ids": _guids},
}
"""What a field's number says, for those fields that say more than a number."""
