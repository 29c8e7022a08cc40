"""Which CPU takes a channel's interrupts (`init_vp_index`), and what kind of device it is."""

from __future__ import annotations

import mmap
from uuid import UUID

import pytest

from emu.wire.device_classes import BY_NAME, CLASSES, HV_UNKNOWN, hv_sock_guid
from emu.wire.messages import OfferChannel
from emu.wire.versions import VERSION_WIN7, VERSION_WIN8, VERSION_WS2008
from guestproc.kernel.layout import Channel, Era, KernelTables
from guestproc.protocol import offers
from guestproc.protocol.placement import (
    Affinity,
    device_id_of,
    hv_get_dev_type,
    hv_is_perf_channel,
    init_vp_index,
    init_vp_index_seed,
    online_cpus,
    retarget,
    set_channel_affinity_state,
)

RAM_BYTES = 16 << 20


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
    entered = offers.choose_place(tables, channel)
    assert entered.refusal is None
    offers.publish(tables, channel, entered)
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


# -- era seed: the same choice by another algorithm, made later ----------------------------------------


@pytest.fixture
def seed() -> KernelTables:
    """Six CPUs on two nodes, all online, of the article's kernel."""
    tables = KernelTables.format(mmap.mmap(-1, RAM_BYTES), 6, Era.SEED, [10, 11, 12, 13, 14, 15])
    tables.connection.nr_numa_nodes = 2
    tables.connection.numa_cpus[0] = 0b000111
    tables.connection.numa_cpus[1] = 0b111000
    tables.connection.vmbus_proto_version = VERSION_WIN8
    for cpu in tables.cpus.live():
        cpu.online.store(1)
    return tables


def placed(tables: KernelTables, relid: int, instance: int, *, index: int = 0, class_name: str = "nic") -> Channel:
    """An offer, entered and then placed, as the work item does."""
    channel = offered(tables, relid, instance, index=index, class_name=class_name)
    init_vp_index_seed(tables, channel)
    return channel


def test_seed_places_later(seed: KernelTables) -> None:
    """Entering an offer chooses nothing: no device has a place yet."""
    offered(seed, 1, 1)

    assert (seed.connection.next_numa_node, list(seed.connection.hv_numa_map[:2])) == (0, [0, 0])


def test_seed_rotates_over_nodes_and_their_cpus(seed: KernelTables) -> None:
    """A node each in turn, the lowest CPU that has none; when all of a node have one, it begins anew."""
    channels = [placed(seed, relid, relid) for relid in range(1, 8)]

    assert targets(channels) == [0, 3, 1, 4, 2, 5, 0]
    assert [channel.target_vp for channel in channels] == [10, 13, 11, 14, 12, 15, 10]
    assert [channel.numa_node for channel in channels] == [0, 1, 0, 1, 0, 1, 0]
    assert list(seed.connection.hv_numa_map[:2]) == [0b000001, 0b111000]


@pytest.mark.parametrize("version", [VERSION_WS2008, VERSION_WIN7])
def test_seed_leaves_everything_to_vp_0_on_old_hosts(seed: KernelTables, version: int) -> None:
    """Fast or not: the CPU that is VP 0, and where no CPU is, CPU 0."""
    seed.connection.vmbus_proto_version = version
    assert targets([placed(seed, relid, relid) for relid in (1, 2)]) == [0, 0]

    seed.cpus.at(4).vp_index = 0

    assert targets([placed(seed, relid, relid) for relid in (3, 4)]) == [4, 4]
    assert list(seed.connection.hv_numa_map[:2]) == [0, 0]


def test_seed_leaves_slow_devices_to_cpu_0(seed: KernelTables) -> None:
    """As today, and they take no place from others."""
    assert targets([placed(seed, relid, relid, class_name="kvp") for relid in (1, 2, 3)]) == [0, 0, 0]
    assert list(seed.connection.hv_numa_map[:2]) == [0, 0]


def test_balanced_sub_channels_go_round_the_nodes(seed: KernelTables) -> None:
    """The default: a sub-channel is placed as if it were a device of its own."""
    channels = [placed(seed, 1 + index, 1, index=index) for index in range(6)]

    assert targets(channels) == [0, 3, 1, 4, 2, 5]


def test_localized_sub_channels_stay_on_their_primarys_node(seed: KernelTables) -> None:
    """The CPUs of that node, each once, until all have one; then anew. Other devices' places count as well."""
    primary = placed(seed, 1, 1)
    set_channel_affinity_state(primary, Affinity.LOCALIZED)
    other = placed(seed, 50, 50)
    subs = [placed(seed, 1 + index, 1, index=index) for index in range(1, 8)]

    assert (targets([primary]), targets([other])) == ([0], [3])
    assert targets(subs) == [1, 2, 0, 1, 2, 0, 1]
    assert {sub.affinity_policy for sub in subs} == {Affinity.LOCALIZED}
    assert primary.alloced_cpus_in_node == 0b000010


def test_localized_cpu_is_given_back(seed: KernelTables) -> None:
    """`hv_process_channel_removal` clears it in the primary's mask, so that a driver that comes again gets it."""
    primary = placed(seed, 1, 1)
    set_channel_affinity_state(primary, Affinity.LOCALIZED)
    subs = [placed(seed, 1 + index, 1, index=index) for index in (1, 2)]
    assert (targets(subs), primary.alloced_cpus_in_node) == ([1, 2], 0b110)

    offers.leave_lists(seed, subs[0])

    assert primary.alloced_cpus_in_node == 0b100
    offers.leave_lists(seed, primary)
    seed.channels.free(primary)
    offers.leave_lists(seed, subs[1])  # its primary is gone, and so is the mask


def test_balanced_channel_keeps_its_place_in_the_map(seed: KernelTables) -> None:
    """That kernel never clears a bit of hv_numa_map but all of a node's."""
    channel = placed(seed, 1, 1)

    offers.leave_lists(seed, channel)

    assert seed.connection.hv_numa_map[0] == 1


def test_seed_passes_over_offline_cpus_and_empty_nodes(seed: KernelTables) -> None:
    """A node counts the CPUs that are online; with none at all, CPU 0."""
    for number in (1, 3, 4, 5):
        seed.cpus.at(number).online.store(0)
    assert targets([placed(seed, relid, relid) for relid in range(1, 5)]) == [0, 2, 0, 2]

    for cpu in seed.cpus.live():
        cpu.online.store(0)

    assert targets([placed(seed, 9, 9)]) == [0]


def test_moved_channel_takes_its_allocation_along(tables: KernelTables) -> None:
    """Its CPU is given back unless another one has it; the new one is allocated, so the next device goes elsewhere."""
    first, second = offered(tables, 1, 1), offered(tables, 2, 2)
    assert targets([first, second]) == [0, 2]
    retarget(tables, first, 2)
    assert (tables.connection.hv_numa_map[0], tables.connection.hv_numa_map[1]) == (0, 0b0100)
    retarget(tables, first, 3)

    assert (tables.connection.hv_numa_map[0], tables.connection.hv_numa_map[1]) == (0, 0b1100)
    assert (first.target_cpu.load(), first.target_vp) == (3, 13)
    assert targets([offered(tables, 3, 3)]) == [0]


def test_moved_slow_channel_is_not_counted(tables: KernelTables) -> None:
    """A device that wants no speed takes no CPU from those that do."""
    slow = offered(tables, 1, 1, class_name="kvp")
    retarget(tables, slow, 3)

    assert (slow.target_cpu.load(), list(tables.connection.hv_numa_map[:2])) == (3, [0, 0])
