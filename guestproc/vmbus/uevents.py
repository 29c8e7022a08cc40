"""`kobject_uevent`: the one place from which user space hears of devices, channels and drivers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from emu.tracing import E_UEVENT
from guestproc.kernel.layout import Channel, Device, Driver
from guestproc.protocol import devices, uevents
from guestproc.protocol.uevents import Action

if TYPE_CHECKING:
    from guestproc.current import Current


def device_uevent(
    current: Current, device: Device, action: Action, driver: str = "", *, synthetic: bool = False
) -> None:
    """A device came, went, got or lost its driver; `driver` is who has it now. `synthetic`: somebody asked for it."""
    channel = current.tables.channels.find(device.channel)
    relid = 0 if channel is None else channel.relid
    path = uevents.device_path(device.dev_instance)
    made_up = {"SYNTH_UUID": "0"} if synthetic else {}
    _emit(current, action, path, uevents.BUS, {**made_up, **uevents.device_variables(device, driver)}, relid)


def channel_uevent(current: Current, channel: Channel, action: Action) -> None:
    """A channel's directory came or went; its subsystem is the kset that it is in."""
    _emit(current, action, uevents.channel_path(channel.if_instance, channel.relid), "channels", {}, channel.relid)


def driver_uevent(current: Current, driver: Driver, action: Action) -> None:
    """A driver was registered, or is no more."""
    _emit(current, action, uevents.driver_path(devices.name_of(driver)), "drivers", {}, 0)


def _emit(
    current: Current, action: Action, path: str, subsystem: str, variables: Mapping[str, str], relid: int
) -> None:
    now_ns = current.actor.now()
    with current.connection.uevent_lock.hold(current.actor):
        seqnum = uevents.write(current.tables, action, path, subsystem, variables, now_ns)
    current.record(E_UEVENT, action, relid, seqnum)
