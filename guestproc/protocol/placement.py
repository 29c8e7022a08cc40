"""`hv_get_dev_type` and `init_vp_index`: what a channel's device is, and which CPU takes its interrupts.

Devices rotate over NUMA nodes, channels of one device over CPUs; devices that need no speed stay on CPU 0
(reference 3.9). Two algorithms: that of 6.12 (`init_vp_index`), under channel_mutex and the hotplug lock, and
era `seed`'s (`init_vp_index_seed`), under bind_channel_to_cpu_lock, where a device may ask to stay on one node.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import IntEnum
from functools import lru_cache

from emu.wire.device_classes import HV_UNKNOWN, DeviceClass, class_of
from emu.wire.guids import guid_from_wire
from guestproc.kernel.layout import Channel, KernelTables
from guestproc.protocol.era import SHARED_INTERRUPT_VERSIONS, era_of


class Affinity(IntEnum):
    """`hv_numa_policy` (era `seed`): where a device's sub-channels go."""

    BALANCED = 0
    """To a node each in turn, like devices."""
    LOCALIZED = 1
    """To the CPUs of their primary's node."""


@lru_cache(maxsize=256)
def _class_of(if_type: bytes) -> DeviceClass | None:
    # Bounded: the host chooses the GUIDs.
    return class_of(guid_from_wire(if_type))


def hv_get_dev_type(if_type: bytes) -> int | None:
    """Device type number of a class GUID (wire form); None for one that nobody knows, which is HV_UNKNOWN."""
    device_class = _class_of(if_type)
    return None if device_class is None else device_class.number


def device_id_of(if_type: bytes) -> int:
    """What `Channel.device_id` holds for a class GUID (wire form)."""
    number = hv_get_dev_type(if_type)
    return HV_UNKNOWN if number is None else number


def hv_is_perf_channel(channel: Channel) -> bool:
    """Whether this channel's device wants its channels spread over the CPUs."""
    device_class = _class_of(channel.if_type)
    return device_class is not None and device_class.perf


def online_cpus(tables: KernelTables) -> int:
    """Mask of the CPUs that are online."""
    mask = 0
    for cpu in tables.all_cpus():
        if cpu.online.load():
            mask |= 1 << cpu.index
    return mask


def init_vp_index(tables: KernelTables, channel: Channel, others: Iterable[int]) -> None:
    """Choose target_cpu and target_vp; `others` are the target CPUs of the device's other channels."""
    connection = tables.connection
    perf = hv_is_perf_channel(channel)
    housekeeping = online_cpus(tables)
    if not perf or not housekeeping:
        _place(tables, channel, 0)
        if perf:
            connection.hv_numa_map[0] |= 1
        return
    used = set(others)
    ncpus = housekeeping.bit_count()
    target = 0
    for attempt in range(1, ncpus + 2):
        node = _next_node(tables, housekeeping)
        available = (connection.hv_numa_map[node] ^ connection.numa_cpus[node]) & housekeeping
        if not available:
            connection.hv_numa_map[node] = 0
            available = connection.numa_cpus[node] & housekeeping
        target = (available & -available).bit_length() - 1
        connection.hv_numa_map[node] |= 1 << target
        if channel.sub_channel_index >= ncpus or attempt > ncpus or target not in used:
            break
    _place(tables, channel, target)


def init_vp_index_seed(tables: KernelTables, channel: Channel) -> None:
    """Choose target_cpu, target_vp and numa_node as era `seed` does; `channel` is on its lists already."""
    connection = tables.connection
    online = online_cpus(tables)
    shared = connection.vmbus_proto_version in SHARED_INTERRUPT_VERSIONS
    if shared or not online or not hv_is_perf_channel(channel):
        channel.numa_node = 0
        _place(tables, channel, _cpu_of_vp_0(tables) if shared else 0)
        return
    primary = tables.channels.find(channel.primary_channel) if channel.primary_channel else None
    if primary is None or channel.affinity_policy == Affinity.BALANCED:
        channel.numa_node = _next_node(tables, online)
        primary = channel
    node: int = primary.numa_node
    cpus = connection.numa_cpus[node] & online
    if connection.hv_numa_map[node].bit_count() == cpus.bit_count():
        connection.hv_numa_map[node] = 0
    taken = 0
    if primary.affinity_policy == Affinity.LOCALIZED:
        if cpus & ~primary.alloced_cpus_in_node == 0:
            primary.alloced_cpus_in_node = 0
        taken = primary.alloced_cpus_in_node
    available = cpus & ~connection.hv_numa_map[node] & ~taken or cpus & ~taken
    bit = available & -available
    connection.hv_numa_map[node] |= bit
    if primary.affinity_policy == Affinity.LOCALIZED:
        primary.alloced_cpus_in_node = taken | bit
    _place(tables, channel, max(0, bit.bit_length() - 1))


def set_channel_affinity_state(channel: Channel, policy: Affinity) -> None:
    """A driver's wish for the sub-channels that it is about to ask for; era `current` does not know it."""
    channel.affinity_policy = policy


def _cpu_of_vp_0(tables: KernelTables) -> int:
    """Which CPU is VP 0, which takes every interrupt below 2.4. The kernel takes it for granted that CPU 0 is."""
    return next((cpu.index for cpu in tables.cpus.live() if cpu.vp_index == 0), 0)


def retarget(tables: KernelTables, channel: Channel, cpu: int) -> None:
    """Under channel_mutex: a channel's interrupts go to another CPU, and the count of who has which follows."""
    origin = channel.target_cpu.load()
    _place(tables, channel, cpu)
    if hv_is_perf_channel(channel):
        hv_update_allocated_cpus(tables, origin, cpu)


def hv_update_allocated_cpus(tables: KernelTables, old_cpu: int, new_cpu: int) -> None:
    """One channel more on a CPU, one less on another, which stays allocated while others have it."""
    connection = tables.connection
    for node in range(connection.nr_numa_nodes):
        if connection.numa_cpus[node] >> new_cpu & 1:
            connection.hv_numa_map[node] |= 1 << new_cpu
    _clear_allocated_cpu(tables, old_cpu)


def give_cpu_back(tables: KernelTables, channel: Channel) -> None:
    """For a channel that is on no list any more: its CPU may be chosen first again.

    6.12's `hv_clear_allocated_cpu` keeps it while another channel of a fast device has that CPU; one of the
    first looked at usually does. Era `seed` gives back only what its primary's node keeps count of.
    """
    cpu = channel.target_cpu.load()
    if era_of(tables).percpu_lists:
        if channel.affinity_policy == Affinity.LOCALIZED:
            primary = tables.channels.find(channel.primary_channel) if channel.primary_channel else channel
            if primary is not None:
                primary.alloced_cpus_in_node &= ~(1 << cpu)
        return
    if hv_is_perf_channel(channel):
        _clear_allocated_cpu(tables, cpu)


def _clear_allocated_cpu(tables: KernelTables, cpu: int) -> None:
    """`hv_clear_allocated_cpu`: unless another channel of a fast device has it."""
    if any(other.target_cpu.load() == cpu and hv_is_perf_channel(other) for other in _all_channels(tables)):
        return
    connection = tables.connection
    for node in range(connection.nr_numa_nodes):
        if connection.numa_cpus[node] >> cpu & 1:
            connection.hv_numa_map[node] &= ~(1 << cpu)


def is_target(tables: KernelTables, cpu: int) -> bool:
    """Under channel_mutex: whether the interrupts of any channel or sub-channel come to this CPU."""
    return next(targets_of(tables, cpu), None) is not None


def targets_of(tables: KernelTables, cpu: int) -> Iterator[Channel]:
    """Under channel_mutex: the channels whose interrupts come to this CPU."""
    return (channel for channel in _all_channels(tables) if channel.target_cpu.load() == cpu)


def _all_channels(tables: KernelTables) -> Iterator[Channel]:
    for primary in tables.chn_list:
        yield primary
        yield from tables.sc_list(primary)


def _next_node(tables: KernelTables, housekeeping: int) -> int:
    """Round robin over the nodes that have a CPU to offer."""
    connection = tables.connection
    while True:
        node: int = connection.next_numa_node
        connection.next_numa_node = node + 1
        if node >= connection.nr_numa_nodes:
            connection.next_numa_node = 0
        elif connection.numa_cpus[node] & housekeeping:
            return node


def _place(tables: KernelTables, channel: Channel, cpu: int) -> None:
    channel.target_cpu.store(cpu)
    channel.target_vp = tables.cpus.at(cpu).vp_index
