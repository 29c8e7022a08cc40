"""An offer becomes a channel: the record, its place in the lists, its entry in the relid table (reference 3.7).

Everything here runs under channel_mutex but `checked_offer` and `new_channel`, which work on a message and on
a record that nobody knows yet.

    PRIMARY       a device of its own: on chn_list
    SUB_CHANNEL   of a primary that is known by class and instance: on its sc_list
    DUPLICATE     the same primary once more: refused, and as in the kernel its relid is not released
    RELID_TAKEN   another channel has the relid (races.md I4): refused, for a release would be that channel's
"""

from __future__ import annotations

from enum import Enum, auto
from struct import Struct

from emu.errors import ProtocolViolation
from emu.switches import Fix
from emu.values import valueclass
from emu.wire.hypercalls import VMBUS_EVENT_CONNECTION_ID
from emu.wire.messages import HEADER, ChannelFlags, OfferChannel, parse
from emu.wire.versions import VERSION_WS2008
from guestproc.kernel.layout import MAX_CHANNEL_RELIDS, CallbackMode, Channel, ChannelState, KernelTables
from guestproc.kernel.records import Fields
from guestproc.protocol.era import era_of
from guestproc.protocol.numbers import Tasklets
from guestproc.protocol.placement import device_id_of, give_cpu_back, init_vp_index

DEFAULT_MAX_PKT_SIZE = 4096
_WIRE_GUIDS = Struct("<16s16s")
"""Class and instance, at the front of an offer."""
_HVSOCK = int(ChannelFlags.TLNPI_PROVIDER_OFFER)
_INTERRUPT = Fields(Channel, "is_dedicated_interrupt", "low_latency", "monitor_allocated", "monitor_grp", "monitor_bit")
_KIND = Fields(Channel, "device_id", "sub_channel_index")
_OFFER = Fields(Channel, "offer_serial", "if_type", "if_instance", "offermsg")


class Place(Enum):
    """Where a new channel belongs; the last two: nowhere."""

    PRIMARY = auto()
    SUB_CHANNEL = auto()
    DUPLICATE = auto()
    RELID_TAKEN = auto()


@valueclass()
class Entered:
    """Where a new channel belongs; `refusal` says why nowhere, `primary` is that of a sub-channel."""

    place: Place
    refusal: ProtocolViolation | None = None
    primary: Channel | None = None


def handled_inline(fix: Fix) -> bool:
    """Whether the half of an offer that may wait for the host runs inside its work (wrong on purpose).

    Nothing that is queued behind it is handled meanwhile: not a rescind on the same queue, which would end the wait
    (races.md A2), and no offer, of which each is counted and holds up the rescinds on theirs (A3).
    """
    return not (fix.addchan_offload and fix.rescind_own_queue)


def checked_offer(payload: bytes) -> OfferChannel:
    """The offer in a message; ProtocolViolation (`offer-relid`) for relid 0 and those beyond the table.

    The kernel warns about a relid beyond the table and makes a device that no interrupt finds; this one
    ignores the offer, as there is no relid to give back.
    """
    offer = parse(payload)
    assert isinstance(offer, OfferChannel)
    relid = offer.child_relid
    if not 0 < relid < MAX_CHANNEL_RELIDS:
        raise ProtocolViolation(f"offer of relid {relid}", rule="offer-relid", field="child_relid", value=relid)
    return offer


def new_channel(tables: KernelTables, offer: OfferChannel, payload: bytes, serial: int) -> Channel | None:
    """The channel object of an offer, in CHANNEL_OFFER_STATE; None when there is no record for it."""
    channel: Channel | None = tables.channels.alloc()
    if channel is None:
        return None
    channel.relid = offer.child_relid
    # Before 1.1 an offer's last fields mean nothing: one doorbell is everybody's.
    dedicated = tables.connection.vmbus_proto_version != VERSION_WS2008
    channel.sig_event = offer.connection_id if dedicated else VMBUS_EVENT_CONNECTION_ID
    _INTERRUPT.write(
        channel,
        dedicated and offer.is_dedicated_interrupt,
        0,
        offer.monitor_allocated,
        offer.monitorid // 32,
        offer.monitorid % 32,
    )
    if_type, if_instance = _WIRE_GUIDS.unpack_from(payload, HEADER.size)
    _OFFER.write(channel, serial, if_type, if_instance, payload)
    _KIND.write(channel, device_id_of(if_type), offer.sub_channel_index)
    channel.callback_mode = CallbackMode.BATCHED
    channel.max_pkt_size = DEFAULT_MAX_PKT_SIZE
    channel.state.store(ChannelState.OFFER_STATE)
    channel.callback_event.init(Tasklets.VMBUS_ON_EVENT, channel.handle)
    return channel


def is_hvsock_channel(channel: Channel) -> bool:
    """`is_hvsock_channel`: an offer that a socket's connect brought about (chn_flags, at byte 56 of the offer)."""
    flags = int.from_bytes(channel.offermsg[56:58], "little")
    return flags & _HVSOCK != 0


def closes_before_suspend(channel: Channel) -> bool:
    """Whether it counts in nr_chan_close_on_suspend: hv_sock channels and sub-channels do."""
    return is_hvsock_channel(channel) or channel.sub_channel_index != 0


def primary_of(tables: KernelTables, channel: Channel) -> Channel | None:
    """The primary that an offer of this class and instance belongs to, if it is known."""
    for other in tables.instances.find(channel.if_instance):
        if other.if_type == channel.if_type:
            return other
    return None


def choose_place(tables: KernelTables, channel: Channel) -> Entered:
    """Find its device, and who takes its interrupts; era `seed` chooses that later, in the work item."""
    relid = channel.relid
    places = not era_of(tables).percpu_lists
    if tables.relids.load(relid):
        return _refuse(Place.RELID_TAKEN, "offer-relid-taken", f"offer of relid {relid}, which is in use", relid)
    primary = primary_of(tables, channel)
    if primary is None:
        # Also a sub-channel whose primary nobody knows: the kernel does not look at the index of a new GUID.
        if places:
            init_vp_index(tables, channel, others=())
        return Entered(Place.PRIMARY)
    if channel.sub_channel_index:
        if places:
            init_vp_index(tables, channel, others=_target_cpus(tables, primary))
        return Entered(Place.SUB_CHANNEL, primary=primary)
    text = f"offer of relid {relid} for a device that relid {primary.relid} is already"
    return _refuse(Place.DUPLICATE, "offer-duplicate", text, relid)


def publish(tables: KernelTables, channel: Channel, entered: Entered) -> None:
    """Link it where it belongs, then its relid: from here on rescinds and interrupts find it."""
    primary = entered.primary
    if primary is None:
        tables.chn_list.append(channel)
        tables.instances.add(channel)
    else:
        channel.affinity_policy = primary.affinity_policy
        channel.primary_channel = primary.handle
        tables.sc_list(primary).append(channel)
    if closes_before_suspend(channel):
        tables.connection.nr_chan_close_on_suspend.fetch_add(1)
    tables.relids.publish(channel)


def leave_lists(tables: KernelTables, channel: Channel) -> None:
    """Unpublish the relid, take the channel off its list, give its CPU back; its record lives on."""
    tables.relids.unpublish(channel)
    if channel.primary_channel:
        primary = tables.channels.find(channel.primary_channel)
        # A host may take the primary back first; then the list's head is gone, and nobody walks it any more.
        if primary is not None:
            tables.sc_list(primary).remove(channel)
    else:
        tables.chn_list.remove(channel)
        tables.instances.remove(channel)
    give_cpu_back(tables, channel)


def close_done_before_suspend(tables: KernelTables) -> bool:
    """One of the channels that must go before a suspend went; True: it was the last."""
    return tables.connection.nr_chan_close_on_suspend.fetch_sub(1) == 1


def _target_cpus(tables: KernelTables, primary: Channel) -> list[int]:
    return [primary.target_cpu.load(), *(one.target_cpu.load() for one in tables.sc_list(primary))]


def _refuse(place: Place, rule: str, text: str, relid: int) -> Entered:
    return Entered(place, ProtocolViolation(text, rule=rule, field="child_relid", value=relid))
