"""A small world as `LiveView` sees a machine: its host says in the mirror what a real one would."""

from __future__ import annotations

from uuid import UUID

from emu.control import HOST_TABLES_BYTES
from emu.host_tables import HostGpadl, HostTables, HostVp
from emu.interrupts import HALTED
from emu.layout import D_HOST_RUN_STATE
from emu.mirror import Mirror, MirrorChannel
from emu.wire.synic import HV_SYNIC_SINT_COUNT
from hostproc.protocol.states import ChannelState, GpadlState
from tests.guestproc.scripted_host import Assembly, HostChannel
from tests.guestproc.world import World
from tools.invariants import Finding
from tools.invariants_settled import judge
from tools.live_view import LiveView


def seen(world: World) -> LiveView:
    """The world from outside, its host asleep."""
    publish(world)
    return LiveView(world.machine, world.tables)


def findings(world: World, number: int, parked: tuple[int, ...] = ()) -> list[Finding]:
    """What breaks one invariant."""
    found = judge(seen(world), lambda: parked)
    return [one for one in found if one.number == number]


def publish(world: World) -> None:
    """Write the mirror, and halt the host."""
    host, machine = world.host, world.machine
    # The host's tables are written once, by one writer: another one begins afresh.
    begin = machine.control.host_tables_offset
    machine.control.memory[begin : begin + HOST_TABLES_BYTES] = bytes(HOST_TABLES_BYTES)
    tables, mirror = HostTables(machine.control), Mirror(machine.control)
    for position, synic in enumerate(world.partition.synics):
        waiting = tuple(world.partition.queues.waiting(position, sint) for sint in range(HV_SYNIC_SINT_COUNT))
        registers = synic.scontrol, synic.simp.register, synic.siefp.register
        tables.write_vp(position, HostVp(*registers, tuple(synic.sint), waiting))
    for channel in host.channels.values():
        relid = channel.offer.child_relid
        mirror.clear_channel(relid, 0)
        if not channel.released:
            mirror.write_channel(_row(channel))
            rows = [(handle, one) for handle, one in host.gpadls.items() if one.child_relid == relid]
            tables.write_gpadls(relid, tuple(_gpadl(relid, handle, one, channel) for handle, one in rows))
    mirror.write_head(
        version=0 if host.contact is None else host.contact.vmbus_version_requested,
        offers=len(host.channels),
        open_channels=0,
        gpadls=len(host.gpadls),
        to_slots=world.partition.queues.total_waiting,
        outgoing=len(host.outbox),
        incoming=len(host.inbox),
        attached_pid=0,
        disconnects=0,
    )
    machine.doorbells.view.store_u32(D_HOST_RUN_STATE, HALTED)
    machine.control.host_wakes_ns.store(1 << 62)


def _gpadl(relid: int, handle: int, one: Assembly, channel: HostChannel) -> HostGpadl:
    runs = tuple((pfn, 1) for each in one.ranges for pfn in each.pfns)
    ring = channel.opened is not None and channel.opened.ringbuffer_gpadlhandle == handle
    return HostGpadl(relid, handle, GpadlState.ACCEPTED, len(runs), ring, runs)


def _row(channel: HostChannel) -> MirrorChannel:
    state = ChannelState.CLOSED if channel.opened is None else ChannelState.OPEN
    if channel.revoked:
        state = ChannelState.REVOKED
    offer, opened = channel.offer, channel.opened
    return MirrorChannel(
        relid=offer.child_relid,
        state=state,
        generation=1,
        sub_channel_index=offer.sub_channel_index,
        ring_gpadl=0 if opened is None else opened.ringbuffer_gpadlhandle,
        gpadl_count=1,
        target_vp=0 if opened is None else opened.target_vp,
        connection_id=offer.connection_id,
        flags=0,
        if_type=UUID(int=offer.if_type.int),
        if_instance=offer.if_instance,
    )
