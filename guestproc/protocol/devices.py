"""Device and driver records: who is registered, who holds a device, which driver is its (reference 3.10).

A device is counted: one reference is its channel's, from creation until unregistration, and whoever walks
over devices takes one more before it lets go of channel_mutex (`get_device`). The count lies in the upper
half of `Device.state`, the bits of the driver core in the lower.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from enum import IntFlag
from typing import Final, Protocol

from emu.wire.device_classes import PCI_VENDOR_ID_MICROSOFT
from guestproc.kernel.layout import Channel, Device, Driver, KernelTables

REFERENCE: Final = 1 << 16


class DeviceState(IntFlag):
    """Bits of `Device.state`."""

    REGISTERED = 1
    BOUND = 2
    REMOVING = 4


class Matching(Protocol):
    """Of a driver, what decides whether a device is one of its."""

    number: int
    id_table: frozenset[bytes]


# -- devices ------------------------------------------------------------------------------------------


def create(tables: KernelTables, channel: Channel) -> Device | None:
    """The device object of a primary channel, for its channel; None when there is no record for it."""
    device: Device | None = tables.devices.alloc()
    if device is None:
        return None
    device.channel = channel.handle
    device.device_id = channel.device_id
    device.vendor_id = PCI_VENDOR_ID_MICROSOFT
    device.dev_instance = channel.if_instance
    device.dev_type = channel.if_type
    device.state.store(REFERENCE)
    return device


def register(tables: KernelTables, device: Device) -> int:
    """Under channel_mutex: -EEXIST when a device of this instance, so of this name in sysfs, is there already."""
    for channel in tables.instances.find(device.dev_instance):
        other = tables.devices.find(channel.device_obj)
        if other is not None and other is not device and other.state.load() & DeviceState.REGISTERED:
            return -errno.EEXIST
    device.state.fetch_or(int(DeviceState.REGISTERED))
    return 0


def is_there(device: Device) -> bool:
    """Under device_lock: registered, and not on its way out."""
    return device.state.load() & (DeviceState.REGISTERED | DeviceState.REMOVING) == DeviceState.REGISTERED


def get_all(tables: KernelTables) -> list[Device]:
    """Under channel_mutex: every registered device, with a reference each that is the caller's."""
    devices = []
    for channel in tables.chn_list:
        device = tables.devices.find(channel.device_obj)
        if device is not None and device.state.load() & DeviceState.REGISTERED:
            device.state.fetch_add(REFERENCE)
            devices.append(device)
    return devices


def put_device(tables: KernelTables, device: Device) -> None:
    """Give a reference back; the last one frees the record."""
    if device.state.fetch_sub(REFERENCE) < 2 * REFERENCE:
        tables.devices.free(device)


def bind(device: Device, driver: Matching) -> None:
    """Under device_lock: this driver has taken the device."""
    device.driver = driver.number
    device.probe_error = 0
    device.state.fetch_or(int(DeviceState.BOUND))


def unbind(device: Device) -> None:
    """Under device_lock: its driver has given the device back."""
    device.driver = 0
    device.state.fetch_and(~int(DeviceState.BOUND) & 0xFFFFFFFF)


# -- drivers ------------------------------------------------------------------------------------------


def add_driver(tables: KernelTables, number: int, name: str) -> Driver | None:
    """Under driver_mutex: a driver is registered; None when there is no record for it."""
    record: Driver | None = tables.drivers.alloc()
    if record is not None:
        record.number = number
        record.name = name.encode()
    return record


def remove_driver(tables: KernelTables, number: int) -> bool:
    """Under driver_mutex: it is registered no more; whether it was."""
    for record in tables.drivers.live():
        if record.number == number:
            tables.drivers.free(record)
            return True
    return False


def registered(tables: KernelTables) -> list[tuple[int, Callable[[], bool]]]:
    """Under driver_mutex: each registered driver's number, with a question whether it still is registered."""
    return [(record.number, record.alive) for record in tables.drivers.live()]


def matching(candidates: list[tuple[int, Callable[[], bool]]], match: Callable[[int], bool]) -> Iterator[int]:
    """Under device_lock: the numbers of the drivers to try, in the order of their registration.

    A driver that went since is passed over: whoever took it away walks over the devices after that, and
    waits for this one's lock.
    """
    return (number for number, still_there in candidates if still_there() and match(number))


def vmbus_match(device: Device, driver: Matching) -> bool:
    """driver_override first, which matches without an id; then the class GUID in the driver's table."""
    if device.driver_override:
        return bool(device.driver_override == driver.number)
    return device.dev_type in driver.id_table
