"""`hv_get_dev_type` and `init_vp_index`: what a channel's device is, and which CPU takes its interrupts.

Under channel_mutex and the hotplug lock (reference 3.9, the algorithm of 6.12): devices rotate over NUMA
nodes, channels of one device over the CPUs of theirs; devices that need no speed stay on CPU 0.
"""

from __future__ import annotations

from collections.abc import Iterable

from emu.wire.device_classes import BY_GUID
from emu.wire.guids import guid_from_wire
from guestproc.kernel.layout import Channel, KernelTables

HV_UNKNOWN = 16


def hv_get_dev_type(if_type: bytes) -> tuple[int, bool]:
    """Device type number of a class GUID (wire form), and whether such a device wants its CPUs spread."""
    device_class = BY_GUID.get(guid_from_wire(if_type))
    if device_class is None:
        return HV_UNKNOWN, False
    return device_class.number, device_class.perf


def online_cpus(tables: KernelTables) -> int:
    """Mask of the CPUs that are online."""
    return sum(1 << cpu.index for cpu in tables.cpus.live() if cpu.online.load())


def init_vp_index(tables: KernelTables, channel: Channel, *, perf: bool, others: Iterable[int]) -> None:
    """Choose target_cpu and target_vp; `others` are the target CPUs of the device's other channels."""
    connection = tables.connection
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
        cpus = connection.numa_cpus[node] & housekeeping
        available = (connection.hv_numa_map[node] ^ connection.numa_cpus[node]) & housekeeping
        if not available:
            connection.hv_numa_map[node] = 0
            available = cpus
        target = (available & -available).bit_length() - 1
        connection.hv_numa_map[node] |= 1 << target
        if channel.sub_channel_index >= ncpus or attempt > ncpus or target not in used:
            break
    _place(tables, channel, target)


def hv_clear_allocated_cpu(tables: KernelTables, cpu: int) -> None:
    """No channel of a fast device targets this CPU any more: it may be chosen again first."""
    connection = tables.connection
    for node in range(connection.nr_numa_nodes):
        if connection.numa_cpus[node] >> cpu & 1:
            connection.hv_numa_map[node] &= ~(1 << cpu)


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
