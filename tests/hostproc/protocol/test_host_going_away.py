"""Going away: unload, reset, revoke at every moment, and what is still answered afterwards."""

from __future__ import annotations

import pytest

from emu.wire.messages import (
    STATUS_UNSUCCESSFUL,
    CloseChannel,
    GpadlCreated,
    GpadlTeardown,
    GpadlTorndown,
    InitiateContact,
    Message,
    MessageType,
    ModifyChannel,
    OpenChannelResult,
    RelidReleased,
    RequestOffers,
    RescindChannelOffer,
    Unload,
    UnloadResponse,
    gpadl_messages,
)
from emu.wire.versions import VERSION_WIN10_V5_3
from hostproc.protocol.effects import (
    CloseDevice,
    CloseDoorbell,
    Disconnected,
    DropDevice,
    MapGpadl,
    OpenDevice,
    Refused,
    SendMessage,
    UnbindEvent,
    UnmapGpadl,
)
from hostproc.protocol.policy import DEFAULT_POLICY, Answer
from hostproc.protocol.session import Link
from hostproc.protocol.states import REVOKED_STATES
from tests.hostproc.protocol.fake_partition import RING, World, open_channel

FAILED = STATUS_UNSUCCESSFUL


def opened(*, quick: bool = False) -> tuple[World, int]:
    """Return a world with one open channel, and its device's key."""
    world = World()
    (key,) = world.boot()
    world.open()
    world.forget()
    world.quick = quick
    return world, key


# -- unload --------------------------------------------------------------------------------------------


def test_unload_with_no_channel() -> None:
    """A guest that has nothing open is answered at once."""
    world = World()
    world.connect()

    world.post(Unload())

    assert world.effects == [Disconnected(), SendMessage(UnloadResponse(), 0, 2)]


def test_unload_with_open_channels_is_answered_when_they_have_closed() -> None:
    """First the devices, then their GPADLs, only then UNLOAD_RESPONSE."""
    world, key = opened()

    world.post(Unload())
    assert world.effects == [UnbindEvent(key), CloseDoorbell(key, 0x2001), CloseDevice(key)]
    world.answer(CloseDevice)
    assert world.server.link is Link.DISCONNECTING
    world.answer(UnmapGpadl)

    assert world.effects[-2:] == [Disconnected(), SendMessage(UnloadResponse(), 0, 2)]
    assert world.server.summary().version == 0


def test_unload_response_goes_to_the_connections_vp() -> None:
    """The VP that the guest named at first contact."""
    world = World()
    world.connect(target_vcpu=2)

    world.post(Unload())

    assert world.effects[-1] == SendMessage(UnloadResponse(), 2, 2)


def test_unload_while_a_device_decides() -> None:
    """GPADLs that a device decides about, and opens under way, are waited for; the guest hears of neither."""
    world = World(quick=False)
    world.boot(2)
    world.lend(1)
    world.answer(MapGpadl)
    world.post(open_channel(1))
    world.lend(2)
    world.forget()

    world.post(Unload())
    world.answer(OpenDevice)
    world.answer(MapGpadl)
    for kind in (CloseDevice, UnmapGpadl):
        assert world.server.link is Link.DISCONNECTING
        world.answer(kind)
    world.answer(UnmapGpadl)

    assert world.sent() == [UnloadResponse()]


def test_a_second_unload_is_silent() -> None:
    """The host answers the first; afterwards nobody is connected."""
    world, _key = opened()

    world.post(Unload(), Unload())
    world.quick = True
    while world.waiting:
        world.answer(type(world.waiting[0]))
    world.post(Unload())

    assert world.refused() == ["not-connected"] * 2
    assert world.sent() == [UnloadResponse()]


def test_relids_may_be_released_after_unload() -> None:
    """Linux lets go of every relid by name after UNLOAD_RESPONSE: accepted, ignored, and no violation."""
    world = World()
    world.boot(3)
    world.post(Unload())
    world.forget()

    world.post(*[RelidReleased(relid) for relid in (1, 2, 3)])

    assert world.happened(Refused) == [
        Refused(
            "released-while-disconnected",
            f"RELID_RELEASED for {relid} while nobody is connected",
            "child_relid",
            relid,
            legal=True,
        )
        for relid in (1, 2, 3)
    ]
    assert world.sent() == []


def test_everything_else_after_unload_is_silent_and_refused() -> None:
    """No message of the last connection is answered."""
    world = World()
    world.boot()
    world.post(Unload())
    world.forget()

    world.lend()
    world.post(open_channel(), CloseChannel(1), GpadlTeardown(1, RING), ModifyChannel(1, 0), RequestOffers())

    assert world.refused() == ["not-connected"] * 6
    assert world.sent() == []


def test_a_new_guest_finds_everything_afresh() -> None:
    """Numbers start again, offers come again, and what the last guest left half done is gone."""
    world = World()
    world.boot(3)
    world.release(1)
    world.post(gpadl_messages(2, RING, range(40))[0])
    world.open(3, gpadl=RING + 1)
    world.post(Unload())

    world.connect()

    assert [offer.child_relid for offer in world.request_offers()] == [1, 2, 3]
    assert world.server.summary().gpadls == 0
    world.post(gpadl_messages(2, RING, range(40))[0], *gpadl_messages(1, RING + 1, range(8)))
    assert world.sent() == [GpadlCreated(1, RING + 1, 0)]


def test_reset_disconnects_without_a_word() -> None:
    """A guest that died is not answered; its devices close and the next one may connect."""
    world, _key = opened(quick=True)

    world.take(world.server.reset())
    assert world.sent() == []
    world.take(world.server.reset())
    assert world.effects == []
    world.connect()

    assert len(world.request_offers()) == 1


@pytest.mark.parametrize(
    ("last_words", "connection_id"),
    [(Unload(), 1), (InitiateContact(vmbus_version_requested=VERSION_WIN10_V5_3, msg_sint=2), 4)],
    ids=["unload", "contact"],
)
def test_reset_forgets_what_waits(last_words: Message, connection_id: int) -> None:
    """Nobody is left to be answered: an unload, and a contact that waited for devices, died with their guest."""
    world, _key = opened()
    world.post(last_words, connection_id=connection_id)
    assert world.waiting

    world.take(world.server.reset())
    world.quick = True
    while world.waiting:
        world.answer(type(world.waiting[0]))

    assert world.sent() == []
    assert world.server.link is Link.DISCONNECTED


def test_hot_adds_and_removes_while_disconnecting() -> None:
    """Devices come and go whatever the guest does."""
    world, key = opened()
    world.post(Unload())

    added = world.offer(5)
    world.revoke(key)

    assert world.sent() == [UnloadResponse()]
    assert world.server.has_device(added)
    assert world.counted() == {"CLIENT_RELEASED": 1}


# -- revoke --------------------------------------------------------------------------------------------


def test_revoke_of_an_open_channel() -> None:
    """The device is stopped before the guest is told: a guest that has seen RESCIND re-uses the pages."""
    world, key = opened()

    world.revoke(key)

    assert world.effects == [
        UnbindEvent(key),
        CloseDoorbell(key, 0x2001),
        DropDevice(key),
        SendMessage(RescindChannelOffer(1), 0, 2),
    ]


def test_rescind_crosses_open() -> None:
    """OPENCHANNEL that crossed our RESCIND is never answered: the guest's own rescind wakes the waiter."""
    world = World()
    (key,) = world.boot()
    world.lend()
    world.revoke(key)
    world.forget()

    world.post(open_channel(), CloseChannel(1))

    assert world.happened(Refused) != [] and all(
        isinstance(effect, Refused) and effect.legal for effect in world.happened(Refused)
    )
    assert world.refused() == ["open-on-revoked-channel", "close-on-revoked-channel"]
    assert world.sent() == []


def test_rescind_during_open_leaves_the_result_out() -> None:
    """An open that the device was still busy with gets no result either."""
    world = World(quick=False)
    (key,) = world.boot()
    world.lend()
    world.answer(MapGpadl)
    world.post(open_channel())
    world.forget()

    world.revoke(key)

    assert world.sent() == [RescindChannelOffer(1)]
    assert world.waiting == []


def test_rescind_crosses_gpadl() -> None:
    """A GPADL that the device had not decided about fails before RESCIND; one that comes later succeeds."""
    world = World(quick=False)
    (key,) = world.boot()
    world.lend()
    world.forget()

    world.revoke(key)
    assert world.sent() == [GpadlCreated(1, RING, FAILED), RescindChannelOffer(1)]
    world.lend()

    assert world.refused() == ["gpadl-on-revoked-channel"]
    assert world.sent() == [GpadlCreated(1, RING, 0)]


def test_a_gpadl_half_assembled_at_the_revoke_is_answered_when_whole() -> None:
    """The guest goes on posting bodies, and waits for the answer."""
    world = World()
    (key,) = world.boot()
    header, body = gpadl_messages(1, RING, range(40))
    world.post(header)
    world.revoke(key)
    world.forget()

    world.post(body)

    assert world.sent() == [GpadlCreated(1, RING, 0)]


def test_teardowns_at_and_after_the_revoke_are_answered() -> None:
    """One under way before the RESCIND, one that comes later at once, and none a second time."""
    world = World(quick=False)
    (key,) = world.boot()
    for handle in (1, 2):
        world.lend(gpadl=handle)
        world.answer(MapGpadl)
    world.post(GpadlTeardown(1, 1))
    world.forget()

    world.revoke(key)
    assert world.sent() == [GpadlTorndown(1), RescindChannelOffer(1)]
    world.post(GpadlTeardown(1, 2), GpadlTeardown(1, 2), GpadlTeardown(1, 1))

    assert world.refused() == ["gpadl-teardown-on-revoked-channel", *["gpadl-teardown-unknown"] * 2]
    assert world.sent() == [GpadlTorndown(2)]


def test_a_revoked_channels_gpadls_are_dropped_with_its_relid() -> None:
    """RELID_RELEASED ends all that the channel had, also what was in progress: no handle stays blocked."""
    world = World()
    (key,) = world.boot(1)
    world.lend(gpadl=1)
    world.post(gpadl_messages(1, 2, range(40))[0])
    world.revoke(key)

    world.release()

    assert world.server.summary().gpadls == 0 and world.server.summary().gpadl_pages == 0
    world.offer(1)
    world.post(*gpadl_messages(1, 2, range(40)))
    assert world.sent()[-1] == GpadlCreated(1, 2, 0)


def test_released_channels_gpadls_are_given_back_quietly() -> None:
    """A guest that lets go of a relid without teardown gets no TORNDOWN for it."""
    world = World()
    world.boot()
    world.lend(gpadl=1)
    world.post(gpadl_messages(1, 2, range(40))[0])
    world.forget()

    world.release()

    assert world.happened(UnmapGpadl) == [UnmapGpadl(100, 1)]
    assert world.sent() == []
    assert world.server.summary().gpadls == 0


def test_a_gpadl_offered_when_the_channel_is_released() -> None:
    """The device's late yes is followed by a teardown, its late no by nothing."""
    for yes in (True, False):
        world = World(quick=False)
        world.boot()
        world.lend()
        world.release()
        world.forget()

        world.answer(MapGpadl, yes=yes)
        if yes:
            world.answer(UnmapGpadl)

        assert world.sent() == []
        assert world.server.summary().gpadls == 0


def test_revoke_of_a_device_whose_channel_is_not_held() -> None:
    """Without a guest that knows of it, a device just disappears."""
    world = World()
    key = world.offer()

    world.revoke(key)

    assert world.effects == [DropDevice(key)]
    assert world.server.channels() == []


@pytest.mark.parametrize("state", sorted(REVOKED_STATES), ids=lambda state: state.name)
@pytest.mark.parametrize("answer", list(Answer), ids=lambda answer: answer.name)
@pytest.mark.parametrize(
    ("kind", "messages", "refusal", "acceptance"),
    [
        (
            MessageType.OPENCHANNEL,
            [open_channel()],
            [OpenChannelResult(1, 1, FAILED)],
            [OpenChannelResult(1, 1, 0)],
        ),
        (MessageType.CLOSECHANNEL, [CloseChannel(1)], [], []),
        (
            MessageType.GPADL_HEADER,
            gpadl_messages(1, 5, range(30)),
            [GpadlCreated(1, 5, FAILED)],
            [GpadlCreated(1, 5, 0)],
        ),
        (MessageType.GPADL_TEARDOWN, [GpadlTeardown(1, RING)], [], [GpadlTorndown(RING)]),
    ],
    ids=["open", "close", "gpadl", "teardown"],
)
def test_policy_for_revoked_channels(
    state: int,
    answer: Answer,
    kind: MessageType,
    messages: list[Message],
    refusal: list[Message],
    acceptance: list[Message],
) -> None:
    """Silent, refused or accepted: each kind of message in each revoked state, by the table."""
    policy = dict(DEFAULT_POLICY)
    for revoked in REVOKED_STATES:
        policy[kind, revoked] = answer
    world = World(policy=policy)
    (key,) = world.boot()
    world.lend()
    world.revoke(key)
    if state == max(REVOKED_STATES):
        world.offer()
    world.forget()

    world.post(*messages)

    assert len(world.refused()) == 1
    assert world.sent() == {Answer.SILENT: [], Answer.REFUSE: refusal, Answer.ACCEPT: acceptance}[answer]
