"""Devices and drivers of the bus: create, register, match by class GUID, probe, remove (reference 3.10).

Registration is what binds: it matches a driver and probes it, synchronously, in the work item of the offer.
A probe that fails leaves the device unbound; that is no error of the registration.
"""

from __future__ import annotations

import errno
from enum import IntFlag
from typing import TYPE_CHECKING, Final

from emu.tracing import E_PROBE
from guestproc.drivers.driver import DRIVER_OBJECTS, HvDriver
from guestproc.kernel.layout import Channel, Device, Driver

if TYPE_CHECKING:
    from guestproc.current import Current

PCI_VENDOR_ID_MICROSOFT: Final = 0x1414


class DeviceState(IntFlag):
    """Bits of `Device.state`."""

    REGISTERED = 1
    BOUND = 2
    REMOVING = 4


def vmbus_device_create(current: Current, channel: Channel) -> Device | None:
    """The device object of a primary channel; None when there is no record for it."""
    device: Device | None = current.tables.devices.alloc()
    if device is None:
        return None
    device.channel = channel.handle
    device.device_id = channel.device_id
    device.vendor_id = PCI_VENDOR_ID_MICROSOFT
    device.dev_instance = channel.if_instance
    device.dev_type = channel.if_type
    with current.connection.channel_mutex.hold(current.actor):
        channel.device_obj = device.handle
    return device


def vmbus_device_register(current: Current, device: Device) -> int:
    """Make the device known and look for its driver; 0, or a negative errno when it cannot be registered."""
    with device.device_lock.hold(current.actor):
        device.state.fetch_or(DeviceState.REGISTERED)
        _attach(current, device)
    return 0


def vmbus_add_channel_kobj(current: Current, channel: Channel) -> int:
    """The sysfs directory of a sub-channel below its primary's device: here the tree is made from the records."""
    primary = current.tables.channels.find(channel.primary_channel)
    return 0 if primary is not None and primary.device_obj else -errno.ENODEV


def vmbus_device_unregister(current: Current, device: Device) -> None:
    """Unbind, then let go of the channel: its relid is released and its record freed."""
    from guestproc.vmbus.channel_mgmt import hv_process_channel_removal

    channel = current.channel(device.channel)
    with device.device_lock.hold(current.actor):
        device.state.fetch_or(DeviceState.REMOVING)
        vmbus_remove(current, device)
    with current.connection.channel_mutex.hold(current.actor):
        channel.device_obj = 0
        hv_process_channel_removal(current, channel)
    current.tables.devices.free(device)


def _attach(current: Current, device: Device) -> None:
    """Probe with the first registered driver that matches; under device_lock."""
    for record in current.tables.drivers.live():
        driver = DRIVER_OBJECTS[record.number]
        if vmbus_match(device, driver):
            vmbus_probe(current, device, driver)
            return


def vmbus_match(device: Device, driver: HvDriver) -> bool:
    """driver_override first, then the class GUID in the driver's table."""
    if device.driver_override:
        return device.driver_override == driver.number
    return device.dev_type in driver.id_table


def vmbus_probe(current: Current, device: Device, driver: HvDriver) -> int:
    """Let the driver take the device; 0, or the negative errno of its probe, which is only logged."""
    result = driver.probe(current, device)
    relid = current.channel(device.channel).relid
    current.record(E_PROBE, relid, driver.number, -result)
    if result:
        device.probe_error = -result
        current.log(f"probe failed for device {device.dev_instance.hex()} ({result})")
        return result
    device.driver = driver.number
    device.state.fetch_or(DeviceState.BOUND)
    return 0


def vmbus_remove(current: Current, device: Device) -> None:
    """Let the driver give the device back; under device_lock."""
    if not device.driver:
        return
    DRIVER_OBJECTS[device.driver].remove(current, device)
    device.driver = 0
    device.state.fetch_and(~int(DeviceState.BOUND) & 0xFFFFFFFF)


def vmbus_driver_register(current: Current, driver: HvDriver) -> int:
    """Make a driver known; it is probed with devices that have none yet."""
    with current.connection.driver_mutex.hold(current.actor):
        record: Driver | None = current.tables.drivers.alloc()
        if record is None:
            return -errno.ENOMEM
        record.number = driver.number
        record.name = driver.name.encode()
    for device in list(current.tables.devices.live()):
        with device.device_lock.hold(current.actor):
            if not device.driver and vmbus_match(device, driver):
                vmbus_probe(current, device, driver)
    return 0


def vmbus_driver_unregister(current: Current, driver: HvDriver) -> None:
    """Take a driver from all its devices, which stay, unbound, and forget it."""
    for device in list(current.tables.devices.live()):
        with device.device_lock.hold(current.actor):
            if device.driver == driver.number:
                vmbus_remove(current, device)
    with current.connection.driver_mutex.hold(current.actor):
        for record in list(current.tables.drivers.live()):
            if record.number == driver.number:
                current.tables.drivers.free(record)
