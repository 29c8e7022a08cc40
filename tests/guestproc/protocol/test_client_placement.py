"""Which CPU takes a channel's interrupts (`init_vp_index`), and what kind of device it is."""

from __future__ import annotations

from uuid import UUID

import pytest

from emu.wire.device_classes import BY_NAME, CLASSES, HV_UNKNOWN, hv_sock_guid
from emu.wire.messages import OfferChannel
from guestproc.kernel.layout import Channel, KernelTables
from guestproc.protocol import offers
from guestproc.protocol.placement import (
    device_id_of,
    hv_get_dev_type,
    hv_is_perf_channel,
    init_vp_index,
    online_cpus,
)


def offered(tables: KernelTables, relid: int, instance: int, *, index: int = 0, class_name: str = "nic") -> Channel:
    """An offer, entered."""
    offer = OfferChannel(
        if_type=BY_NAME[class_name].guid,
        if_instance=UUID(int=instance),
        sub_channel_index=index,
        child_relid=relid,
        connection_id=relid,
    )
    channel = offers.new_channel(tables, offer, offer.pack(), 0)
    assert channel is not None
    assert offers.enter_channel(tables, channel).refusal is None
    return channel


def targets(channels: list[Channel]) -> list[int]:
    """Target CPU of each."""
    return [channel.target_cpu.load() for channel in channels]


@pytest.mark.parametrize("one", CLASSES, ids=lambda one: one.name)
def test_device_type_of_each_class(one: object) -> None:
    """The kernel's numbers; classes that it does not know, or leaves alone, are HV_UNKNOWN."""
    device_class = next(known for known in CLASSES if known is one)

    assert hv_get_dev_type(device_class.guid.bytes_le) == device_class.number
    assert device_id_of(device_class.guid.bytes_le) == device_class.number


def test_unknown_class_has_no_type() -> None:
    """None says that it is to be logged; the record holds HV_UNKNOWN. hv_sock's classes are known by their tail."""
    assert hv_get_dev_type(UUID(int=99).bytes_le) is None
    assert device_id_of(UUID(int=99).bytes_le) == HV_UNKNOWN
    assert hv_get_dev_type(hv_sock_guid(5000).bytes_le) == HV_UNKNOWN


def test_slow_devices_stay_on_cpu_0(tables: KernelTables) -> None:
    """Devices that need no speed, and classes that nobody knows; they take no place from others."""
    channels = [offered(tables, relid, relid, class_name="kvp") for relid in range(1, 5)]

    assert targets(channels) == [0, 0, 0, 0]
    assert not any(map(hv_is_perf_channel, channels))
    assert list(tables.connection.hv_numa_map[:2]) == [0, 0]


def test_fast_devices_rotate_over_nodes_and_their_cpus(tables: KernelTables) -> None:
    """Node 0 has CPUs 0 and 1, node 1 has 2 and 3: a node each in turn, its lowest free CPU; then anew."""
    channels = [offered(tables, relid, relid) for relid in range(1, 7)]

    assert targets(channels) == [0, 2, 1, 3, 0, 2]
    assert [channel.target_vp for channel in channels] == [10, 12, 11, 13, 10, 12]


def test_channels_of_one_device_have_cpus_of_their_own(tables: KernelTables) -> None:
    """As long as there are any: four channels on four CPUs; the fifth begins anew."""
    channels = [offered(tables, 1 + index, 1, index=index) for index in range(5)]

    assert sorted(targets(channels)[:4]) == [0, 1, 2, 3]
    assert targets(channels)[4] in range(4)


def test_offline_cpus_and_empty_nodes_are_passed_over(tables: KernelTables) -> None:
    """A node without an online CPU gets nothing."""
    for number in (2, 3):
        tables.cpus.at(number).online.store(0)

    assert online_cpus(tables) == 0b0011
    assert targets([offered(tables, relid, relid) for relid in range(1, 4)]) == [0, 1, 0]


def test_nobody_online_means_cpu_0(tables: KernelTables) -> None:
    """No choice to make; a fast device takes CPU 0's place on its node."""
    for cpu in tables.cpus.live():
        cpu.online.store(0)
    channel = offered(tables, 1, 1)

    assert channel.target_cpu.load() == 0
    assert tables.connection.hv_numa_map[0] == 1


def test_cpu_is_given_back_with_its_last_channel(tables: KernelTables) -> None:
    """A CPU whose last fast channel went is chosen first again; while one is left it is not."""
    channels = [offered(tables, relid, relid) for relid in range(1, 6)]
    assert targets(channels) == [0, 2, 1, 3, 0]
    assert list(tables.connection.hv_numa_map[:2]) == [0b0001, 0b1100]

    offers.leave_lists(tables, channels[0])
    assert tables.connection.hv_numa_map[0] == 0b0001
    offers.leave_lists(tables, channels[4])
    assert tables.connection.hv_numa_map[0] == 0
    offers.leave_lists(tables, channels[1])
    assert tables.connection.hv_numa_map[1] == 0b1000


def test_slow_channel_gives_nothing_back(tables: KernelTables) -> None:
    """It had taken nothing: CPU 0 stays the fast device's."""
    offered(tables, 1, 1)
    slow = offered(tables, 2, 2, class_name="kvp")

    offers.leave_lists(tables, slow)

    assert tables.connection.hv_numa_map[0] == 1


def test_high_index_takes_what_comes(tables: KernelTables) -> None:
    """A sub-channel whose index is not below the number of CPUs does not look for an unused one."""
    channel = offered(tables, 1, 1)
    channel.sub_channel_index = 4

    init_vp_index(tables, channel, others=range(4))

    assert channel.target_cpu.load() == 2
