"""An offer becomes a channel: the record, its place in the lists, its entry in the relid table (reference 3.7).

Everything here runs under channel_mutex but `new_channel`, which works on a record that nobody knows yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from emu.wire.guids import guid_to_wire
from emu.wire.messages import OfferChannel
from guestproc.kernel.layout import CallbackMode, Channel, ChannelState, KernelTables
from guestproc.protocol.placement import hv_get_dev_type, init_vp_index
from guestproc.vmbus.numbers import Tasklets


@dataclass(frozen=True, slots=True)
class Entered:
    """Where a new channel found its place: a primary (`primary` None), a sub-channel, or a duplicate offer."""

    primary: Channel | None
    duplicate: bool = False


def new_channel(tables: KernelTables, offer: OfferChannel, payload: bytes, serial: int) -> Channel | None:
    """The channel object of an offer, in CHANNEL_OFFER_STATE; None when there is no record for it."""
    channel: Channel | None = tables.channels.alloc()
    if channel is None:
        return None
    channel.relid = offer.child_relid
    channel.sig_event = offer.connection_id
    channel.is_dedicated_interrupt = int(offer.is_dedicated_interrupt)
    channel.monitor_allocated = int(offer.monitor_allocated)
    channel.monitor_grp = offer.monitorid // 32
    channel.monitor_bit = offer.monitorid % 32
    channel.sub_channel_index = offer.sub_channel_index
    channel.if_type = guid_to_wire(offer.if_type)
    channel.if_instance = guid_to_wire(offer.if_instance)
    channel.offermsg = payload[:196]
    channel.offer_serial = serial
    channel.callback_mode = CallbackMode.BATCHED
    channel.max_pkt_size = 4096
    channel.device_id = hv_get_dev_type(channel.if_type)[0]
    channel.state.store(ChannelState.OFFER_STATE)
    channel.callback_event.init(Tasklets.VMBUS_ON_EVENT, channel.handle)
    return channel


def same_device(tables: KernelTables, channel: Channel) -> Iterator[Channel]:
    """Primaries of the same class and instance (there is at most one)."""
    for other in tables.instances.find(channel.if_instance):
        if other.if_type == channel.if_type and not other.primary_channel:
            yield other


def enter_channel(tables: KernelTables, channel: Channel) -> Entered:
    """Find its device, place its interrupts, link it, publish its relid (`vmbus_process_offer`)."""
    primary = next(same_device(tables, channel), None)
    if primary is not None and channel.sub_channel_index == 0:
        return Entered(None, duplicate=True)
    siblings = [] if primary is None else list(tables.sc_list(primary))
    others = [] if primary is None else [primary.target_cpu.load(), *(one.target_cpu.load() for one in siblings)]
    init_vp_index(tables, channel, perf=hv_get_dev_type(channel.if_type)[1], others=others)
    if primary is None:
        tables.chn_list.append(channel)
        tables.instances.add(channel)
    else:
        channel.primary_channel = primary.handle
        tables.sc_list(primary).append(channel)
    tables.relids.publish(channel)
    return Entered(primary)


def leave_lists(tables: KernelTables, channel: Channel) -> None:
    """Unpublish the relid, then take the channel off its list; its record lives on."""
    if tables.relids.load(channel.relid) == channel.handle:
        tables.relids.unpublish(channel)
    if channel.primary_channel:
        primary = tables.channels.find(channel.primary_channel)
        if primary is not None:
            tables.sc_list(primary).remove(channel)
    else:
        tables.chn_list.remove(channel)
        tables.instances.remove(channel)
