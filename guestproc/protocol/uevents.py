"""Uevents: what the kernel tells user space of its devices, in the bytes of its netlink messages.

    add@/devices/… NUL ACTION=add NUL DEVPATH=/devices/… NUL SUBSYSTEM=vmbus NUL [DRIVER=… NUL] MODALIAS=… NUL SEQNUM=…

The newest 64 lie in a ring in guest RAM, a slot each: sequence number, machine time, and what there is to say. It is
put into words by who reads it: most are never read, and a device makes three. The sequence number is 0 while a slot
is written, so that a reader without a lock takes whole ones only.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import Final

from emu.ipc.atomics import ACQUIRE, RELEASE
from emu.values import valueclass
from emu.wire.guids import guid_from_wire, modalias
from guestproc.kernel.layout import UEVENT_BYTES, UEVENT_SLOTS, KernelTables

PARENT_NAME: Final = "vmbus-emu"
"""Directory in /sys/devices that holds the devices. On a real machine it is one of ACPI or the device tree;
here it must be none that the computer itself may have."""
BUS: Final = "vmbus"

_SLOT: Final = Struct("<QQBBBxI16s16s32s")
"""Sequence number, machine time in ns, action, subject, 1 if made up, relid, instance, class, name of a driver."""
_HALF_WRITTEN: Final = 0
assert _SLOT.size <= UEVENT_BYTES


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


@valueclass()
class Uevent:
    """One of them, as user space gets it."""

    seqnum: int
    machine_ns: int
    text: bytes

    @property
    def head(self) -> str:
        """`ACTION@DEVPATH`."""
        return self.text.partition(b"\0")[0].decode()

    @property
    def variables(self) -> dict[str, str]:
        """The environment behind it."""
        lines = self.text.decode().split("\0")[1:]
        return dict(line.split("=", 1) for line in lines if line)


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
    _SLOT.pack_into(
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


def since(tables: KernelTables, seqnum: int) -> list[Uevent]:
    """Those behind `seqnum` that are still in the ring, oldest first; for readers outside, without a lock."""
    newest: int = tables.connection.uevent_seqnum
    first = max(seqnum, newest - UEVENT_SLOTS) + 1
    return [found for number in range(first, newest + 1) if (found := _read(tables, number)) is not None]


def _read(tables: KernelTables, seqnum: int) -> Uevent | None:
    """One of them; None when its place was given to a newer one."""
    at = _slot(tables, seqnum)
    load = tables.ram.atomics.load_u64
    if load(at, ACQUIRE) != seqnum:
        return None
    slot = bytes(tables.ram.octets[at : at + _SLOT.size])
    if load(at, ACQUIRE) != seqnum:
        return None
    _number, machine_ns, action, subject, synthetic, relid, instance, class_guid, driver = _SLOT.unpack(slot)
    said = {"SYNTH_UUID": "0"} if synthetic else {}
    name = driver.rstrip(b"\0").decode()
    path = f"/devices/{PARENT_NAME}/{guid_from_wire(instance)}"
    match subject:
        case Subject.DEVICE:
            # `dev_uevent`, then `vmbus_uevent`.
            said |= {"DRIVER": name} if name else {}
            said["MODALIAS"] = modalias(guid_from_wire(class_guid))
            text = _text(Action(action), path, BUS, said, seqnum)
        case Subject.CHANNEL:
            text = _text(Action(action), f"{path}/channels/{relid}", "channels", said, seqnum)
        case Subject.BUS:
            text = _text(Action(action), f"/bus/{BUS}", "bus", said, seqnum)
        case _:
            text = _text(Action(action), f"/bus/{BUS}/drivers/{name}", "drivers", said, seqnum)
    return Uevent(seqnum, machine_ns, text)


def _text(action: Action, devpath: str, subsystem: str, variables: dict[str, str], seqnum: int) -> bytes:
    """The netlink message."""
    name = action.name.lower()
    said = {"ACTION": name, "DEVPATH": devpath, "SUBSYSTEM": subsystem, **variables, "SEQNUM": str(seqnum)}
    return "\0".join([f"{name}@{devpath}", *(f"{key}={value}" for key, value in said.items()), ""]).encode()


def _slot(tables: KernelTables, seqnum: int) -> int:
    return tables.uevents_gpa + seqnum % UEVENT_SLOTS * UEVENT_BYTES
