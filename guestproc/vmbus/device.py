"""Devices and drivers of the bus: create, register, match by class GUID, probe, remove (reference 3.10).

Registration is what binds: it matches a driver and probes it, synchronously, in the work item of the offer.
A probe that fails leaves the device to the next driver that matches, or unbound; that is no error of the
registration. Probe and remove run under the device's lock. Drivers come and go beside it: whoever takes one
away first makes it unfindable, then waits for each device's lock in turn.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from emu.tracing import E_PROBE
from emu.wire.guids import guid_from_wire
from guestproc.drivers.driver import DRIVER_OBJECTS, HvDriver
from guestproc.kernel.layout import Channel, Device
from guestproc.protocol import devices
from guestproc.protocol.devices import DeviceState, vmbus_match
from guestproc.vmbus.removal import hv_process_channel_removal

if TYPE_CHECKING:
    from guestproc.current import Current

Candidates = list[tuple[int, Callable[[], bool]]]


def dev_name(device: Device) -> str:
    """The instance GUID, lower case, without braces: the device's name in sysfs and in the log."""
    return str(guid_from_wire(device.dev_instance))


# -- devices ------------------------------------------------------------------------------------------


def vmbus_device_create(current: Current, channel: Channel) -> Device | None:
    """The device object of a primary channel; None when there is no record for it."""
    device = devices.create(current.tables, channel)
    if device is not None:
        with current.connection.channel_mutex.hold(current.actor):
            channel.device_obj = device.handle
    return device


def vmbus_device_register(current: Current, device: Device) -> int:
    """Make the device known and look for its driver; 0, or -EEXIST when its name is taken."""
    with current.connection.channel_mutex.hold(current.actor):
        result = devices.register(current.tables, device)
    if result == 0:
        drivers = _registered_drivers(current)
        with device.device_lock.hold(current.actor):
            _attach(current, device, drivers)
    return result


def vmbus_device_discard(current: Current, device: Device) -> None:
    """A device that could not be registered: its channel forgets it, its record goes."""
    with current.connection.channel_mutex.hold(current.actor):
        current.channel(device.channel).device_obj = 0
    devices.put_device(current.tables, device)


def vmbus_device_unregister(current: Current, device: Device) -> None:
    """Unbind, then let go of the channel: its relid is released and its record freed."""
    channel = current.channel(device.channel)
    with device.device_lock.hold(current.actor):
        device.state.fetch_or(int(DeviceState.REMOVING))
        vmbus_remove(current, device)
    with current.connection.channel_mutex.hold(current.actor):
        channel.device_obj = 0
        hv_process_channel_removal(current, channel)
    devices.put_device(current.tables, device)


def vmbus_add_channel_kobj(current: Current, channel: Channel) -> int:
    """The sysfs directory of a sub-channel below its primary's device; -ENODEV when there is no such device.

    The tree itself is made from the records by whoever shows it.
    """
    primary = current.tables.channels.find(channel.primary_channel)
    return 0 if primary is not None and primary.device_obj else -errno.ENODEV


# -- binding ------------------------------------------------------------------------------------------


def _attach(current: Current, device: Device, drivers: Candidates) -> None:
    """Under device_lock: try the drivers that match, until one takes the device (`__device_attach`)."""

    def match(number: int) -> bool:
        return vmbus_match(device, DRIVER_OBJECTS[number])

    for number in devices.matching(drivers, match):
        if device.driver or not devices.is_there(device):
            return
        vmbus_probe(current, device, DRIVER_OBJECTS[number])


def vmbus_probe(current: Current, device: Device, driver: HvDriver) -> int:
    """Under device_lock: let the driver take the device; its negative errno is only logged."""
    result = driver.probe(current, device)
    relid = current.channel(device.channel).relid
    current.record(E_PROBE, relid, driver.number, -result)
    if result:
        device.probe_error = -result
        current.log(f"probe failed for device {dev_name(device)} ({result})")
    else:
        devices.bind(device, driver)
    return result


def vmbus_remove(current: Current, device: Device) -> None:
    """Under device_lock: let the driver give the device back."""
    if device.driver:
        DRIVER_OBJECTS[device.driver].remove(current, device)
        devices.unbind(device)


# -- drivers ------------------------------------------------------------------------------------------


def _registered_drivers(current: Current) -> Candidates:
    with current.connection.driver_mutex.hold(current.actor):
        return devices.registered(current.tables)


def _for_each_device(current: Current, act: Callable[[Device], None]) -> None:
    """Call `act` under the lock of every device that is there; each is held by a reference meanwhile."""
    with current.connection.channel_mutex.hold(current.actor):
        found = devices.get_all(current.tables)
    for device in found:
        try:
            with device.device_lock.hold(current.actor):
                if devices.is_there(device):
                    act(device)
        finally:
            devices.put_device(current.tables, device)


def vmbus_driver_register(current: Current, driver: HvDriver) -> int:
    """Make a driver known; it is probed with devices that have none yet. 0, or -ENOMEM."""
    with current.connection.driver_mutex.hold(current.actor):
        record = devices.add_driver(current.tables, driver.number, driver.name)
    if record is None:
        return -errno.ENOMEM

    def probe(device: Device) -> None:
        if not device.driver and vmbus_match(device, driver):
            vmbus_probe(current, device, driver)

    _for_each_device(current, probe)
    return 0


def vmbus_driver_unregister(current: Current, driver: HvDriver) -> None:
    """Forget a driver, then take it from all its devices, which stay, unbound."""
    with current.connection.driver_mutex.hold(current.actor):
        devices.remove_driver(current.tables, driver.number)

    def remove(device: Device) -> None:
        if device.driver == driver.number:
            vmbus_remove(current, device)

    _for_each_device(current, remove)
