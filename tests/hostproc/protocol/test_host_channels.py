"""The life of a channel on the host: offers and their numbers, open, close, retarget, reoffer, sockets."""

from __future__ import annotations

from uuid import UUID

import pytest

from emu.wire.messages import (
    STATUS_CONNECTION_REFUSED,
    STATUS_UNSUCCESSFUL,
    VP_INDEX_DISABLE_INTERRUPT,
    AllOffersDelivered,
    ChannelFlags,
    CloseChannel,
    CloseReservedChannel,
    GpadlCreated,
    GpadlTeardown,
    GpadlTorndown,
    Message,
    MessageType,
    ModifyChannel,
    ModifyChannelResponse,
    OfferChannel,
    OpenChannelResult,
    OpenReservedChannel,
    RequestOffers,
    RescindChannelOffer,
    TlConnectRequest,
    TlConnectResult,
    Unload,
    UnloadResponse,
    gpadl_messages,
)
from emu.wire.versions import (
    KNOWN_VERSIONS,
    VERSION_COPPER,
    VERSION_WIN10,
    VERSION_WIN10_V4_1,
    VERSION_WIN10_V5_1,
    VERSION_WIN10_V5_2,
    version_text,
)
from hostproc.protocol.effects import (
    BindEvent,
    CloseDevice,
    CloseDoorbell,
    ConnectSocket,
    DropDevice,
    MapGpadl,
    OpenDevice,
    OpenDoorbell,
    Refused,
    RetargetEvent,
    SendMessage,
    UnbindEvent,
    UnmapGpadl,
)
from hostproc.protocol.policy import DEFAULT_POLICY, Answer
from hostproc.protocol.states import ChannelState
from hostproc.protocol.versions import Limits
from tests.hostproc.protocol.fake_partition import (
    CLASS,
    RAM_BYTES,
    RING,
    World,
    instance,
    open_channel,
    parameters,
)


def relids(messages: list[Message]) -> list[int]:
    """Return the relids of the offers among these messages."""
    return [message.child_relid for message in messages if isinstance(message, OfferChannel)]


@pytest.mark.parametrize("version", KNOWN_VERSIONS, ids=version_text)
def test_life_of_a_channel(version: int) -> None:
    """Offer, GPADL, open, close, teardown, revoke, release: in each version the same story."""
    world = World(limits=Limits(vp_count=4, ram_bytes=RAM_BYTES, max_version=VERSION_COPPER))
    (key,) = world.boot(version=version)

    world.lend()
    assert world.sent() == [GpadlCreated(1, RING, 0)]
    world.post(open_channel())
    assert world.sent() == [OpenChannelResult(1, 1, 0)]
    world.post(CloseChannel(1))
    assert world.sent() == []
    world.post(GpadlTeardown(1, RING))
    assert world.sent() == [GpadlTorndown(RING)]
    world.revoke(key)
    assert world.sent() == [RescindChannelOffer(1)]
    world.release()

    assert world.server.channels() == []
    assert world.refused() == []


def test_offers_are_sorted_and_numbered() -> None:
    """By class, then order (unordered last), then instance; relids from 1, connections relid | 0x2000."""
    world = World()
    early, late = UUID(int=1), UUID(int=2)
    world.offer(3, if_type=late)
    world.offer(2, if_type=early)
    world.offer(1, if_type=early)
    world.offer(9, if_type=early, order=1)
    world.offer(8, if_type=early, order=0)
    world.connect()

    offers = world.request_offers()

    assert [offer.if_instance for offer in offers] == [instance(n) for n in (8, 9, 1, 2, 3)]
    assert [offer.child_relid for offer in offers] == [1, 2, 3, 4, 5]
    assert [offer.connection_id for offer in offers] == [0x2001, 0x2002, 0x2003, 0x2004, 0x2005]


def test_all_offers_delivered_comes_once_and_last() -> None:
    """What there is, then ALLOFFERS_DELIVERED; what comes later comes without another."""
    world = World()
    world.offer(0)
    world.connect()

    world.post(RequestOffers())
    assert [message.TYPE for message in world.sent()] == [
        MessageType.OFFERCHANNEL,
        MessageType.ALLOFFERS_DELIVERED,
    ]
    world.offer(1)

    assert [message.TYPE for message in world.sent()] == [MessageType.OFFERCHANNEL]


def test_offers_before_connect_between_and_after() -> None:
    """A device is offered when the guest has asked, whenever it came."""
    world = World()
    world.offer(0)
    world.connect()
    world.offer(1)
    assert world.sent() == []

    assert relids(list(world.request_offers())) == [1, 2]
    world.offer(2)

    assert relids(world.sent()) == [3]


def test_a_second_request_for_offers_is_refused() -> None:
    """One REQUESTOFFERS a connection; the second has no answer."""
    world = World()
    world.boot(2)

    world.post(RequestOffers())

    assert world.refused() == ["offers-requested-twice"]
    assert world.sent() == []


def test_no_device_still_ends_with_all_offers_delivered() -> None:
    """An empty bus says so."""
    world = World()
    world.connect()

    world.post(RequestOffers())

    assert world.sent() == [AllOffersDelivered()]


def test_the_offer_carries_what_the_device_is() -> None:
    """Every field of a pipe offer reaches the guest."""
    world = World()
    flags = int(ChannelFlags.NAMED_PIPE_MODE | ChannelFlags.ENUMERATE_DEVICE_INTERFACE)
    user_def = bytes([4, 0, 0, 0]) + b"pipe data".ljust(112, b"\0") + bytes([1, 0, 0, 0])
    world.offer(chn_flags=flags, user_def=user_def, mmio_megabytes=8, mmio_megabytes_optional=9)
    world.connect()

    assert world.request_offers() == [
        OfferChannel(
            if_type=CLASS,
            if_instance=instance(0),
            chn_flags=flags,
            mmio_megabytes=8,
            user_def=user_def,
            mmio_megabytes_optional=9,
            child_relid=1,
            connection_id=0x2001,
        )
    ]


def test_the_lowest_free_relid_is_given() -> None:
    """A number that came back is the next to go, before any that was never used."""
    world = World()
    world.boot(5)

    world.release(4)
    world.release(2)
    for number in (10, 11, 12):
        world.offer(number)

    assert relids(world.sent()) == [2, 4, 6]


def test_more_offers_than_relids() -> None:
    """2,047 channels are offered; the rest stay with the host until a guest finds numbers free."""
    world = World()
    keys = [world.offer(number) for number in range(2049)]
    world.connect()

    world.post(RequestOffers())
    assert world.refused() == ["offer-without-relid"] * 2
    messages = world.sent()
    assert relids(messages) == list(range(1, 2048)) and messages[-1] == AllOffersDelivered()
    for key in keys[:2]:
        world.revoke(key)
    world.connect()

    assert len(world.request_offers()) == 2047
    assert world.refused() == []


def test_a_released_channel_waits_for_the_next_connection() -> None:
    """A guest that lets go of a device does not get it again until it asks for offers once more."""
    world = World()
    world.boot()

    world.release()
    assert world.sent() == []
    world.connect()

    assert relids(list(world.request_offers())) == [1]


def test_generations_count_the_offers_of_a_relid() -> None:
    """(relid, generation) names one life of a number."""
    world = World()
    (key,) = world.boot()
    assert world.server.channels()[0].generation == 1

    world.revoke(key)
    world.release()
    world.offer(1)

    assert [(row.relid, row.generation) for row in world.server.channels()] == [(1, 2)]


def test_what_changed_is_reported_once_by_relid() -> None:
    """The mirror is told what is new, and which numbers are free again."""
    world = World()
    (key,) = world.boot()
    assert {relid: row and row.state for relid, row in world.server.take_changed().items()} == {1: 1}
    assert world.server.take_changed() == {}

    world.open(target_vp=2)
    row = world.server.take_changed()[1]
    world.revoke(key)
    world.release()

    assert row is not None
    assert (row.state, row.ring_gpadl, row.target_vp, row.connection_id) == (3, RING, 2, 0x2001)
    assert world.server.take_changed() == {1: None}


# -- open and close ------------------------------------------------------------------------------------


def test_open_binds_the_interrupt_before_the_device_sees_it() -> None:
    """Event, doorbell, device, and only then the result."""
    world = World()
    world.boot()
    world.lend()
    world.forget()

    world.post(open_channel(target_vp=3, openid=77, userdata=b"hello".ljust(120, b"\0")))

    assert world.effects == [
        BindEvent(100, 1, 3, 2, 1, False),
        OpenDoorbell(100, 0x2001),
        OpenDevice(100, 1, 0, RING, 8, 4, 3, 1, b"hello".ljust(120, b"\0")),
        SendMessage(OpenChannelResult(1, 77, 0), 0, 2),
    ]


def test_a_polling_guest_gets_no_event() -> None:
    """target_vp 0xFFFFFFFF: the guest wants no interrupts."""
    world = World()
    world.boot()

    world.open(target_vp=VP_INDEX_DISABLE_INTERRUPT)

    assert world.happened(BindEvent) == []
    assert world.sent()[-1] == OpenChannelResult(1, 1, 0)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"ringbuffer_gpadlhandle": RING + 1}, "open-unknown-gpadl"),
        ({"downstream_ringbuffer_pageoffset": 0}, "open-ring-offset"),
        ({"downstream_ringbuffer_pageoffset": 1}, "open-ring-offset"),
        ({"downstream_ringbuffer_pageoffset": 7}, "open-ring-offset"),
        ({"downstream_ringbuffer_pageoffset": 8}, "open-ring-offset"),
        ({"downstream_ringbuffer_pageoffset": 0xFFFFFFFF}, "open-ring-offset"),
        ({"target_vp": 4}, "open-target-vp"),
        ({"target_vp": 0xFFFFFFFE}, "open-target-vp"),
    ],
)
def test_an_open_that_cannot_be_is_answered(changes: dict[str, int], rule: str) -> None:
    """A wrong number gets a result with a status, and the channel can be opened afterwards."""
    world = World()
    world.boot()
    world.lend()
    world.forget()
    gpadl = changes.pop("ringbuffer_gpadlhandle", RING)

    world.post(open_channel(gpadl=gpadl, **changes))
    assert world.refused() == [rule]
    assert world.effects == [SendMessage(OpenChannelResult(1, 1, STATUS_UNSUCCESSFUL), 0, 2)]
    world.forget()
    world.post(open_channel())

    assert world.sent() == [OpenChannelResult(1, 1, 0)]


def test_a_ring_is_one_range_of_whole_pages() -> None:
    """A GPADL that begins inside a page, or ends there, is a buffer and no ring."""
    world = World()
    world.boot()
    world.post(*gpadl_messages(1, 1, range(8), byte_offset=8))
    world.post(*gpadl_messages(1, 2, range(8), byte_count=8 * 4096 - 8))
    world.forget()

    world.post(open_channel(gpadl=1), open_channel(gpadl=2))

    assert world.refused() == ["open-ring-shape"] * 2


def test_another_channels_gpadl_is_no_ring() -> None:
    """Handles belong to a channel."""
    world = World()
    world.boot(2)
    world.lend(relid=1)
    world.forget()

    world.post(open_channel(relid=2))

    assert world.refused() == ["open-unknown-gpadl"]


def test_a_device_that_refuses_is_told_to_the_guest() -> None:
    """The device's status reaches the guest, its signals are unbound, and it may try again."""
    world = World(quick=False)
    world.boot()
    world.lend()
    world.answer(MapGpadl)
    world.post(open_channel())
    world.forget()

    world.answer(OpenDevice, yes=False)
    assert world.effects == [
        UnbindEvent(100),
        CloseDoorbell(100, 0x2001),
        SendMessage(OpenChannelResult(1, 1, 0xC000_0001), 0, 2),
    ]
    world.post(open_channel())
    world.answer(OpenDevice)

    assert world.sent()[-1] == OpenChannelResult(1, 1, 0)


@pytest.mark.parametrize("opened", [False, True])
def test_opening_twice_has_no_answer(opened: bool) -> None:
    """A second OPENCHANNEL is the guest's error, and the first goes on."""
    world = World(quick=False)
    world.boot()
    world.lend()
    world.answer(MapGpadl)
    world.post(open_channel())
    if opened:
        world.answer(OpenDevice)
    world.forget()

    world.post(open_channel())

    assert world.refused() == ["open-requested-while-open" + ("" if opened else "ing")]
    assert world.sent() == []


def test_close_has_no_reply_and_is_refused_when_not_open() -> None:
    """CLOSECHANNEL stops device and signals; a second one finds the channel closed."""
    world = World()
    world.boot()
    world.open()
    world.forget()

    world.post(CloseChannel(1))
    assert world.effects == [UnbindEvent(100), CloseDoorbell(100, 0x2001), CloseDevice(100)]
    world.post(CloseChannel(1))

    assert world.refused() == ["close-requested-while-closed"]


def test_close_and_reopen_at_once() -> None:
    """OPEN while the device still closes waits for it, also with the same ring and no teardown between."""
    world = World(quick=False)
    world.boot()
    world.lend()
    world.answer(MapGpadl)
    world.post(open_channel())
    world.answer(OpenDevice)

    world.post(CloseChannel(1), open_channel(openid=5))
    assert world.states() == {1: "CLOSING_REOPEN"}
    world.answer(CloseDevice)
    assert world.states() == {1: "OPENING"}
    world.answer(OpenDevice)

    assert world.sent()[-1] == OpenChannelResult(1, 5, 0)


def test_reopen_with_a_new_ring_while_the_old_one_is_torn_down() -> None:
    """The canonical hurry: CLOSE, TEARDOWN, GPADL, OPEN, all before the device has closed."""
    world = World(quick=False)
    world.boot()
    world.lend()
    world.answer(MapGpadl)
    world.post(open_channel())
    world.answer(OpenDevice)
    world.forget()

    world.post(CloseChannel(1), GpadlTeardown(1, RING))
    assert world.happened(UnmapGpadl) == [] and world.sent() == []
    world.lend(gpadl=RING + 1)
    world.answer(MapGpadl)
    world.post(open_channel(gpadl=RING + 1, openid=6))
    world.answer(CloseDevice)
    world.answer(UnmapGpadl)
    world.answer(OpenDevice)

    assert world.refused() == []
    assert world.sent() == [
        GpadlCreated(1, RING + 1, 0),
        GpadlTorndown(RING),
        OpenChannelResult(1, 6, 0),
    ]


def test_reopen_of_a_ring_that_was_torn_down_meanwhile_fails() -> None:
    """The ring is judged when it would be used, not when it was named."""
    world = World(quick=False)
    world.boot()
    world.lend()
    world.answer(MapGpadl)
    world.post(open_channel())
    world.answer(OpenDevice)
    world.post(CloseChannel(1), open_channel(), GpadlTeardown(1, RING))
    world.forget()

    world.answer(CloseDevice)
    world.answer(UnmapGpadl)

    assert world.refused() == ["open-unknown-gpadl"]
    assert world.sent() == [OpenChannelResult(1, 1, STATUS_UNSUCCESSFUL), GpadlTorndown(RING)]
    assert world.states() == {1: "CLOSED"}


def test_release_while_closing() -> None:
    """The relid is free at once, TORNDOWN is owed to nobody, and the device is offered to the next guest."""
    world = World(quick=False)
    world.boot()
    world.lend()
    world.answer(MapGpadl)
    world.post(open_channel())
    world.answer(OpenDevice)
    world.post(CloseChannel(1))
    world.forget()

    world.release()
    assert world.counted() == {"CLOSING_CLIENT_RELEASE": 1}
    world.answer(CloseDevice)
    world.answer(UnmapGpadl)

    assert world.counted() == {"CLIENT_RELEASED": 1}
    assert world.sent() == []


@pytest.mark.parametrize("state", ["opening", "open"])
def test_release_of_a_channel_in_use_is_refused(state: str) -> None:
    """RELID_RELEASED does not close a channel."""
    world = World(quick=False)
    world.boot()
    world.lend()
    world.answer(MapGpadl)
    world.post(open_channel())
    if state == "open":
        world.answer(OpenDevice)
    world.forget()

    world.release()

    assert world.refused() == [f"relid-released-while-{state}"]
    assert world.states() == {1: state.upper()}


@pytest.mark.parametrize("relid", [0, 2, 2047, 2048, 0xFFFFFFFF])
def test_unknown_relids_are_refused(relid: int) -> None:
    """Every message that names a channel is checked against the channels offered."""
    world = World()
    world.boot()

    world.post(open_channel(relid), CloseChannel(relid), ModifyChannel(relid, 0), GpadlTeardown(relid, RING))
    world.lend(relid)
    world.release(relid)

    assert world.refused() == [
        "open-unknown-relid",
        "close-unknown-relid",
        "modify-unknown-relid",
        "gpadl-teardown-unknown-relid",
        "gpadl-unknown-relid",
        "release-unknown-relid",
    ]
    assert world.sent() == [
        ModifyChannelResponse(relid, STATUS_UNSUCCESSFUL),
        GpadlCreated(relid, RING, STATUS_UNSUCCESSFUL),
    ]


# -- retarget ------------------------------------------------------------------------------------------


def test_the_event_moves_before_the_response() -> None:
    """After the response no interrupt comes to the old VP."""
    world = World(quick=False)
    world.boot()
    world.lend()
    world.answer(MapGpadl)
    world.post(open_channel())
    world.answer(OpenDevice)
    world.forget()

    world.post(ModifyChannel(1, 2))
    assert world.effects == [RetargetEvent(100, 1, 2)]
    world.answer(RetargetEvent)

    assert world.sent() == [ModifyChannelResponse(1, 0)]


@pytest.mark.parametrize("target_vp", [4, VP_INDEX_DISABLE_INTERRUPT])
def test_retarget_to_nowhere_fails(target_vp: int) -> None:
    """A VP that is not there, and "no interrupts", are no targets for an open channel."""
    world = World()
    world.boot()
    world.open()
    world.forget()

    world.post(ModifyChannel(1, target_vp))

    assert world.refused() == ["modify-target-vp"]
    assert world.sent() == [ModifyChannelResponse(1, STATUS_UNSUCCESSFUL)]


def test_retarget_of_a_polling_channel_fails() -> None:
    """A channel that was opened without interrupts has none to move."""
    world = World()
    world.boot()
    world.open(target_vp=VP_INDEX_DISABLE_INTERRUPT)
    world.forget()

    world.post(ModifyChannel(1, 0))

    assert world.refused() == ["modify-without-interrupts"]
    assert world.sent() == [ModifyChannelResponse(1, STATUS_UNSUCCESSFUL)]


def test_second_retarget_before_the_first_is_answered() -> None:
    """From 5.3 on it is the guest's error; before, when there are no answers, the last wish counts."""
    world = World(quick=False)
    world.boot()
    old = World(quick=False)
    old.boot(version=VERSION_WIN10_V4_1)
    for each in (world, old):
        each.lend()
        each.answer(MapGpadl)
        each.post(open_channel())
        each.answer(OpenDevice)
        each.forget()
        each.post(ModifyChannel(1, 1), ModifyChannel(1, 2), ModifyChannel(1, 3))

    assert world.refused() == ["modify-in-progress"] * 2
    world.answer(RetargetEvent)
    assert world.sent() == [ModifyChannelResponse(1, 0)]
    assert old.refused() == []
    old.answer(RetargetEvent)
    old.answer(RetargetEvent)
    assert old.happened(RetargetEvent) == [RetargetEvent(100, 1, 1), RetargetEvent(100, 1, 3)]
    assert old.server.channels()[0].target_vp == 3


def test_a_retarget_under_way_is_answered_before_close_and_rescind() -> None:
    """A request that was accepted gets its one answer, whatever comes between."""
    for ending in ("close", "revoke"):
        world = World(quick=False)
        (key,) = world.boot()
        world.lend()
        world.answer(MapGpadl)
        world.post(open_channel())
        world.answer(OpenDevice)
        world.post(ModifyChannel(1, 1))
        world.forget()

        if ending == "close":
            world.post(CloseChannel(1))
        else:
            world.revoke(key)

        assert world.sent()[0] == ModifyChannelResponse(1, STATUS_UNSUCCESSFUL)


def test_a_late_retarget_answer_is_counted() -> None:
    """An answer that nobody waits for changes nothing."""
    world = World()
    (key,) = world.boot()
    world.open()
    world.forget()

    world.take(world.server.event_retargeted(key))

    assert world.refused() == ["late-retarget-answer"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (Answer.SILENT, []),
        (Answer.REFUSE, [ModifyChannelResponse(1, STATUS_UNSUCCESSFUL)]),
        (Answer.ACCEPT, [ModifyChannelResponse(1, 0)]),
    ],
)
def test_retarget_of_a_closed_channel_is_a_matter_of_policy(answer: Answer, expected: list[Message]) -> None:
    """Hosts differ; the default is silence."""
    policy = {**DEFAULT_POLICY, (MessageType.MODIFYCHANNEL, ChannelState.CLOSED): answer}
    world = World(policy=policy)
    world.boot()

    world.post(ModifyChannel(1, 0))

    assert world.refused() == ["modify-of-closed-channel"]
    assert world.sent() == expected


# -- revoke and come back ------------------------------------------------------------------------------


def test_a_device_that_comes_back_waits_for_the_release() -> None:
    """Offered again while the guest holds the relid: the same number, as soon as it is let go of."""
    world = World()
    (key,) = world.boot()
    world.open()
    world.revoke(key)
    world.forget()

    again = world.offer(chn_flags=1)
    assert world.states() == {1: "REOFFERED"} and world.sent() == []
    world.release()
    (offer,) = world.sent()
    world.open()

    assert isinstance(offer, OfferChannel) and (offer.child_relid, offer.chn_flags) == (1, 1)
    assert world.states() == {1: "OPEN"}
    assert world.server.has_device(again) and not world.server.has_device(key)


def test_a_device_that_comes_back_and_goes_again_is_not_rescinded_twice() -> None:
    """The guest still owes the answer to the first RESCIND."""
    world = World()
    (key,) = world.boot()
    world.revoke(key)
    world.forget()

    again = world.offer()
    world.revoke(again)
    assert world.happened(DropDevice) == [DropDevice(again)]
    world.release()

    assert world.sent() == []
    assert world.server.channels() == []


def test_a_device_that_comes_back_after_a_disconnect_is_offered_anew() -> None:
    """REOFFERED and then nobody there: an ordinary device for the next guest."""
    world = World()
    (key,) = world.boot()
    world.revoke(key)
    world.offer()

    world.post(Unload())
    assert world.counted() == {"CLIENT_RELEASED": 1}
    world.connect()

    assert relids(list(world.request_offers())) == [1]


def test_the_same_device_twice_is_refused() -> None:
    """Two devices cannot be the same channel."""
    world = World()
    world.boot()
    assert world.server.offered(parameters().identity)

    world.take(world.server.offer(7, parameters()))

    assert world.refused() == ["offered-again-while-closed"]
    assert not world.server.has_device(7)


def test_a_late_answer_of_a_device_names_nobody() -> None:
    """A device that was revoked while it opened may still say that it is open."""
    world = World(quick=False)
    (key,) = world.boot()
    world.lend()
    world.answer(MapGpadl)
    world.post(open_channel())
    world.revoke(key)
    world.offer()
    world.forget()

    for effects in (
        world.server.device_opened(key),
        world.server.device_refused(key),
        world.server.device_closed(key),
        world.server.gpadl_accepted(key, RING),
        world.server.revoke(key),
    ):
        world.take(effects)

    assert world.refused() == ["late-device-answer"] * 5
    assert world.states() == {1: "REOFFERED"}


# -- sub-channels --------------------------------------------------------------------------------------


def test_subchannels_are_revoked_before_their_primary() -> None:
    """Each channel of a device that goes is rescinded, the primary last."""
    world = World()
    key = world.offer()
    world.offer(sub_channel_index=2)
    world.offer(sub_channel_index=1)
    world.connect()
    world.request_offers()

    world.revoke(key)

    assert world.sent() == [RescindChannelOffer(3), RescindChannelOffer(2), RescindChannelOffer(1)]


def test_subchannels_go_when_their_primary_closes() -> None:
    """The next open has to ask for them again; other devices keep theirs."""
    world = World()
    world.boot(2)
    sub = world.offer(0, sub_channel_index=1)
    other = world.offer(1, sub_channel_index=1)
    world.open(1)
    world.open(3, gpadl=RING + 1)
    world.forget()

    world.post(CloseChannel(1))

    assert world.sent() == [RescindChannelOffer(3)]
    assert not world.server.has_device(sub) and world.server.has_device(other)


def test_closing_a_subchannel_leaves_the_others() -> None:
    """Only a primary takes others with it."""
    world = World()
    world.boot()
    world.offer(sub_channel_index=1)
    world.offer(sub_channel_index=2)
    world.open(1)
    world.open(2, gpadl=RING + 1)
    world.forget()

    world.post(CloseChannel(2))

    assert world.sent() == []
    assert world.states() == {1: "OPEN", 2: "CLOSED", 3: "CLOSED"}


def test_subchannels_do_not_survive_a_disconnect() -> None:
    """The next guest has not asked for them."""
    world = World(quick=False)
    world.boot()
    sub = world.offer(sub_channel_index=1)
    world.lend(2)
    world.answer(MapGpadl)
    world.post(open_channel(2))
    world.answer(OpenDevice)
    world.forget()

    world.post(Unload())

    assert world.happened(DropDevice) == [DropDevice(sub)]
    assert world.sent() == [UnloadResponse()]
    assert world.counted() == {"CLIENT_RELEASED": 1}


# -- sockets -------------------------------------------------------------------------------------------

ENDPOINT, SERVICE, SILO = UUID(int=1), UUID(int=2), UUID(int=3)


@pytest.mark.parametrize("silo", [None, SILO])
def test_a_socket_that_is_accepted_gets_a_channel(silo: UUID | None) -> None:
    """Both message sizes; the offer is the answer."""
    world = World()
    world.connect()
    world.request_offers()

    world.post(TlConnectRequest(ENDPOINT, SERVICE, silo))
    assert world.effects == [ConnectSocket(ENDPOINT, SERVICE, silo)]
    world.offer(if_type=SERVICE, if_instance=ENDPOINT, chn_flags=0x2011)
    (offer,) = world.sent()
    world.take(world.server.connect_refused(ENDPOINT, SERVICE))

    assert isinstance(offer, OfferChannel) and offer.chn_flags == 0x2011
    assert world.sent() == []


def test_the_silo_counts_from_5_2() -> None:
    """Older versions have padding there."""
    for version, expected in ((VERSION_WIN10_V5_1, None), (VERSION_WIN10_V5_2, SILO)):
        world = World()
        world.connect(version)
        world.post(TlConnectRequest(ENDPOINT, SERVICE, SILO))

        assert world.effects == [ConnectSocket(ENDPOINT, SERVICE, expected)]


@pytest.mark.parametrize(("version", "told"), [(VERSION_WIN10, False), (VERSION_WIN10_V4_1, True)])
def test_a_socket_that_is_refused_is_told_from_4_1(version: int, told: bool) -> None:
    """Before, a guest's connect ends by its own time-out. Either way it is counted, as a legal request, with why."""
    world = World()
    world.connect(version)
    world.post(TlConnectRequest(ENDPOINT, SERVICE))
    world.forget()

    world.take(world.server.connect_refused(ENDPOINT, SERVICE))

    expected = [TlConnectResult(ENDPOINT, SERVICE, STATUS_CONNECTION_REFUSED)] if told else []
    (ignored,) = [effect for effect in world.effects if isinstance(effect, Refused)]
    assert (ignored.rule, ignored.field, ignored.value) == ("socket-service", "host_service_id", str(SERVICE))
    assert ignored.legal and world.refused() == ["socket-service"]
    assert world.sent() == expected


def test_sixteen_sockets_wait_and_no_more() -> None:
    """The seventeenth is refused, one that waits is not taken twice, and a disconnect forgets them all."""
    world = World()
    world.connect()

    for number in (*range(16), 0, 16):
        world.post(TlConnectRequest(UUID(int=number), SERVICE))
    assert world.refused() == ["socket-request-twice", "socket-requests"]
    assert world.sent() == [TlConnectResult(UUID(int=16), SERVICE, STATUS_CONNECTION_REFUSED)]
    world.connect()
    world.post(TlConnectRequest(UUID(int=16), SERVICE))

    assert world.happened(ConnectSocket) != []


def test_a_sockets_channel_ends_with_the_connection() -> None:
    """It was made for this guest."""
    world = World()
    world.connect()
    world.request_offers()
    key = world.offer(if_type=SERVICE, if_instance=ENDPOINT, chn_flags=0x2011)

    world.post(Unload())

    assert not world.server.has_device(key) and world.server.channels() == []


def test_no_channel_is_a_reserved_one() -> None:
    """Reserved channels are firmware's; none is offered, so both messages are refused."""
    world = World()
    world.boot()

    world.post(OpenReservedChannel(1, 0, 2, RING, 4), CloseReservedChannel(1, 0, 2))

    assert world.refused() == ["channel-not-reserved"] * 2
    assert world.sent() == []
