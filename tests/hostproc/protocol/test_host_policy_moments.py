"""The two moments of the host's policy: a request that is under way at the revoke, and anything after UNLOAD."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from uuid import UUID

import pytest

from emu.wire.messages import (
    MESSAGES,
    STATUS_CONNECTION_REFUSED,
    STATUS_UNSUCCESSFUL,
    AllOffersDelivered,
    CloseChannel,
    CloseReservedChannel,
    ConnectionState,
    Direction,
    GpadlBody,
    GpadlCreated,
    GpadlTeardown,
    GpadlTorndown,
    InitiateContact,
    Message,
    MessageType,
    ModifyChannel,
    ModifyChannelResponse,
    ModifyConnection,
    ModifyConnectionResponse,
    OpenChannelResult,
    OpenReservedChannel,
    Pause,
    PauseResponse,
    RelidReleased,
    RequestOffers,
    RescindChannelOffer,
    Resume,
    TlConnectRequest,
    TlConnectResult,
    Unload,
    UnloadResponse,
    gpadl_messages,
)
from emu.wire.versions import VERSION_COPPER, VERSION_WIN8_1, VERSION_WIN10_V5_3, FeatureFlags
from hostproc.protocol.departure import MOST_OWED
from hostproc.protocol.effects import CloseDevice, MapGpadl, OpenDevice
from hostproc.protocol.policy import DEFAULT_POLICY, Answer, Moment, Policy
from hostproc.protocol.session import Link
from hostproc.protocol.states import ChannelState
from hostproc.protocol.versions import Limits
from tests.hostproc.protocol.fake_partition import RAM_BYTES, RING, World, open_channel

FAILED = STATUS_UNSUCCESSFUL
ENDPOINT, SERVICE = UUID(int=1), UUID(int=2)
FEATURES = FeatureFlags.MODIFY_CONNECTION | FeatureFlags.PAUSE_RESUME
LIMITS = Limits(vp_count=4, ram_bytes=RAM_BYTES, max_version=VERSION_COPPER, features=FEATURES)


def with_cell(kind: MessageType, moment: Moment, answer: Answer) -> Policy:
    """The defaults with one cell changed."""
    return {**DEFAULT_POLICY, (kind, moment): answer}


# -- under way at the revoke ----------------------------------------------------------------------------


def _lending(world: World) -> None:
    world.lend()


def _giving_back(world: World) -> None:
    world.lend()
    world.answer(MapGpadl)
    world.post(GpadlTeardown(1, RING))


def _opening(world: World) -> None:
    world.lend()
    world.answer(MapGpadl)
    world.post(open_channel())


def _opening_again(world: World) -> None:
    _opening(world)
    world.answer(OpenDevice)
    world.post(CloseChannel(1), open_channel(openid=9))


def _retargeting(world: World) -> None:
    _opening(world)
    world.answer(OpenDevice)
    world.post(ModifyChannel(1, 2))


UNDER_WAY: list[tuple[MessageType, Callable[[World], None], dict[Answer, list[Message]]]] = [
    (
        MessageType.OPENCHANNEL,
        _opening,
        {Answer.REFUSE: [OpenChannelResult(1, 1, FAILED)], Answer.ACCEPT: [OpenChannelResult(1, 1, 0)]},
    ),
    (
        MessageType.OPENCHANNEL,
        _opening_again,
        {Answer.REFUSE: [OpenChannelResult(1, 9, FAILED)], Answer.ACCEPT: [OpenChannelResult(1, 9, 0)]},
    ),
    (
        MessageType.GPADL_HEADER,
        _lending,
        {Answer.REFUSE: [GpadlCreated(1, RING, FAILED)], Answer.ACCEPT: [GpadlCreated(1, RING, 0)]},
    ),
    (MessageType.GPADL_TEARDOWN, _giving_back, {Answer.ACCEPT: [GpadlTorndown(RING)]}),
    (
        MessageType.MODIFYCHANNEL,
        _retargeting,
        {Answer.REFUSE: [ModifyChannelResponse(1, FAILED)], Answer.ACCEPT: [ModifyChannelResponse(1, 0)]},
    ),
]


@pytest.mark.parametrize("answer", [None, *Answer], ids=lambda answer: answer.name if answer else "default")
@pytest.mark.parametrize(("kind", "begin", "replies"), UNDER_WAY, ids=["open", "reopen", "gpadl", "teardown", "modify"])
def test_what_is_under_way_at_the_revoke_is_answered_by_the_table(
    kind: MessageType,
    begin: Callable[[World], None],
    replies: dict[Answer, list[Message]],
    answer: Answer | None,
) -> None:
    """The answer, if there is one, goes out before the RESCIND; afterwards the device says nothing any more."""
    cell = kind, Moment.REVOKING
    world = World(policy=DEFAULT_POLICY if answer is None else with_cell(*cell, answer), quick=False)
    (key,) = world.boot()
    begin(world)
    world.forget()

    world.revoke(key)

    told = replies.get(answer or DEFAULT_POLICY[cell], [])
    assert world.sent() == [*told, RescindChannelOffer(1)]
    assert world.waiting == [] and world.refused() == []


@pytest.mark.parametrize("answer", list(Answer), ids=lambda answer: answer.name)
@pytest.mark.parametrize(("kind", "begin"), [row[:2] for row in UNDER_WAY])
def test_nothing_is_left_of_a_revoked_channel(
    kind: MessageType, begin: Callable[[World], None], answer: Answer
) -> None:
    """However the request was answered: with the relid everything goes, and the number can be offered again."""
    world = World(policy=with_cell(kind, Moment.REVOKING, answer), quick=False)
    (key,) = world.boot()
    begin(world)
    world.revoke(key)

    world.release()
    world.offer(1)

    assert (world.server.summary().gpadls, world.server.summary().gpadl_pages) == (0, 0)
    assert world.states() == {1: "CLOSED"}


def test_gpadl_that_is_accepted_at_the_revoke_is_torn_down_like_any() -> None:
    """Its handle is taken until the guest gives it back, and that is answered at once."""
    world = World(policy=with_cell(MessageType.GPADL_HEADER, Moment.REVOKING, Answer.ACCEPT), quick=False)
    (key,) = world.boot()
    world.lend()
    world.revoke(key)
    world.forget()

    world.lend()
    world.post(GpadlTeardown(1, RING))

    assert world.sent() == [GpadlCreated(1, RING, FAILED), GpadlTorndown(RING)]
    assert world.server.summary().gpadls == 0


def test_close_answers_a_retarget_whatever_the_policy_of_the_revoke() -> None:
    """The cell is about channels that are taken back, not about those that the guest closes."""
    world = World(policy=with_cell(MessageType.MODIFYCHANNEL, Moment.REVOKING, Answer.SILENT), quick=False)
    world.boot()
    _retargeting(world)
    world.forget()

    world.post(CloseChannel(1))

    assert world.sent() == [ModifyChannelResponse(1, FAILED)]


# -- after UNLOAD ---------------------------------------------------------------------------------------

SAID: dict[MessageType, Message] = {
    MessageType.REQUESTOFFERS: RequestOffers(),
    MessageType.OPENCHANNEL: open_channel(openid=7),
    MessageType.CLOSECHANNEL: CloseChannel(1),
    MessageType.GPADL_HEADER: gpadl_messages(1, RING, range(8))[0],
    MessageType.GPADL_BODY: GpadlBody(0, RING, bytes(8)),
    MessageType.GPADL_TEARDOWN: GpadlTeardown(1, RING),
    MessageType.RELID_RELEASED: RelidReleased(1),
    MessageType.UNLOAD: Unload(),
    MessageType.OPEN_RESERVED_CHANNEL: OpenReservedChannel(1, 0, 2, RING, 4),
    MessageType.CLOSE_RESERVED_CHANNEL: CloseReservedChannel(1, 0, 2),
    MessageType.TL_CONNECT_REQUEST: TlConnectRequest(ENDPOINT, SERVICE),
    MessageType.MODIFYCHANNEL: ModifyChannel(1, 0),
    MessageType.MODIFY_CONNECTION: ModifyConnection(0, 0),
    MessageType.PAUSE: Pause(),
    MessageType.RESUME: Resume(),
}
"""One of each that a guest may send, but for the contact that begins a connection."""
REPLIES: dict[tuple[MessageType, Answer], Message] = {
    (MessageType.REQUESTOFFERS, Answer.ACCEPT): AllOffersDelivered(),
    (MessageType.OPENCHANNEL, Answer.ACCEPT): OpenChannelResult(1, 7, 0),
    (MessageType.OPENCHANNEL, Answer.REFUSE): OpenChannelResult(1, 7, FAILED),
    (MessageType.GPADL_HEADER, Answer.ACCEPT): GpadlCreated(1, RING, 0),
    (MessageType.GPADL_HEADER, Answer.REFUSE): GpadlCreated(1, RING, FAILED),
    (MessageType.GPADL_TEARDOWN, Answer.ACCEPT): GpadlTorndown(RING),
    (MessageType.UNLOAD, Answer.ACCEPT): UnloadResponse(),
    (MessageType.TL_CONNECT_REQUEST, Answer.REFUSE): TlConnectResult(ENDPOINT, SERVICE, STATUS_CONNECTION_REFUSED),
    (MessageType.MODIFYCHANNEL, Answer.ACCEPT): ModifyChannelResponse(1, 0),
    (MessageType.MODIFYCHANNEL, Answer.REFUSE): ModifyChannelResponse(1, FAILED),
    (MessageType.MODIFY_CONNECTION, Answer.ACCEPT): ModifyConnectionResponse(ConnectionState.SUCCESSFUL),
    (MessageType.MODIFY_CONNECTION, Answer.REFUSE): ModifyConnectionResponse(ConnectionState.FAILED_UNKNOWN_FAILURE),
    (MessageType.PAUSE, Answer.ACCEPT): PauseResponse(),
}


def everywhere(answer: Answer) -> Policy:
    """The defaults, with this answer to whatever comes after UNLOAD."""
    return {pair: answer if pair[1] is Moment.UNLOADED else default for pair, default in DEFAULT_POLICY.items()}


def unloading(policy: Policy = DEFAULT_POLICY, version: int = VERSION_COPPER) -> World:
    """A guest with one open channel that has said UNLOAD; its device has not closed yet."""
    world = World(limits=LIMITS, policy=policy)
    world.offer()
    world.connect(version, feature_flags=int(FEATURES))
    world.request_offers()
    world.open()
    world.quick = False
    world.post(Unload())
    world.forget()
    assert world.server.link is Link.DISCONNECTING
    return world


def finish(world: World) -> None:
    """Let the devices close, and give everything back."""
    while world.waiting:
        world.answer(type(world.waiting[0]))
    assert world.server.link is Link.DISCONNECTED


def test_every_message_is_tried() -> None:
    """What a guest may send is in the table above."""
    from_guest = {kind for kind, spec in MESSAGES.items() if spec.direction is Direction.GUEST_TO_HOST}

    assert set(SAID) == from_guest - {InitiateContact.TYPE}
    assert all(message.TYPE is kind for kind, message in SAID.items())


@pytest.mark.parametrize(("kind", "answer"), list(product(SAID, [None, *Answer])), ids=str)
def test_message_after_unload_is_answered_by_the_table(kind: MessageType, answer: Answer | None) -> None:
    """At once when nothing of the guest's is in use any more, else behind the answer to its UNLOAD; never twice."""
    cell = kind, Moment.UNLOADED
    said = answer is not None and cell in DEFAULT_POLICY
    world = unloading(DEFAULT_POLICY if not said or answer is None else with_cell(*cell, answer))
    told = [REPLIES[kind, answer]] if said and answer is not None and (kind, answer) in REPLIES else []

    world.post(SAID[kind])
    assert world.sent() == []
    finish(world)
    assert world.sent() == [UnloadResponse(), *told]
    world.post(SAID[kind])

    assert len(world.refused()) == 1
    assert world.sent() == told


def test_what_a_guest_says_after_unload_changes_nothing() -> None:
    """A host that answers everything has still nothing of the guest's, and the next one finds it afresh."""
    world = unloading(everywhere(Answer.ACCEPT))
    finish(world)

    world.post(*SAID.values())

    assert world.server.summary().gpadls == 0 and world.states() == {}
    world.connect()
    assert [offer.child_relid for offer in world.request_offers()] == [1]


def test_old_guest_is_not_sent_what_it_does_not_know() -> None:
    """The answers are those of the version that was agreed, and so are the messages."""
    world = unloading(everywhere(Answer.ACCEPT), VERSION_WIN8_1)
    finish(world)
    world.forget()

    world.post(ModifyChannel(1, 0), TlConnectRequest(ENDPOINT, SERVICE), Pause(), GpadlTeardown(1, RING))

    assert world.sent() == [GpadlTorndown(RING)]


def test_so_many_answers_wait_for_the_devices_and_no_more() -> None:
    """A guest that goes on asking while devices close fills nothing of the host's."""
    world = unloading(everywhere(Answer.ACCEPT))

    world.post(*[GpadlTeardown(1, number) for number in range(100)])
    finish(world)

    assert world.sent() == [UnloadResponse(), *[GpadlTorndown(number) for number in range(MOST_OWED - 1)]]


@pytest.mark.parametrize("ending", ["contact", "reset", "never"])
def test_only_a_guest_that_unloaded_is_answered(ending: str) -> None:
    """Contact or reset make another guest of it, and one that never connected has not left either."""
    world = unloading(everywhere(Answer.ACCEPT)) if ending != "never" else World(policy=everywhere(Answer.ACCEPT))
    if ending == "contact":
        world.post(GpadlTeardown(1, RING))
        contact = InitiateContact(vmbus_version_requested=VERSION_WIN10_V5_3, msg_sint=2)
        world.post(contact, connection_id=4)
        while world.waiting:
            world.answer(type(world.waiting[0]))
        assert world.server.link is Link.CONNECTED
        world.take(world.server.reset())
    elif ending == "reset":
        world.post(GpadlTeardown(1, RING))
        world.take(world.server.reset())
        finish(world)
    assert not [message for message in world.sent() if isinstance(message, GpadlTorndown | UnloadResponse)]

    world.post(GpadlTeardown(1, RING), Unload())

    assert world.sent() == []


def test_second_unload_of_a_host_that_answers_it() -> None:
    """The host of races.md G1 that is not silent: who says UNLOAD twice is told twice."""
    world = unloading(with_cell(MessageType.UNLOAD, Moment.UNLOADED, Answer.ACCEPT))

    world.answer(CloseDevice)
    world.post(Unload())
    finish(world)
    world.post(Unload())

    assert world.sent() == [UnloadResponse()] * 3
    assert world.states() == {} and world.counted() == {ChannelState.CLIENT_RELEASED.name: 1}
