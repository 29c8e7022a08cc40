"""Device and driver records: names, references, matching."""

from __future__ import annotations

import errno
from uuid import UUID

import pytest

from guestproc.kernel.layout import Channel, Device, KernelTables
from guestproc.protocol import devices
from guestproc.protocol.devices import REFERENCE, DeviceState


def primary(tables: KernelTables, instance: int, *, class_id: int = 1) -> Channel:
    """A primary channel on the list, without a device."""
    channel = tables.channels.alloc()
    assert channel is not None
    channel.if_instance = UUID(int=instance).bytes_le
    channel.if_type = UUID(int=class_id).bytes_le
    channel.device_id = 3
    tables.chn_list.append(channel)
    tables.instances.add(channel)
    return channel


def device_of(tables: KernelTables, channel: Channel) -> Device:
    """Its device, created."""
    device = devices.create(tables, channel)
    assert device is not None
    channel.device_obj = device.handle
    return device


class OneDriver:
    """A driver that takes one class."""

    number = 7
    id_table = frozenset([UUID(int=1).bytes_le])


def test_device_knows_its_channel_and_class(tables: KernelTables) -> None:
    """All of it from the channel, vendor 0x1414."""
    channel = primary(tables, 5)

    device = device_of(tables, channel)

    assert (device.channel, device.device_id, device.vendor_id) == (channel.handle, 3, 0x1414)
    assert (device.dev_instance, device.dev_type) == (channel.if_instance, channel.if_type)
    assert not devices.is_there(device)


def test_name_is_taken_once(tables: KernelTables) -> None:
    """Two devices of one instance, of whatever class, would have one name in sysfs: the second is -EEXIST."""
    first, second = (device_of(tables, primary(tables, 5, class_id=one)) for one in (1, 2))

    assert devices.register(tables, first) == 0
    assert devices.register(tables, second) == -errno.EEXIST
    assert (devices.is_there(first), devices.is_there(second)) == (True, False)


def test_device_on_its_way_out_is_not_there(tables: KernelTables) -> None:
    """Whoever has waited for its lock leaves it alone."""
    device = device_of(tables, primary(tables, 5))
    devices.register(tables, device)
    device.state.fetch_or(int(DeviceState.REMOVING))

    assert not devices.is_there(device)


def test_walker_keeps_a_device_that_goes_meanwhile(tables: KernelTables) -> None:
    """The record lives until the last reference is given back, and then it is free."""
    channel = primary(tables, 5)
    device = device_of(tables, channel)
    devices.register(tables, device)
    primary(tables, 6)  # has no device
    unregistered = primary(tables, 8)
    device_of(tables, unregistered)

    (held,) = devices.get_all(tables)
    devices.put_device(tables, device)

    assert held == device
    assert held.alive()
    assert held.state.load() // REFERENCE == 1
    devices.put_device(tables, held)
    assert not held.alive()


def test_devices_without_a_record_are_refused(tables: KernelTables) -> None:
    """2,304 of them; the next one is None."""
    channel = primary(tables, 5)
    for _ in range(2304):
        assert tables.devices.alloc() is not None

    assert devices.create(tables, channel) is None


def test_binding_and_unbinding(tables: KernelTables) -> None:
    """The driver's number and the bit, together; an old probe's error is forgotten."""
    device = device_of(tables, primary(tables, 5))
    device.probe_error = 5

    devices.bind(device, OneDriver())
    assert (device.driver, device.probe_error) == (7, 0)
    assert device.state.load() & DeviceState.BOUND
    devices.unbind(device)
    assert device.driver == 0
    assert not device.state.load() & DeviceState.BOUND


@pytest.mark.parametrize(
    ("override", "class_id", "matches"), [(0, 1, True), (0, 2, False), (7, 2, True), (8, 1, False)]
)
def test_match(tables: KernelTables, override: int, class_id: int, matches: bool) -> None:
    """By class; driver_override names the only driver, which then needs no id."""
    device = device_of(tables, primary(tables, 5, class_id=class_id))
    device.driver_override = override

    assert devices.vmbus_match(device, OneDriver()) == matches


def test_driver_that_went_is_not_tried(tables: KernelTables) -> None:
    """Candidates were noted before the device was locked; one that was taken away since is passed over."""
    for number in (1, 2, 3):
        assert devices.add_driver(tables, number, f"driver{number}") is not None
    candidates = devices.registered(tables)

    assert devices.remove_driver(tables, 2)
    assert not devices.remove_driver(tables, 2)
    devices.add_driver(tables, 4, "driver4")  # its record is the one that was freed

    assert list(devices.matching(candidates, lambda number: number != 3)) == [1]


def test_table_of_drivers_has_an_end(tables: KernelTables) -> None:
    """64 of them."""
    added = [devices.add_driver(tables, number, "driver") for number in range(1, 66)]

    assert added[:64].count(None) == 0
    assert added[64] is None
