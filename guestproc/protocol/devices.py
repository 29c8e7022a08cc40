"""Device and driver records: who is registered, who holds a device, which driver is its (reference 3.10).

A device is counted: one reference is its channel's, from creation until unregistration, and whoever walks
over devices takes one more before it lets go of channel_mutex (`get_device`). The count lies in the upper
half of `Device.state`, the bits of the driver core in the lower.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from enum import IntFlag
from typing import Final, Protocol

from emu.wire.device_classes import PCI_VENDOR_ID_MICROSOFT
from guestproc.kernel.layout import MAX_DYNAMIC_IDS, Channel, Device, Driver, KernelTables
from guestproc.kernel.records import Fields, field_of
from guestproc.protocol.offers import is_hvsock_channel

REFERENCE: Final = 1 << 16
_NO_OVERRIDE: Final = bytes(field_of(Device, "driver_override").size)
_IDS: Final = Fields(Device, "channel", "device_id", "vendor_id")
_GUIDS: Final = Fields(Device, "dev_instance", "dev_type")
_CHANNEL_GUIDS: Final = Fields(Channel, "if_type", "if_instance")


class DeviceState(IntFlag):
    """Bits of `Device.state`."""

    REGISTERED = 1
    BOUND = 2
    REMOVING = 4


REGISTERED: Final = int(DeviceState.REGISTERED)
"""As plain numbers: an IntFlag makes an object of each result."""
BOUND: Final = int(DeviceState.BOUND)
REMOVING: Final = int(DeviceState.REMOVING)


class DriverFlags(IntFlag):
    """`Driver.flags`."""

    HVSOCK = 1
    """It takes hv_sock channels, and only it does."""


class Matching(Protocol):
    """Of a driver, what decides whether a device is one of its."""

    number: int
    name: str
    id_table: frozenset[bytes]


# -- devices ------------------------------------------------------------------------------------------


def create(tables: KernelTables, channel: Channel) -> Device | None:
    """The device object of a primary channel, for its channel; None when there is no record for it."""
    device: Device | None = tables.devices.alloc()
    if device is None:
        return None
    _IDS.write(device, channel.handle, channel.device_id, PCI_VENDOR_ID_MICROSOFT)
    if_type, if_instance = _CHANNEL_GUIDS.read(channel)
    _GUIDS.write(device, if_instance, if_type)
    device.state.store(REFERENCE)
    return device


def register(tables: KernelTables, device: Device) -> int:
    """Under channel_mutex: -EEXIST when a device of this instance, so of this name in sysfs, is there already."""
    for channel in tables.instances.find(device.dev_instance):
        other = tables.devices.find(channel.device_obj)
        if other is not None and other is not device and other.state.load() & REGISTERED:
            return -errno.EEXIST
    device.state.fetch_or(REGISTERED)
    return 0


def guids_of(device: Device) -> tuple[bytes, bytes]:
    """Its instance and its class, in wire form."""
    instance, class_guid = _GUIDS.read(device)
    return instance, class_guid


def is_there(device: Device) -> bool:
    """Under device_lock: registered, and not on its way out."""
    return device.state.load() & (REGISTERED | REMOVING) == REGISTERED


def get_all(tables: KernelTables) -> list[Device]:
    """Under channel_mutex: every registered device, with a reference each that is the caller's."""
    devices = []
    for channel in tables.chn_list:
        device = tables.devices.find(channel.device_obj)
        if device is not None and device.state.load() & REGISTERED:
            device.state.fetch_add(REFERENCE)
            devices.append(device)
    return devices


def put_device(tables: KernelTables, device: Device) -> None:
    """Give a reference back; the last one frees the record."""
    if device.state.fetch_sub(REFERENCE) < 2 * REFERENCE:
        tables.devices.free(device)


def find_device(tables: KernelTables, relid: int, instance: bytes) -> Device | None:
    """Under channel_mutex: the registered device of this relid (0: of this instance), with a reference more."""
    channel = tables.relids.lookup(relid) if relid else next(iter(tables.instances.find(instance)), None)
    if channel is not None and channel.primary_channel:
        channel = tables.channels.find(channel.primary_channel)
    device = None if channel is None else tables.devices.find(channel.device_obj)
    if device is None or not device.state.load() & REGISTERED:
        return None
    device.state.fetch_add(REFERENCE)
    return device


def bind(device: Device, driver: Matching) -> None:
    """Under device_lock: this driver has taken the device."""
    device.driver = driver.number
    device.probe_error = 0
    device.state.fetch_or(BOUND)


def unbind(device: Device) -> None:
    """Under device_lock: its driver has given the device back."""
    device.driver = 0
    device.state.fetch_and(~BOUND & 0xFFFFFFFF)


def override_name(device: Device) -> str:
    """Name of the only driver that may bind, empty for any."""
    name = device.driver_override
    return "" if name == _NO_OVERRIDE else name.rstrip(b"\0").decode()


# -- drivers ------------------------------------------------------------------------------------------


def add_driver(tables: KernelTables, number: int, name: str, flags: int = 0) -> Driver | int:
    """Under driver_mutex: register a driver; -EBUSY when one of that name is, -ENOMEM without a record for it.

    One that comes back finds its record again, without the dynamic ids that it had.
    """
    known = next((record for record in tables.drivers.live() if name_of(record) == name), None)
    if known is not None and not known.unregistered.load():
        return -errno.EBUSY
    record = tables.drivers.alloc() if known is None else known
    if record is None:
        return -errno.ENOMEM
    record.number = number
    record.flags = flags
    record.name = name.encode()
    record.dynamic_count = 0
    record.unregistered.store(0)
    tables.connection.driver_changes.fetch_add(1)
    return record


def remove_driver(tables: KernelTables, number: int) -> bool:
    """Under driver_mutex: it is registered no more; whether it was."""
    was = any(not record.unregistered.exchange(1) for record in tables.drivers.live() if record.number == number)
    tables.connection.driver_changes.fetch_add(1)
    return was


def registered(tables: KernelTables) -> list[Driver]:
    """Under driver_mutex: the registered drivers, in the order of their first registration."""
    return [record for record in tables.drivers.live() if not record.unregistered.load()]


def is_registered(driver: Driver) -> bool:
    """Whether it is registered now."""
    return not driver.unregistered.load()


def name_of(driver: Driver) -> str:
    """A driver's name as text."""
    return driver.name.rstrip(b"\0").decode()


def matching(candidates: Sequence[Driver], match: Callable[[Driver], bool]) -> Iterator[Driver]:
    """Under device_lock: the drivers to try, in the order of their registration.

    A driver that went since is passed over: whoever took it away walks over the devices after that, and
    waits for this one's lock.
    """
    return (driver for driver in candidates if is_registered(driver) and match(driver))


def dynamic_ids(driver: Driver) -> list[bytes]:
    """Under dynids_lock: class GUIDs (wire form) that `new_id` added, oldest first."""
    count = driver.dynamic_count
    if not count:
        return []
    ids = driver.dynamic_ids
    return [ids[16 * n : 16 * n + 16] for n in range(count)]


def add_dynid(driver: Driver, guid: bytes) -> int:
    """Under dynids_lock: 0, -EEXIST when it is one already, -ENOMEM when there is no room."""
    ids = dynamic_ids(driver)
    if guid in ids:
        return -errno.EEXIST
    if len(ids) == MAX_DYNAMIC_IDS:
        return -errno.ENOMEM
    driver.dynamic_ids = b"".join([*ids, guid])
    driver.dynamic_count = len(ids) + 1
    return 0


def remove_dynid(driver: Driver, guid: bytes) -> int:
    """Under dynids_lock: 0, or -ENODEV when it is none. Who is bound stays bound."""
    ids = dynamic_ids(driver)
    if guid not in ids:
        return -errno.ENODEV
    ids.remove(guid)
    driver.dynamic_ids = b"".join(ids)
    driver.dynamic_count = len(ids)
    return 0


def vmbus_match(tables: KernelTables, device: Device, driver: Matching, record: Driver) -> bool:
    """Under device_lock and the driver's dynids_lock: whether the driver may take the device.

    An hv_sock channel goes to the driver of sockets, whatever else is said. driver_override excludes all other
    drivers, and its own needs no id then. (The kernel looks at dynamic ids before the driver's table; which of them it
    is makes no difference here.)
    """
    channel = tables.channels.find(device.channel)
    if channel is not None and is_hvsock_channel(channel):
        return bool(record.flags & DriverFlags.HVSOCK)
    override = override_name(device)
    if override:
        return override == driver.name
    dev_type = device.dev_type
    return dev_type in driver.id_table or dev_type in dynamic_ids(record)
