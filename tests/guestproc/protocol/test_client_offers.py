"""An offer becomes a channel, or is refused; and a channel leaves again."""

from __future__ import annotations

from itertools import product
from uuid import UUID

import pytest

from emu.errors import ProtocolViolation
from emu.wire.device_classes import BY_NAME, ECHO, HV_SOCK, HV_UNKNOWN
from emu.wire.messages import ChannelFlags, OfferChannel
from guestproc.kernel.layout import CallbackMode, Channel, ChannelState, KernelTables
from guestproc.protocol import offers
from guestproc.protocol.offers import Entered, Place

ECHO_DEVICE = UUID(int=1)
OTHER_DEVICE = UUID(int=2)


def offer(
    relid: int, instance: UUID = ECHO_DEVICE, *, index: int = 0, class_name: str = "echo", chn_flags: int = 0
) -> OfferChannel:
    """An offer; its connection id and monitor id show where they end up."""
    return OfferChannel(
        if_type=BY_NAME[class_name].guid,
        if_instance=instance,
        chn_flags=chn_flags,
        sub_channel_index=index,
        child_relid=relid,
        connection_id=0x2000 | relid,
        monitorid=37,
        monitor_allocated=True,
    )


def made(tables: KernelTables, message: OfferChannel) -> Channel:
    """The channel object of an offer."""
    channel = offers.new_channel(tables, message, message.pack(), serial=5)
    assert channel is not None
    return channel


def enter(tables: KernelTables, message: OfferChannel) -> tuple[Channel, Entered]:
    """The channel object, and what became of it."""
    channel = made(tables, message)
    entered = offers.choose_place(tables, channel)
    if entered.refusal is None:
        offers.publish(tables, channel, entered)
    return channel, entered


@pytest.mark.parametrize("relid", [0, 2048, 0xFFFF, 0xFFFFFFFF])
def test_relid_that_cannot_be_is_refused(relid: int) -> None:
    """Relid 0 is the shared flag, and the table ends at 2,047."""
    with pytest.raises(ProtocolViolation) as refusal:
        offers.checked_offer(offer(relid).pack())

    assert (refusal.value.rule, refusal.value.value) == ("offer-relid", relid)


@pytest.mark.parametrize("relid", [1, 2047])
def test_first_and_last_relid_are_good(relid: int) -> None:
    """The ends of the table."""
    assert offers.checked_offer(offer(relid).pack()).child_relid == relid


def test_channel_object_holds_what_the_offer_says(tables: KernelTables) -> None:
    """Every field that the kernel takes over, and the offer itself as it came."""
    message = offer(9, index=2)
    channel = made(tables, message)

    assert (channel.relid, channel.sub_channel_index, channel.offer_serial) == (9, 2, 5)
    assert (channel.sig_event, channel.is_dedicated_interrupt) == (0x2009, 1)
    assert (channel.monitor_allocated, channel.monitor_grp, channel.monitor_bit) == (1, 1, 5)
    assert (channel.if_type, channel.if_instance) == (ECHO.guid.bytes_le, ECHO_DEVICE.bytes_le)
    assert channel.offermsg == message.pack()
    assert (channel.callback_mode, channel.max_pkt_size) == (CallbackMode.BATCHED, 4096)
    assert (channel.state.load(), channel.device_id) == (ChannelState.OFFER_STATE, HV_UNKNOWN)
    assert (channel.callback_event.argument, channel.callback_event.disable_count) == (channel.handle, 0)


def test_primary_goes_to_the_list_and_the_table(tables: KernelTables) -> None:
    """It is found by relid from then on, and by class and instance."""
    channel, entered = enter(tables, offer(9))

    assert entered.place is Place.PRIMARY
    assert tables.relids.lookup(9) == channel
    assert list(tables.chn_list) == [channel]
    assert offers.primary_of(tables, channel) == channel


@pytest.mark.parametrize(
    ("known", "new", "place"),
    [
        (offer(9), offer(10, index=1), Place.SUB_CHANNEL),
        (offer(9), offer(10), Place.DUPLICATE),
        (offer(9), offer(9, OTHER_DEVICE), Place.RELID_TAKEN),
        (offer(9), offer(9, index=1), Place.RELID_TAKEN),
        (offer(9), offer(10, OTHER_DEVICE), Place.PRIMARY),
        (offer(9), offer(10, class_name="nic"), Place.PRIMARY),
        (offer(9), offer(10, OTHER_DEVICE, index=1), Place.PRIMARY),
    ],
    ids=["sub", "again", "relid taken", "sub, relid taken", "another", "same instance, other class", "sub of nobody"],
)
def test_second_offer(tables: KernelTables, known: OfferChannel, new: OfferChannel, place: Place) -> None:
    """Where an offer belongs when another device is known; a refused one leaves no trace in the lists."""
    first, _ = enter(tables, known)
    second, entered = enter(tables, new)

    assert entered.place is place
    refused = place in (Place.DUPLICATE, Place.RELID_TAKEN)
    assert (entered.refusal is not None) == refused
    assert tables.relids.lookup(9) == first
    assert list(tables.sc_list(first)) == ([second] if place is Place.SUB_CHANNEL else [])
    assert list(tables.chn_list) == ([first, second] if place is Place.PRIMARY else [first])
    if refused:
        tables.channels.free(second)
        assert list(tables.relids.published()) == [9]


def test_sub_channel_of_a_sub_channels_instance_belongs_to_the_primary(tables: KernelTables) -> None:
    """All sub-channels hang on the primary, in the order of their offers."""
    primary, _ = enter(tables, offer(9))
    subs = [enter(tables, offer(10 + index, index=index))[0] for index in (3, 1, 2)]

    assert list(tables.sc_list(primary)) == subs
    assert {sub.primary_channel for sub in subs} == {primary.handle}


def test_channels_without_a_record_are_refused(tables: KernelTables) -> None:
    """2,304 records; the next offer is told that there is none."""
    for _ in range(2304):
        assert tables.channels.alloc() is not None

    assert offers.new_channel(tables, offer(9), offer(9).pack(), 0) is None


@pytest.mark.parametrize(("index", "flags"), list(product((0, 1), (0, ChannelFlags.TLNPI_PROVIDER_OFFER))))
def test_what_must_close_before_a_suspend_is_counted(tables: KernelTables, index: int, flags: int) -> None:
    """Sub-channels and hv_sock channels count in nr_chan_close_on_suspend; the last to go is told so."""
    enter(tables, offer(8))
    channel, _ = enter(
        tables, offer(9, index=index, chn_flags=flags) if index else offer(9, OTHER_DEVICE, chn_flags=flags)
    )
    count = tables.connection.nr_chan_close_on_suspend

    assert offers.closes_before_suspend(channel) == bool(index or flags)
    assert count.load() == int(bool(index or flags))
    if count.load():
        assert offers.close_done_before_suspend(tables)
        assert count.load() == 0


def test_hv_sock_channel_is_known_by_its_flag(tables: KernelTables) -> None:
    """Not by its class, which is made of a port number."""
    plain = made(tables, offer(9, class_name="hv_sock"))
    socket = made(tables, offer(9, class_name="hv_sock", chn_flags=int(HV_SOCK.chn_flags)))

    assert not offers.is_hvsock_channel(plain)
    assert offers.is_hvsock_channel(socket)


def test_channel_leaves_what_it_entered(tables: KernelTables) -> None:
    """Relid, list and hash: afterwards the same device may be offered again."""
    primary, _ = enter(tables, offer(9))
    sub, _ = enter(tables, offer(10, index=1))

    offers.leave_lists(tables, sub)
    assert tables.sc_list(primary).empty
    offers.leave_lists(tables, primary)

    assert tables.relids.published() == {}
    assert tables.chn_list.empty
    assert enter(tables, offer(9))[1].place is Place.PRIMARY


def test_sub_channel_leaves_after_its_primary(tables: KernelTables) -> None:
    """A host may take the primary back first: the sub-channels still leave, one by one."""
    primary, _ = enter(tables, offer(9))
    subs = [enter(tables, offer(10 + index, index=index))[0] for index in (1, 2)]
    offers.leave_lists(tables, primary)
    tables.channels.free(primary)

    for sub in subs:
        offers.leave_lists(tables, sub)
        tables.channels.free(sub)

    assert tables.relids.published() == {}
    assert tables.damage() == []
