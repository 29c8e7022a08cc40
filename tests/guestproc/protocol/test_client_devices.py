"""Device and driver records: names, references, matching."""

from __future__ import annotations

import errno
from uuid import UUID

import pytest

from emu.wire.messages import ChannelFlags
from guestproc.kernel.layout import MAX_DYNAMIC_IDS, Channel, Device, Driver, KernelTables
from guestproc.protocol import devices
from guestproc.protocol.devices import REFERENCE, DeviceState, DriverFlags


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
    name = "one"
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


def registered(tables: KernelTables, number: int = 7, name: str = "one", flags: int = 0) -> Driver:
    """A driver's record."""
    record = devices.add_driver(tables, number, name, flags)
    assert not isinstance(record, int)
    return record


@pytest.mark.parametrize(
    ("override", "class_id", "dynamic", "matches"),
    [
        ("", 1, [], True),
        ("", 2, [], False),
        ("", 2, [2], True),
        ("", 3, [2], False),
        ("one", 2, [], True),
        ("two", 1, [], False),
        ("two", 2, [2], False),
    ],
)
def test_match(tables: KernelTables, override: str, class_id: int, dynamic: list[int], matches: bool) -> None:
    """By class, of the table or added; driver_override names the only driver, which then needs no id."""
    device = device_of(tables, primary(tables, 5, class_id=class_id))
    device.driver_override = override.encode()
    record = registered(tables)
    for one in dynamic:
        assert devices.add_dynid(record, UUID(int=one).bytes_le) == 0

    assert devices.vmbus_match(tables, device, OneDriver(), record) == matches


@pytest.mark.parametrize(("flags", "matches"), [(0, False), (DriverFlags.HVSOCK, True)])
def test_sockets_are_for_the_driver_of_sockets(tables: KernelTables, flags: int, matches: bool) -> None:
    """An hv_sock channel goes to nobody else, whatever its class or an override says."""
    channel = primary(tables, 5)
    channel.offermsg = bytes(56) + int(ChannelFlags.TLNPI_PROVIDER_OFFER).to_bytes(2, "little") + bytes(138)
    device = device_of(tables, channel)
    device.driver_override = b"one"

    assert devices.vmbus_match(tables, device, OneDriver(), registered(tables, flags=flags)) == matches


def test_dynamic_ids(tables: KernelTables) -> None:
    """Added once (-EEXIST), taken back once (-ENODEV), as many as fit (-ENOMEM)."""
    record = registered(tables)
    ids = [UUID(int=number).bytes_le for number in range(1, MAX_DYNAMIC_IDS + 2)]

    assert [devices.add_dynid(record, one) for one in ids] == [0] * MAX_DYNAMIC_IDS + [-errno.ENOMEM]
    assert devices.add_dynid(record, ids[3]) == -errno.EEXIST
    assert devices.remove_dynid(record, ids[3]) == 0
    assert devices.remove_dynid(record, ids[3]) == -errno.ENODEV
    assert devices.dynamic_ids(record) == [*ids[:3], *ids[4:MAX_DYNAMIC_IDS]]


def test_driver_is_registered_once(tables: KernelTables) -> None:
    """-EBUSY while it is; one that comes back has its record, and none of its dynamic ids."""
    first = registered(tables)
    devices.add_dynid(first, UUID(int=4).bytes_le)

    assert devices.add_driver(tables, 7, "one") == -errno.EBUSY
    assert devices.remove_driver(tables, 7)
    assert not devices.remove_driver(tables, 7)
    assert devices.registered(tables) == []
    assert registered(tables) == first
    assert devices.dynamic_ids(first) == []


def test_driver_that_went_is_not_tried(tables: KernelTables) -> None:
    """Candidates were noted before the device was locked; one that was taken away since is passed over."""
    for number in (1, 2, 3):
        registered(tables, number, f"driver{number}")
    candidates = devices.registered(tables)

    assert devices.remove_driver(tables, 2)
    registered(tables, 4, "driver4")

    assert [one.number for one in devices.matching(candidates, lambda record: record.number != 3)] == [1]


def test_table_of_drivers_has_an_end(tables: KernelTables) -> None:
    """64 of them."""
    added = [devices.add_driver(tables, number, f"driver{number}") for number in range(1, 66)]

    assert sum(isinstance(one, Driver) for one in added) == 64
    assert added[64] == -errno.ENOMEM


def test_device_is_found_by_relid_or_instance(tables: KernelTables) -> None:
    """With a reference; a sub-channel means its device; one that is not registered is not there."""
    channel = primary(tables, 5)
    channel.relid = 9
    tables.relids.publish(channel)
    instance = UUID(int=5).bytes_le
    assert devices.find_device(tables, 9, b"") is None
    device = device_of(tables, channel)
    assert devices.find_device(tables, 9, b"") is None
    devices.register(tables, device)

    assert devices.find_device(tables, 9, b"") == devices.find_device(tables, 0, instance) == device
    assert device.state.load() // REFERENCE == 3
    assert devices.find_device(tables, 8, b"") is None
    assert devices.find_device(tables, 0, bytes(16)) is None
