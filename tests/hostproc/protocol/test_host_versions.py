"""First contact: which versions connect, what each defines, and what is refused without connecting."""

from __future__ import annotations

from dataclasses import astuple
from uuid import UUID

import pytest

from emu.scenario import SUPPORTED_FEATURES
from emu.wire.messages import (
    NO_MONITOR,
    STATUS_UNSUCCESSFUL,
    InitiateContact,
    ModifyChannel,
    ModifyChannelResponse,
    ModifyConnection,
    ModifyConnectionResponse,
    OpenChannelResult,
    Pause,
    PauseResponse,
    RequestOffers,
    Resume,
    Unload,
    UnloadResponse,
    VersionResponse,
)
from emu.wire.versions import (
    KNOWN_VERSIONS,
    VERSION_COPPER,
    VERSION_WIN7,
    VERSION_WIN8,
    VERSION_WIN8_1,
    VERSION_WIN10_V4_1,
    VERSION_WIN10_V5,
    VERSION_WIN10_V5_1,
    VERSION_WIN10_V5_2,
    VERSION_WIN10_V5_3,
    VERSION_WS2008,
    FeatureFlags,
    version_text,
)
from hostproc.protocol.effects import (
    BindEvent,
    Connected,
    Disconnected,
    MonitorPages,
    OpenDoorbell,
    Refused,
    SendMessage,
)
from hostproc.protocol.session import Link
from hostproc.protocol.versions import IMPLEMENTED_FEATURES, VERSIONS, Limits, message_connections
from tests.hostproc.protocol.fake_partition import RAM_BYTES, World, open_channel

REFUSAL = VersionResponse(0)
ALL_FEATURES = FeatureFlags(0xFF)


def world_with(**limits: object) -> World:
    """A world whose host has these limits."""
    return World(limits=Limits(vp_count=4, ram_bytes=RAM_BYTES, **limits))  # type: ignore[arg-type]


def answered_on(world: World) -> tuple[int, int]:
    """Return the VP and the SINT that the last message went to."""
    effect = [effect for effect in world.effects if isinstance(effect, SendMessage)][-1]
    return effect.vp_index, effect.sint


@pytest.mark.parametrize("version", [0, 1, 0x00020003, 0x00050004, 0x00070000, 0xFFFFFFFF], ids=hex)
def test_unknown_version_is_answered_not_supported(version: int) -> None:
    """A version nobody knows gets a refusal, and the host stays disconnected and willing."""
    world = World()

    assert world.contact(version) == REFUSAL
    assert world.server.link is Link.DISCONNECTED
    assert world.refused() == ["contact-version"]
    world.connect()


def test_scenarios_offer_what_the_server_implements() -> None:
    """The features that a scenario may name are those that are carried out."""
    assert SUPPORTED_FEATURES == IMPLEMENTED_FEATURES


@pytest.mark.parametrize("version", KNOWN_VERSIONS, ids=version_text)
def test_each_known_version_connects(version: int) -> None:
    """Each version connects, with the response that it defines."""
    world = World(limits=Limits(vp_count=4, ram_bytes=RAM_BYTES, max_version=VERSION_COPPER))

    response = world.contact(version)

    assert response.version_supported == 1
    assert response.msg_conn_id == (1 if version >= VERSION_WIN10_V5 else version)
    assert (response.supported_features is None) is (version < VERSION_COPPER)
    assert world.server.summary().version == version


@pytest.mark.parametrize("cap", KNOWN_VERSIONS, ids=version_text)
def test_cap_on_the_version_from_outside(cap: int) -> None:
    """A guest that comes down from the newest version connects in the cap, and in none above."""
    world = world_with(max_version=cap)

    tried = [version for version in reversed(KNOWN_VERSIONS) if not world.contact(version).version_supported]

    assert world.server.summary().version == KNOWN_VERSIONS[0]
    assert tried == [version for version in reversed(KNOWN_VERSIONS) if version > cap]


def test_versions_that_are_not_spoken_are_refused_like_unknown_ones() -> None:
    """What a host does not carry out it does not agree to."""
    world = world_with(spoken=frozenset({VERSION_WIN10_V5_3}))

    assert world.contact(VERSION_WIN7) == REFUSAL
    assert world.contact(VERSION_WIN10_V5_3).version_supported == 1


def test_connection_four_comes_with_five() -> None:
    """Below 5.0 a host has message connection 1 only."""
    assert message_connections(VERSION_WIN10_V4_1) == (1,)
    assert message_connections(VERSION_WIN10_V5) == (1, 4)


@pytest.mark.parametrize("version", KNOWN_VERSIONS, ids=version_text)
def test_target_vp_is_honoured_from_3_0(version: int) -> None:
    """Messages go to the VP that the guest names, but to VP 0 in older versions."""
    world = World(limits=Limits(vp_count=4, ram_bytes=RAM_BYTES, max_version=VERSION_COPPER))

    world.contact(version, target_vcpu=3)
    world.post(RequestOffers())

    assert answered_on(world) == (3 if version >= VERSION_WIN8_1 else 0, 2)


def test_a_target_vp_that_is_not_there_is_refused_to_vp_0() -> None:
    """A guest that wants its messages where nobody is gets a refusal where somebody is."""
    world = World()

    assert world.contact(target_vcpu=4) == REFUSAL
    assert answered_on(world) == (0, 2)
    assert world.refused() == ["contact-target-vcpu"]


def test_another_sint_is_refused_there() -> None:
    """Messages on another SINT than 2 are not for this server; the guest that listens there is told so."""
    world = World()
    world.connect()

    assert world.contact(msg_sint=5, target_vcpu=1) == REFUSAL
    assert answered_on(world) == (1, 5)
    assert world.server.link is Link.CONNECTED


def test_a_sint_that_does_not_exist_is_refused_on_sint_2() -> None:
    """SINT 16 and more is no place to answer to."""
    world = World()

    assert world.contact(msg_sint=16) == REFUSAL
    assert answered_on(world) == (0, 2)


def test_a_message_on_the_contacts_connection_is_taken_and_noted() -> None:
    """A guest that does not go on to the connection that VERSION_RESPONSE named gets its answer, and is seen."""
    world = World()
    world.offer()
    world.connect()

    world.post(RequestOffers(), connection_id=4)

    (noted,) = world.happened(Refused)
    assert isinstance(noted, Refused)
    assert (noted.rule, noted.legal, noted.field, noted.value) == (
        "message-on-contact-connection",
        True,
        "connection_id",
        4,
    )
    assert noted.text.startswith("REQUESTOFFERS on connection 4")
    assert [type(message).__name__ for message in world.sent()] == ["OfferChannel", "AllOffersDelivered"]


def test_contacts_and_messages_of_the_named_connection_are_not_noted() -> None:
    """Connection 4 is for INITIATE_CONTACT, a second one as well, and connection 1 for the rest."""
    world = World()
    world.connect()
    world.contact()
    world.post(RequestOffers(), Unload())

    assert world.refused() == []


def test_sint_counts_on_the_multiclient_connection_only() -> None:
    """On message connection 1 the bytes mean nothing, and messages come on SINT 2."""
    world = World()

    message = InitiateContact(vmbus_version_requested=VERSION_WIN10_V5_3, msg_sint=7)
    world.post(message, connection_id=1)

    assert world.server.link is Link.CONNECTED


@pytest.mark.parametrize(("version", "connects"), [(VERSION_WIN10_V5, True), (VERSION_WIN10_V5_1, False)])
def test_vtl_counts_from_5_1(version: int, connects: bool) -> None:
    """A guest of another VTL is not this server's; before 5.1 the byte means nothing."""
    world = World()

    assert bool(world.contact(version, msg_vtl=2).version_supported) is connects


@pytest.mark.parametrize("pages", [(0x1000, 0), (0, 0x1000)])
@pytest.mark.parametrize("version", KNOWN_VERSIONS, ids=version_text)
def test_one_monitor_page_without_the_other_is_refused(version: int, pages: tuple[int, int]) -> None:
    """Half a pair is an error: in connection_state from 2.4 on, as an unsupported version before."""
    world = World(limits=Limits(vp_count=4, ram_bytes=RAM_BYTES, max_version=VERSION_COPPER))

    response = world.contact(version, monitor_page1=pages[0], monitor_page2=pages[1])

    expected = VersionResponse(1, 2) if version >= VERSION_WIN8 else REFUSAL
    assert response == expected
    assert world.server.link is Link.DISCONNECTED
    assert world.refused() == ["one-monitor-page"]


@pytest.mark.parametrize("page", [0x1001, RAM_BYTES, 1 << 63], ids=hex)
def test_monitor_pages_outside_ram_are_refused(page: int) -> None:
    """A page the host cannot reach is no monitor page."""
    world = World()

    assert world.contact(monitor_page1=0x1000, monitor_page2=page) == VersionResponse(1, 2)
    assert world.refused() == ["monitor-page-outside-ram"]


def test_interrupt_page_is_used_below_2_4_only() -> None:
    """The interrupt page is checked and taken over only where interrupts need it."""
    world = World()

    world.contact(VERSION_WIN7, interrupt_page=0x5000)
    world.contact(VERSION_WIN8, interrupt_page=0x5001)
    assert world.contact(VERSION_WS2008, interrupt_page=RAM_BYTES) == REFUSAL

    pages = [effect.interrupt_page for effect in world.happened(Connected) if isinstance(effect, Connected)]
    assert pages == [0x5000, 0]


def test_a_second_contact_disconnects_first() -> None:
    """A crash kernel just begins again: devices close, then it is answered."""
    world = World(quick=False)
    world.boot()
    world.lend()
    world.quick = True
    world.answer(type(world.waiting[0]))
    world.post(open_channel())
    world.forget()
    world.quick = False

    world.post(InitiateContact(vmbus_version_requested=VERSION_WIN10_V5_2, msg_sint=2), connection_id=4)
    assert world.server.link is Link.DISCONNECTING
    assert world.sent() == []
    while world.waiting:
        world.answer(type(world.waiting[0]))

    assert world.happened(Disconnected) == [Disconnected(replaced=True)]
    assert world.sent() == [VersionResponse(1, 0, 1)]
    assert world.server.summary().version == VERSION_WIN10_V5_2
    assert len(world.request_offers()) == 1


def test_an_unsupported_second_contact_disconnects_too() -> None:
    """The guest that was connected is gone, whether or not the new one can be served."""
    world = World()
    world.boot()

    assert world.contact(0x00070000) == REFUSAL
    assert world.server.link is Link.DISCONNECTED


def test_the_last_of_several_contacts_is_answered() -> None:
    """While devices close, a guest may change its mind: the newest contact counts, no earlier UNLOAD."""
    world = World(quick=False)
    world.boot()
    world.lend()
    world.post(Unload())
    world.post(InitiateContact(vmbus_version_requested=VERSION_WIN10_V5_3, msg_sint=2), connection_id=4)
    world.post(InitiateContact(vmbus_version_requested=VERSION_WIN10_V5_1, msg_sint=2), connection_id=4)
    world.forget()

    while world.waiting:
        world.answer(type(world.waiting[0]))

    assert world.sent() == [VersionResponse(1, 0, 1)]
    assert world.server.summary().version == VERSION_WIN10_V5_1


def test_feature_flags_are_intersected_and_unknown_bits_dropped() -> None:
    """A 6.0 host grants what it offers of what was asked, and never a bit that nobody knows."""
    world = world_with(max_version=VERSION_COPPER, features=ALL_FEATURES)
    offered = FeatureFlags.PAUSE_RESUME | FeatureFlags.MODIFY_CONNECTION

    assert world.contact(VERSION_COPPER, feature_flags=0xFFFFFF00 | offered).supported_features == offered
    assert world_with(max_version=VERSION_COPPER).contact(VERSION_COPPER, feature_flags=0xFF & ~8) == (
        VersionResponse(1, 0, 1, 0)
    )


def test_nothing_is_shown_of_a_guest_that_has_left() -> None:
    """Neither its version nor its features."""
    world = world_with(max_version=VERSION_COPPER, features=FeatureFlags.PAUSE_RESUME)
    world.contact(VERSION_COPPER, feature_flags=int(FeatureFlags.PAUSE_RESUME))
    shown = [world.server.summary()]
    world.post(Unload())
    shown.append(world.server.summary())

    assert [(one.link, one.version, one.features) for one in shown] == [
        (Link.CONNECTED, VERSION_COPPER, FeatureFlags.PAUSE_RESUME),
        (Link.DISCONNECTED, 0, FeatureFlags(0)),
    ]


def test_client_id_makes_the_message_longer() -> None:
    """A 6.0 guest that names itself is connected like any other."""
    world = world_with(max_version=VERSION_COPPER, features=FeatureFlags.CLIENT_ID)
    message = InitiateContact(
        vmbus_version_requested=VERSION_COPPER,
        msg_sint=2,
        feature_flags=int(FeatureFlags.CLIENT_ID),
        client_id=UUID(int=5),
    )

    world.post(message, connection_id=4)

    assert world.sent() == [VersionResponse(1, 0, 1, int(FeatureFlags.CLIENT_ID))]


@pytest.mark.parametrize("version", KNOWN_VERSIONS, ids=version_text)
def test_offers_and_opens_in_each_version(version: int) -> None:
    """Each version has its own offer fields, doorbell and interrupt."""
    world = World(limits=Limits(vp_count=4, ram_bytes=RAM_BYTES, max_version=VERSION_COPPER))
    world.offer()
    world.offer(sub_channel_index=1)
    world.connect(version)

    offers = world.request_offers()
    world.open(target_vp=2)

    assert len(offers) == (2 if version >= VERSION_WIN8 else 1)
    assert world.server.subchannel_room == (2045 if version >= VERSION_WIN8 else 0)
    assert offers[0].is_dedicated_interrupt is (version >= VERSION_WIN7)
    assert offers[0].connection_id == (0x2001 if version >= VERSION_WIN7 else 0)
    (doorbell,) = world.happened(OpenDoorbell)
    assert isinstance(doorbell, OpenDoorbell)
    assert doorbell.connection_id == (0x2001 if version >= VERSION_WIN7 else 2)
    (event,) = world.happened(BindEvent)
    assert isinstance(event, BindEvent)
    expected = (2, 1, False) if version >= VERSION_WIN8 else (0, 0, True)
    assert (event.target_vp, event.flag, event.shared) == expected
    assert world.sent()[-1] == OpenChannelResult(1, 1, 0)


@pytest.mark.parametrize("version", KNOWN_VERSIONS, ids=version_text)
def test_unload_is_answered_from_1_1(version: int) -> None:
    """0.13 has no UNLOAD_RESPONSE."""
    world = World(limits=Limits(vp_count=4, ram_bytes=RAM_BYTES, max_version=VERSION_COPPER))
    world.boot(version=version)

    world.post(Unload())

    assert world.sent() == ([UnloadResponse()] if version >= VERSION_WIN7 else [])


@pytest.mark.parametrize("version", KNOWN_VERSIONS, ids=version_text)
def test_modify_channel_from_4_1_and_its_response_from_5_3(version: int) -> None:
    """Retargeting came before its acknowledgement."""
    world = World(limits=Limits(vp_count=4, ram_bytes=RAM_BYTES, max_version=VERSION_COPPER))
    world.boot(version=version)
    world.open()
    world.forget()

    world.post(ModifyChannel(1, 3))

    assert world.refused() == ([] if version >= VERSION_WIN10_V4_1 else ["message-before-its-version"])
    assert world.sent() == ([ModifyChannelResponse(1, 0)] if version >= VERSION_WIN10_V5_3 else [])


def test_monitor_ids_go_to_who_wants_them_until_they_run_out() -> None:
    """The 129th monitored channel is offered without a monitor, and so are channels that want none."""
    world = World()
    for number in range(130):
        world.offer(number, wants_monitor=number != 0)
    world.connect(monitor_page1=0x1000, monitor_page2=0x2000)

    offers = world.request_offers()

    assert offers[0].monitorid == NO_MONITOR and not offers[0].monitor_allocated
    assert [offer.monitorid for offer in offers[1:129]] == list(range(128))
    assert all(offer.monitor_allocated for offer in offers[1:129])
    assert offers[129].monitorid == NO_MONITOR and not offers[129].monitor_allocated


def test_without_monitor_pages_nobody_gets_a_monitor_id() -> None:
    """A guest that gave no pages signals by hypercall."""
    world = World()
    world.offer(wants_monitor=True)
    world.connect()

    assert world.request_offers()[0].monitorid == NO_MONITOR


def test_a_released_monitor_id_is_given_again() -> None:
    """A monitor id lives as long as its relid."""
    world = World()
    world.offer(0, wants_monitor=True)
    world.connect(monitor_page1=0x1000, monitor_page2=0x2000)
    world.request_offers()

    world.release(1)
    world.offer(1, wants_monitor=True)

    assert world.sent()[-1].monitorid == 0  # type: ignore[attr-defined]


def test_guest_specified_signal_parameters() -> None:
    """A 6.0 guest may choose its event flag and connection id, within bounds and nobody else's."""
    flags = FeatureFlags.GUEST_SPECIFIED_SIGNAL_PARAMETERS
    world = world_with(max_version=VERSION_COPPER, features=flags)
    world.offer(0)
    world.offer(1)
    world.connect(VERSION_COPPER, feature_flags=int(flags))
    world.request_offers()

    world.open(1, connection_id=0x3000, event_flag=77)
    world.lend(2, gpadl=9)
    for connection_id, event_flag in ((0x3000, 78), (0x3001, 0), (0x3001, 2048), (4, 78), (1 << 24, 78)):
        world.post(open_channel(2, 9, connection_id=connection_id, event_flag=event_flag))

    assert [(e.flag) for e in world.happened(BindEvent) if isinstance(e, BindEvent)] == [77]
    rules = [*["open-connection-id"], *["open-event-flag"] * 2, *["open-connection-id"] * 2]
    assert [e.rule for e in world.happened(Refused) if isinstance(e, Refused)] == rules
    assert [message.status for message in world.sent() if isinstance(message, OpenChannelResult)] == [
        0,
        *[STATUS_UNSUCCESSFUL] * 5,
    ]


def test_signal_parameters_without_the_feature_are_padding() -> None:
    """Bytes behind a short OPENCHANNEL mean nothing to a guest that did not ask for the feature."""
    world = World()
    world.boot()

    world.open(1, connection_id=0x3000, event_flag=77)

    (event,) = world.happened(BindEvent)
    assert isinstance(event, BindEvent) and event.flag == 1


def test_pause_holds_messages_back_until_resume() -> None:
    """After PAUSE_RESPONSE nothing is sent, and only RESUME, UNLOAD and a new contact are taken."""
    flags = FeatureFlags.PAUSE_RESUME
    world = world_with(max_version=VERSION_COPPER, features=flags)
    world.connect(VERSION_COPPER, feature_flags=int(flags))
    world.request_offers()

    world.post(Pause())
    assert world.sent() == [PauseResponse()]
    world.offer()
    world.post(open_channel())
    assert world.refused() == ["message-while-paused"]
    assert world.sent() == []
    world.post(Resume())

    assert [message.TYPE.name for message in world.sent()] == ["OFFERCHANNEL"]


def test_unload_while_paused_is_answered() -> None:
    """A paused guest may leave."""
    flags = FeatureFlags.PAUSE_RESUME
    world = world_with(max_version=VERSION_COPPER, features=flags)
    world.connect(VERSION_COPPER, feature_flags=int(flags))
    world.post(Pause())
    world.forget()

    world.post(Unload())

    assert world.sent() == [UnloadResponse()]


def test_what_a_paused_guest_was_not_sent_dies_with_the_connection() -> None:
    """Its successor is not paused, and gets nothing that was held back."""
    flags = FeatureFlags.PAUSE_RESUME
    world = world_with(max_version=VERSION_COPPER, features=flags)
    world.connect(VERSION_COPPER, feature_flags=int(flags))
    world.request_offers()
    world.post(Pause())
    world.offer()

    world.connect(VERSION_COPPER, feature_flags=int(flags))
    assert len(world.request_offers()) == 1
    world.post(Pause(), Resume())

    assert world.sent() == [PauseResponse()]


def test_modify_connection_moves_the_monitor_pages() -> None:
    """Both pages or neither; half a pair is answered with a failure."""
    flags = FeatureFlags.MODIFY_CONNECTION
    world = world_with(max_version=VERSION_COPPER, features=flags)
    world.connect(VERSION_COPPER, feature_flags=int(flags))

    world.post(ModifyConnection(0x3000, 0x4000))
    assert world.happened(MonitorPages) == [MonitorPages(0x3000, 0x4000)]
    assert world.sent() == [ModifyConnectionResponse(0)]
    world.post(ModifyConnection(0x3000, 0))

    assert world.refused() == ["one-monitor-page"]
    assert world.sent() == [ModifyConnectionResponse(2)]


def test_messages_of_a_feature_need_the_feature() -> None:
    """A 6.0 message without its feature is refused, as is any message before its version."""
    world = World(limits=Limits(vp_count=4, ram_bytes=RAM_BYTES, max_version=VERSION_COPPER))
    world.connect(VERSION_COPPER)
    world.post(Pause(), ModifyConnection(0, 0))
    assert world.refused() == ["message-without-its-feature"] * 2
    world.connect(VERSION_WIN8)
    world.post(Pause(), ModifyChannel(1, 0))

    assert world.refused() == ["message-before-its-version"] * 2
    assert world.sent() == []


def test_every_version_has_a_row() -> None:
    """The table has each version once, and each has all that an older one has."""
    rows = [astuple(VERSIONS[version])[2:] for version in KNOWN_VERSIONS]

    assert all(
        old <= new for older, newer in zip(rows, rows[1:], strict=False) for old, new in zip(older, newer, strict=True)
    )
    assert not any(rows[0]) and all(rows[-1])
    assert VERSIONS[VERSION_WIN10_V5_3].text == "5.3"
