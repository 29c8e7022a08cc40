"""Devices and drivers of the bus: create, register, match, probe, bind, unbind, remove (reference 3.10).

Registration is what binds: it matches a driver and probes it, synchronously, in the work item of the offer.
A probe that fails leaves the device to the next driver that matches, or unbound; that is no error of the
registration. Probe and remove run under the device's lock. Drivers come and go beside it: whoever takes one
away first makes it unfindable, then waits for each device's lock in turn. So do those who write to sysfs: they
find a device under channel_mutex, hold it by a reference, and take its lock.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from emu.event_fields import text_value
from emu.tracing import EVENTS
from emu.wire.guids import guid_from_wire
from guestproc.drivers.driver import DRIVER_OBJECTS, HvDriver, ShutsDown, takes_sockets
from guestproc.kernel.layout import Channel, Device, Driver
from guestproc.kernel.wait import SECOND_NS
from guestproc.protocol import devices, faults
from guestproc.protocol.devices import DeviceState, DriverFlags
from guestproc.protocol.uevents import Action
from guestproc.vmbus.removal import hv_process_channel_removal
from guestproc.vmbus.uevents import channel_uevent, device_uevent, driver_uevent

if TYPE_CHECKING:
    from emu.fault_plan import Hit
    from guestproc.current import Current

HANG_TIMEOUT_NS: Final = 30 * SECOND_NS
"""How long a probe hangs that was told to, if nobody lets it go: below the deadline of a mutex, device_lock's."""


def dev_name(device: Device) -> str:
    """The instance GUID, lower case, without braces: the device's name in sysfs and in the log."""
    return str(guid_from_wire(device.dev_instance))


# -- devices ------------------------------------------------------------------------------------------


def vmbus_device_create(current: Current, channel: Channel) -> Device | None:
    """The device object of a primary channel; None when there is no record for it."""
    if faults.strikes(current.faults, "device_create", channel.relid):
        return None
    device = devices.create(current.tables, channel)
    if device is not None:
        with current.connection.channel_mutex.hold(current.actor):
            channel.device_obj = device.handle
    return device


def vmbus_device_register(current: Current, device: Device) -> int:
    """Make the device known, look for its driver, make its channel's directory; 0 or a negative errno.

    -EEXIST: its name is taken; -ENOMEM: told to fail; -ENODEV: no directory. Then it is known no more.
    """
    channel = current.channel(device.channel)
    if faults.strikes(current.faults, "device_register", channel.relid):
        return -errno.ENOMEM
    with current.connection.channel_mutex.hold(current.actor):
        result = devices.register(current.tables, device)
        if result:
            return result
        # Under the mutex by which others find the device: they bind it after user space was told of it.
        device_uevent(current, device, Action.ADD)
    if not current.connection.no_autoprobe.load():
        drivers = _registered_drivers(current)
        with device.device_lock.hold(current.actor):
            _attach(current, device, drivers)
    result = vmbus_add_channel_kobj(current, channel)
    if result:
        # The kernel calls device_unregister here, whose release trips over a channel that is not rescinded.
        _device_del(current, device)
    return result


def vmbus_device_discard(current: Current, device: Device) -> None:
    """A device that could not be registered: its channel forgets it, its record goes."""
    with current.connection.channel_mutex.hold(current.actor):
        current.channel(device.channel).device_obj = 0
    devices.put_device(current.tables, device)


def vmbus_device_unregister(current: Current, device: Device) -> None:
    """Unbind, then let go of the channel: its relid is released and its record freed."""
    channel = current.channel(device.channel)
    _device_del(current, device)
    with current.connection.channel_mutex.hold(current.actor):
        channel.device_obj = 0
        hv_process_channel_removal(current, channel)
    devices.put_device(current.tables, device)


def _device_del(current: Current, device: Device) -> None:
    """`device_del`: nobody binds it any more, its driver gives it back, user space hears that it went."""
    with device.device_lock.hold(current.actor):
        device.state.fetch_or(int(DeviceState.REMOVING))
        vmbus_remove(current, device)
    device_uevent(current, device, Action.REMOVE)


def vmbus_add_channel_kobj(current: Current, channel: Channel) -> int:
    """A channel's directory below its device: 0, -ENODEV when there is no such device, -ENOMEM.

    The tree itself is made from the records by whoever shows it.
    """
    if faults.strikes(current.faults, "add_kobj", channel.relid):
        return -errno.ENOMEM
    primary = current.tables.channels.find(channel.primary_channel) if channel.primary_channel else channel
    if primary is None or not primary.device_obj:
        return -errno.ENODEV
    channel.kobj_added = 1
    channel_uevent(current, channel, Action.ADD)
    return 0


@contextmanager
def held_device(current: Current, relid: int, instance: bytes) -> Iterator[Device | None]:
    """`bus_find_device`: the device of this relid (0: of this instance), which stays for the block; None if none."""
    with current.connection.channel_mutex.hold(current.actor):
        device = devices.find_device(current.tables, relid, instance)
    try:
        yield device
    finally:
        if device is not None:
            devices.put_device(current.tables, device)


# -- binding ------------------------------------------------------------------------------------------


def vmbus_match(current: Current, device: Device, record: Driver) -> bool:
    """Under device_lock: whether a registered driver may take a device."""
    with record.dynids_lock.hold(current.actor):
        return devices.vmbus_match(current.tables, device, DRIVER_OBJECTS[record.number], record)


def _attach(current: Current, device: Device, candidates: Sequence[Driver]) -> None:
    """Under device_lock: try the drivers that match, until one takes the device (`__device_attach`)."""
    for record in devices.matching(candidates, lambda record: vmbus_match(current, device, record)):
        if device.driver or not devices.is_there(device):
            return
        if vmbus_probe(current, device, DRIVER_OBJECTS[record.number]) == 0:
            return


def vmbus_probe(current: Current, device: Device, driver: HvDriver) -> int:
    """Under device_lock: let the driver take the device; its negative errno is logged and returned."""
    channel = current.channel(device.channel)
    relid = channel.relid
    _record_driver(current, "probe_start", relid, driver.number)
    # Not where a rescind waits for device_lock already: it is to wait for one that hangs, not for several in turn.
    if not channel.rescind.load() and (hang := faults.strikes(current.faults, "probe_hang", relid)):
        _hang(current, hang)
    result = -errno.EIO if faults.strikes(current.faults, "probe", relid) else driver.probe(current, device)
    _record_driver(current, "probe", relid, driver.number, result)
    if result:
        device.probe_error = -result
        current.log(f"probe failed for device {dev_name(device)} ({result})")
    else:
        devices.bind(device, driver)
        device_uevent(current, device, Action.BIND, driver.name)
    return result


def _record_driver(current: Current, event: str, relid: int, number: int, *result: int) -> None:
    """A step of a driver's. Its number says nothing to who reads a recording elsewhere, so its name is there, too."""
    if current.trace:
        spec, name = EVENTS[event], text_value(DRIVER_OBJECTS[number].name, 24)
        current.record(spec.number, *spec.pack(relid, number, *result, name))


def _hang(current: Current, hang: Hit) -> None:
    """A driver that waits for what does not come, until somebody lets it go; not for ever."""
    current.connection.state_wait.wait_until_timeout(current.actor, lambda: hang.over, HANG_TIMEOUT_NS)


def vmbus_remove(current: Current, device: Device) -> None:
    """Under device_lock: let the driver give the device back."""
    if device.driver:
        number, relid = device.driver, current.channel(device.channel).relid
        _record_driver(current, "remove_start", relid, number)
        DRIVER_OBJECTS[number].remove(current, device)
        _record_driver(current, "remove", relid, number)
        devices.unbind(device)
        device_uevent(current, device, Action.UNBIND)


def bind_store(current: Current, device: Device, record: Driver) -> int:
    """A write to a driver's `bind`: 0, -ENODEV when they do not match, -EBUSY when it is bound, what probe says."""
    with device.device_lock.hold(current.actor):
        if not (devices.is_registered(record) and devices.is_there(device) and vmbus_match(current, device, record)):
            return -errno.ENODEV
        if device.driver:
            return -errno.EBUSY
        return vmbus_probe(current, device, DRIVER_OBJECTS[record.number])


def unbind_store(current: Current, device: Device, number: int = 0) -> int:
    """A write to a driver's `unbind` (0: of whichever has it): 0, or -ENODEV when it has not. It stays unbound."""
    with device.device_lock.hold(current.actor):
        if not device.driver or number not in (0, device.driver):
            return -errno.ENODEV
        vmbus_remove(current, device)
        return 0


def driver_override_store(current: Current, device: Device, name: str) -> None:
    """A write to `driver_override`: from the next match on only this driver, or (empty) any. Nothing is unbound."""
    with device.device_lock.hold(current.actor):
        device.driver_override = name.encode()


def drivers_probe_store(current: Current, device: Device) -> None:
    """A write to the bus's `drivers_probe`: a device without a driver looks for one; that there is none is no error."""
    drivers = _registered_drivers(current)
    with device.device_lock.hold(current.actor):
        if not device.driver:
            _attach(current, device, drivers)


def drivers_autoprobe_store(current: Current, *, on: bool) -> None:
    """A write to the bus's `drivers_autoprobe`: whether new devices and new drivers are matched unasked."""
    current.connection.no_autoprobe.store(int(not on))


def synth_uevent(current: Current, device: Device, action: Action) -> None:
    """A write to `uevent`: the same as at the time, marked as made up (`kobject_synth_uevent`)."""
    with device.device_lock.hold(current.actor):
        name = DRIVER_OBJECTS[device.driver].name if device.driver else ""
        device_uevent(current, device, action, name, synthetic=True)


# -- drivers ------------------------------------------------------------------------------------------


def _registered_drivers(current: Current) -> Sequence[Driver]:
    """The registered drivers, in the order of their first registration; asked for once a device.

    A driver that comes raises `driver_changes` before it looks for devices, and a device is registered before it looks
    here: whichever is later sees the other.
    """
    tables = current.tables
    changes, drivers = tables.known_drivers
    if current.connection.driver_changes.load() != changes:
        with current.connection.driver_mutex.hold(current.actor):
            changes = current.connection.driver_changes.load()
            drivers = tuple(devices.registered(tables))
        tables.known_drivers = changes, drivers
    return drivers


def find_driver(current: Current, name: str) -> Driver | None:
    """The registered driver of that name."""
    return next((one for one in _registered_drivers(current) if devices.name_of(one) == name), None)


def _for_each_device(current: Current, act: Callable[[Device], object]) -> None:
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


def _driver_attach(current: Current, record: Driver) -> None:
    """`driver_attach`: probe the driver with every device that it matches and that has no driver yet."""

    def probe(device: Device) -> None:
        if not device.driver and devices.is_registered(record) and vmbus_match(current, device, record):
            vmbus_probe(current, device, DRIVER_OBJECTS[record.number])

    _for_each_device(current, probe)


def vmbus_driver_register(current: Current, driver: HvDriver) -> int:
    """Make a driver known; it is probed with devices that have none yet. 0, -EBUSY when it is, or -ENOMEM."""
    flags = DriverFlags.HVSOCK if takes_sockets(driver) else 0
    with current.connection.driver_mutex.hold(current.actor):
        record = devices.add_driver(current.tables, driver.number, driver.name, flags)
        if isinstance(record, int):
            return record
        driver_uevent(current, record, Action.ADD)
    if not current.connection.no_autoprobe.load():
        _driver_attach(current, record)
    return 0


def vmbus_driver_unregister(current: Current, driver: HvDriver) -> bool:
    """Forget a driver, then take it from all its devices, which stay, unbound; whether it was registered."""
    with current.connection.driver_mutex.hold(current.actor):
        was = devices.remove_driver(current.tables, driver.number)

    def remove(device: Device) -> None:
        if device.driver == driver.number:
            vmbus_remove(current, device)

    _for_each_device(current, remove)
    if was:
        with current.connection.driver_mutex.hold(current.actor):
            for record in current.tables.drivers.live():
                if record.number == driver.number:
                    driver_uevent(current, record, Action.REMOVE)
    return was


def new_id_store(current: Current, record: Driver, guid: bytes) -> int:
    """A write to a driver's `new_id`: 0, -EEXIST, -ENOMEM; then the devices of that class are probed."""
    with record.dynids_lock.hold(current.actor):
        result = devices.add_dynid(record, guid)
    if result == 0:
        _driver_attach(current, record)
    return result


def remove_id_store(current: Current, record: Driver, guid: bytes) -> int:
    """A write to a driver's `remove_id`: 0, or -ENODEV. Devices that are bound stay so."""
    with record.dynids_lock.hold(current.actor):
        return devices.remove_dynid(record, guid)


def vmbus_shutdown(current: Current) -> None:
    """`device_shutdown`, before the machine goes: each bound device's driver may make it quiet."""

    def shut_down(device: Device) -> None:
        driver: object = DRIVER_OBJECTS.get(device.driver)
        if isinstance(driver, ShutsDown):
            driver.shutdown(current, device)

    _for_each_device(current, shut_down)
