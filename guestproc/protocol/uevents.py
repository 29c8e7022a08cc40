"""Uevents: what the kernel tells user space of its devices, in the bytes of its netlink messages.

    add@/devices/… NUL ACTION=add NUL DEVPATH=/devices/… NUL SUBSYSTEM=vmbus NUL [DRIVER=… NUL] MODALIAS=… NUL SEQNUM=…

The newest 64 lie in a ring in guest RAM, a slot each: sequence number, machine time, length, bytes. The sequence
number is 0 while a slot is written, so that a reader without a lock takes whole ones only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from typing import Final

from emu.ipc.atomics import ACQUIRE, RELEASE
from emu.wire.guids import guid_from_wire, modalias
from guestproc.kernel.layout import UEVENT_BYTES, UEVENT_SLOTS, Device, KernelTables

PARENT_NAME: Final = "vmbus-emu"
"""Directory in /sys/devices that holds the devices. On a real machine it is one of ACPI or the device tree;
here it must be none that the computer itself may have."""
BUS: Final = "vmbus"

_SLOT: Final = Struct("<QQI")
"""Sequence number, machine time in ns, bytes of text behind it."""
TEXT_BYTES: Final = UEVENT_BYTES - _SLOT.size


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


@dataclass(frozen=True, slots=True)
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


def device_path(instance: bytes) -> str:
    """DEVPATH of a device, by its instance GUID (wire form)."""
    return f"/devices/{PARENT_NAME}/{guid_from_wire(instance)}"


def channel_path(instance: bytes, relid: int) -> str:
    """DEVPATH of one of a device's channels."""
    return f"{device_path(instance)}/channels/{relid}"


def driver_path(name: str) -> str:
    """DEVPATH of a driver."""
    return f"/bus/{BUS}/drivers/{name}"


def device_variables(device: Device, driver: str) -> dict[str, str]:
    """What a device's uevent says beside action, path and subsystem (`dev_uevent`, then `vmbus_uevent`)."""
    alias = {"MODALIAS": modalias(guid_from_wire(device.dev_type))}
    return {"DRIVER": driver, **alias} if driver else alias


def write(
    tables: KernelTables, action: Action, devpath: str, subsystem: str, variables: Mapping[str, str], now_ns: int
) -> int:
    """Under uevent_lock: put it in the ring in the place of the oldest; its sequence number."""
    connection = tables.connection
    seqnum = connection.uevent_seqnum + 1
    connection.uevent_seqnum = seqnum
    name = action.name.lower()
    said = {"ACTION": name, "DEVPATH": devpath, "SUBSYSTEM": subsystem, **variables, "SEQNUM": str(seqnum)}
    text = "\0".join([f"{name}@{devpath}", *(f"{key}={value}" for key, value in said.items()), ""]).encode()
    assert len(text) <= TEXT_BYTES, f"uevent of {len(text)} bytes"
    at = _slot(tables, seqnum)
    tables.ram.atomics.store_u64(at, 0, RELEASE)
    _SLOT.pack_into(tables.ram.octets, at, 0, now_ns, len(text))
    tables.ram.octets[at + _SLOT.size : at + _SLOT.size + len(text)] = text
    tables.ram.atomics.store_u64(at, seqnum, RELEASE)
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
    _number, machine_ns, length = _SLOT.unpack_from(tables.ram.octets, at)
    text = bytes(tables.ram.octets[at + _SLOT.size : at + _SLOT.size + length])
    return Uevent(seqnum, machine_ns, text) if load(at, ACQUIRE) == seqnum else None


def _slot(tables: KernelTables, seqnum: int) -> int:
    return tables.layout.tables["uevents"].gpa + seqnum % UEVENT_SLOTS * UEVENT_BYTES
