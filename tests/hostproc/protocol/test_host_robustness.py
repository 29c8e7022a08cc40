"""Nothing a guest posts raises: messages cut at every length, every type in every state, random bytes."""

from __future__ import annotations

import random
from itertools import product
from uuid import UUID

import pytest

from emu.wire.messages import (
    HEADER,
    MESSAGES,
    AllOffersDelivered,
    CloseChannel,
    CloseReservedChannel,
    CloseReservedResponse,
    Direction,
    GpadlBody,
    GpadlCreated,
    GpadlHeader,
    GpadlTeardown,
    GpadlTorndown,
    InitiateContact,
    Message,
    MessageType,
    ModifyChannel,
    ModifyChannelResponse,
    ModifyConnection,
    ModifyConnectionResponse,
    OfferChannel,
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
    VersionResponse,
    gpadl_messages,
)
from emu.wire.versions import VERSION_WIN10_V5_3
from hostproc.protocol.effects import Refused
from hostproc.protocol.server import Server
from hostproc.protocol.states import ChannelState
from hostproc.protocol.versions import Limits
from tests.hostproc.protocol.fake_partition import RAM_BYTES, RING, World, open_channel
from tests.hostproc.protocol.test_host_states import bring_to, state_of

GUID = UUID(int=9)

EXAMPLES: list[Message] = [
    OfferChannel(if_type=GUID, if_instance=GUID, child_relid=1, connection_id=1),
    RescindChannelOffer(1),
    RequestOffers(),
    AllOffersDelivered(),
    open_channel(),
    OpenChannelResult(1, 1, 0),
    CloseChannel(1),
    gpadl_messages(1, RING + 7, range(30))[0],
    GpadlBody(0, RING + 7, bytes(8)),
    GpadlCreated(1, RING, 0),
    GpadlTeardown(1, RING),
    GpadlTorndown(RING),
    RelidReleased(1),
    InitiateContact(vmbus_version_requested=VERSION_WIN10_V5_3, msg_sint=2),
    VersionResponse(1),
    Unload(),
    UnloadResponse(),
    OpenReservedChannel(1, 0, 2, RING, 4),
    CloseReservedChannel(1, 0, 2),
    CloseReservedResponse(1),
    TlConnectRequest(GUID, GUID),
    ModifyChannel(1, 0),
    TlConnectResult(GUID, GUID, 0),
    ModifyChannelResponse(1, 0),
    ModifyConnection(0, 0),
    ModifyConnectionResponse(0),
    Pause(),
    PauseResponse(),
    Resume(),
]
FROM_GUEST = [m for m in EXAMPLES if MESSAGES[m.TYPE].direction is Direction.GUEST_TO_HOST]
FROM_HOST = [m for m in EXAMPLES if MESSAGES[m.TYPE].direction is Direction.HOST_TO_GUEST]


def test_there_is_an_example_of_every_message() -> None:
    """The cases below leave none out."""
    assert [message.TYPE for message in EXAMPLES] == list(MESSAGES)


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: message.TYPE.name)
def test_cut_at_every_length(message: Message) -> None:
    """A message that is shorter than its least size is refused, whatever it is; nothing else happens."""
    payload = message.pack()
    least = MESSAGES[message.TYPE].least_size
    for length in range(least):
        world = World()
        world.boot()
        world.lend()
        world.forget()

        world.post_bytes(payload[:length])

        assert world.refused() == ["message-too-short"]
        assert world.effects == []


@pytest.mark.parametrize("message", FROM_GUEST, ids=lambda message: message.TYPE.name)
def test_padded_to_every_length(message: Message) -> None:
    """Bytes behind a message change nothing: firmware posts 240, whatever it says."""
    payload = message.pack()
    outcomes = set()
    for length in range(len(payload), 241):
        world = World()
        world.boot()
        world.lend()
        world.post(GpadlHeader(1, RING + 8, 24, 1, b""))
        world.forget()

        world.post_bytes(payload.ljust(length, b"\0"))

        outcomes.add((str(world.effects), str(world.states())))
    # The forms that a version makes longer are two outcomes: with the new fields, and without.
    longer = message.TYPE in (
        MessageType.TL_CONNECT_REQUEST,
        MessageType.GPADL_HEADER,
        MessageType.GPADL_BODY,
    )
    assert len(outcomes) <= (30 if longer else 1)


@pytest.mark.parametrize("message", FROM_HOST, ids=lambda message: message.TYPE.name)
def test_the_hosts_own_messages_are_refused(message: Message) -> None:
    """What only a host says has no effect when a guest says it."""
    world = World()
    world.boot()

    world.post(message)

    assert world.refused() == ["wrong-direction"]
    assert world.effects == []


@pytest.mark.parametrize(
    ("state", "message"),
    list(product(ChannelState, FROM_GUEST)),
    ids=lambda value: value.name if isinstance(value, ChannelState) else value.TYPE.name,
)
def test_every_message_in_every_state(state: ChannelState, message: Message) -> None:
    """Whatever is posted whenever: no exception, an effect or a reason why not, and the machine goes on."""
    world, _key = bring_to(state)
    before = state_of(world)
    world.forget()

    world.post(message)
    world.quick = True
    while world.waiting:
        world.answer(type(world.waiting[0]))
    # Only a GPADL that still waits for bodies has nothing to show.
    assert world.effects or state_of(world) != before or isinstance(message, GpadlHeader)
    world.connect()

    assert len(world.request_offers()) == len(world.server.channels())


@pytest.mark.parametrize("message", FROM_GUEST, ids=lambda message: message.TYPE.name)
def test_every_message_while_nobody_is_connected(message: Message) -> None:
    """Only first contact counts then; closing a reserved channel is looked at, too."""
    world = World()
    world.offer()

    world.post(message)

    connects = isinstance(message, InitiateContact)
    assert bool(world.server.summary().version) is connects
    assert len(world.refused()) == (0 if connects else 1)


@pytest.mark.parametrize("msgtype", [0, 30, 31, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_unknown_messages_are_refused(msgtype: int) -> None:
    """A type that no version has."""
    world = World()
    world.boot()

    world.post_bytes(HEADER.pack(msgtype, 0) + bytes(232))

    (effect,) = world.effects
    assert isinstance(effect, Refused)
    assert (effect.rule, effect.field, effect.value) == ("unknown-msgtype", "msgtype", msgtype)


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes(seed: int) -> None:
    """Bytes behind a known or unknown type, of any length."""
    dice = random.Random(seed)
    world = World()
    world.boot(3)
    for _ in range(300):
        payload = HEADER.pack(dice.choice([*range(32), dice.getrandbits(32)]), dice.getrandbits(32))
        payload += dice.randbytes(dice.randrange(233))
        world.post_bytes(payload[: dice.choice([len(payload), dice.randrange(241)])])
    world.forget()

    world.connect()

    assert world.request_offers()


def test_a_hostile_guest_cannot_grow_the_host() -> None:
    """A hundred thousand refused messages leave nothing behind in the server."""
    server = Server(Limits(vp_count=1, ram_bytes=RAM_BYTES, gpadls_in_progress=4, gpadls=8))
    world = World()
    world.server = server
    world.boot()
    for handle in range(20_000):
        header = gpadl_messages(1, handle, range(30))[0]
        server.receive(header.pack(), connection_id=1)
        server.receive(GpadlBody(0, handle ^ 1, bytes(224)).pack(), connection_id=1)
        server.receive(TlConnectRequest(UUID(int=handle), GUID).pack(), connection_id=1)

    summary = server.summary()

    assert summary.gpadls <= 8 and summary.gpadls_in_progress <= 4
