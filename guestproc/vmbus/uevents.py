"""`kobject_uevent`: the one place from which user space hears of devices, channels and drivers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emu.tracing import E_UEVENT
from guestproc.kernel.layout import Channel, Device, Driver
from guestproc.protocol import devices, uevents
from guestproc.protocol.uevents import Action, Subject

if TYPE_CHECKING:
    from guestproc.current import Current


def device_uevent(
    current: Current, device: Device, action: Action, driver: str = "", *, synthetic: bool = False
) -> None:
    """A device came, went, got or lost its driver; `driver` is who has it now. `synthetic`: somebody asked for it."""
    (instance, class_guid), now_ns = devices.guids_of(device), current.actor.now()
    with current.connection.uevent_lock.hold(current.actor):
        seqnum = uevents.write(
            current.tables,
            action,
            Subject.DEVICE,
            now_ns,
            instance=instance,
            class_guid=class_guid,
            driver=driver,
            synthetic=synthetic,
        )
    if current.trace:
        channel = current.tables.channels.find(device.channel)
        current.record(E_UEVENT, action, 0 if channel is None else channel.relid, seqnum, Subject.DEVICE)


def channel_uevent(current: Current, channel: Channel, action: Action) -> None:
    """A channel's directory came or went; its subsystem is the kset that it is in."""
    instance, relid, now_ns = channel.if_instance, channel.relid, current.actor.now()
    with current.connection.uevent_lock.hold(current.actor):
        seqnum = uevents.write(current.tables, action, Subject.CHANNEL, now_ns, relid=relid, instance=instance)
    current.record(E_UEVENT, action, relid, seqnum, Subject.CHANNEL)


def driver_uevent(current: Current, driver: Driver, action: Action, *, synthetic: bool = False) -> None:
    """A driver was registered, or is no more. `synthetic`: somebody asked for it (the driver core's `uevent_store`)."""
    name, now_ns = devices.name_of(driver), current.actor.now()
    with current.connection.uevent_lock.hold(current.actor):
        seqnum = uevents.write(current.tables, action, Subject.DRIVER, now_ns, driver=name, synthetic=synthetic)
    current.record(E_UEVENT, action, 0, seqnum, Subject.DRIVER)


def bus_uevent(current: Current, action: Action) -> None:
    """Somebody asked for one of the bus itself (`bus_uevent_store`)."""
    now_ns = current.actor.now()
    with current.connection.uevent_lock.hold(current.actor):
        seqnum = uevents.write(current.tables, action, Subject.BUS, now_ns, synthetic=True)
    current.record(E_UEVENT, action, 0, seqnum, Subject.BUS)
