"""Uevents as user space gets them: the ring's slots read, and put into words."""

from __future__ import annotations

from emu.ipc.atomics import ACQUIRE
from emu.values import valueclass
from emu.wire.guids import guid_from_wire, modalias
from guestproc.kernel.layout import UEVENT_SLOTS, KernelTables
from guestproc.protocol.uevents import BUS, PARENT_NAME, SLOT, Action, Subject, slot_gpa


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


def since(tables: KernelTables, seqnum: int) -> list[Uevent]:
    """Those behind `seqnum` that are still in the ring, oldest first; for readers outside, without a lock."""
    newest: int = tables.connection.uevent_seqnum
    first = max(seqnum, newest - UEVENT_SLOTS) + 1
    return [found for number in range(first, newest + 1) if (found := _read(tables, number)) is not None]


def _read(tables: KernelTables, seqnum: int) -> Uevent | None:
    """One of them; None when its place was given to a newer one."""
    at = slot_gpa(tables, seqnum)
    load = tables.ram.atomics.load_u64
    if load(at, ACQUIRE) != seqnum:
        return None
    slot = bytes(tables.ram.octets[at : at + SLOT.size])
    if load(at, ACQUIRE) != seqnum:
        return None
    _number, machine_ns, action, subject, synthetic, relid, instance, class_guid, driver = SLOT.unpack(slot)
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
