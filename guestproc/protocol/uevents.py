"""Uevents: what the kernel tells user space of its devices, in the bytes of its netlink messages.

    add@/devices/… NUL ACTION=add NUL DEVPATH=/devices/… NUL SUBSYSTEM=vmbus NUL [DRIVER=… NUL] MODALIAS=… NUL SEQNUM=…

The newest 64 lie in a ring in guest RAM, a slot each: sequence number, machine time, and what there is to say. It is
put into words by who reads it (`uevent_text`): most are never read, and a device makes three. The sequence number is 0
while a slot is written, so that a reader without a lock takes whole ones only.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import Final

from emu.ipc.atomics import RELEASE
from guestproc.kernel.layout import UEVENT_BYTES, UEVENT_SLOTS, KernelTables

PARENT_NAME: Final = "vmbus-emu"
"""Directory in /sys/devices that holds the devices. On a real machine it is one of ACPI or the device tree;
here it must be none that the computer itself may have."""
BUS: Final = "vmbus"

SLOT: Final = Struct("<QQBBBxI16s16s32s")
"""Sequence number, machine time in ns, action, subject, 1 if made up, relid, instance, class, name of a driver."""
_HALF_WRITTEN: Final = 0
assert SLOT.size <= UEVENT_BYTES


class Subject(IntEnum):
    """Whose uevent it is."""

    DEVICE = 0
    CHANNEL = 1
    DRIVER = 2
    BUS = 3


class Action(IntEnum):
    """`enum kobject_action`; the bus itself has use for the first two and the last two."""

    ADD = 0
    REMOVE = 1
    CHANGE = 2
    MOVE = 3
    ONLINE = 4
    OFFLINE = 5
    BIND = 6
    UNBIND = 7


def write(
    tables: KernelTables,
    action: Action,
    subject: Subject,
    now_ns: int,
    *,
    relid: int = 0,
    instance: bytes = b"",
    class_guid: bytes = b"",
    driver: str = "",
    synthetic: bool = False,
) -> int:
    """Under uevent_lock: put it in the ring in the place of the oldest; its sequence number. GUIDs in wire form."""
    connection = tables.connection
    seqnum: int = connection.uevent_seqnum + 1
    connection.uevent_seqnum = seqnum
    at = tables.uevents_gpa + seqnum % UEVENT_SLOTS * UEVENT_BYTES
    store = tables.ram.atomics.store_u64
    store(at, _HALF_WRITTEN, RELEASE)
    SLOT.pack_into(
        tables.ram.buffer,
        at,
        _HALF_WRITTEN,
        now_ns,
        action,
        subject,
        synthetic,
        relid,
        instance,
        class_guid,
        driver.encode(),
    )
    store(at, seqnum, RELEASE)
    return seqnum


def slot_gpa(tables: KernelTables, seqnum: int) -> int:
    """Where the uevent of this number lies."""
    return tables.uevents_gpa + seqnum % UEVENT_SLOTS * UEVENT_BYTES
