"""The host's state tables, whole: each event in each state, in the table and in the running server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import IntEnum
from itertools import product

import pytest

from emu.errors import ProtocolViolation
from emu.wire.messages import CloseChannel, RelidReleased, RequestOffers, RescindChannelOffer, Unload
from hostproc.protocol.effects import MapGpadl, OpenDevice
from hostproc.protocol.states import (
    CLIENT_RELEASE_STATES,
    GPADL_TRANSITIONS,
    REVOKED_STATES,
    TRANSITIONS,
    ChannelEvent,
    ChannelState,
    GpadlEvent,
    GpadlState,
    advance,
    advance_gpadl,
)
from tests.hostproc.protocol.fake_partition import World, open_channel, parameters

S, E = ChannelState, ChannelEvent

# One column an event: offer sent, open, close, release, disconnect, opened, refused, closed, revoke, again.
CHANNELS = """
    CLIENT_RELEASED  CLOSED . . . CLIENT_RELEASED . . . gone .
    CLOSED  . OPENING . CLIENT_RELEASED CLIENT_RELEASED . . . REVOKED .
    OPENING  . . . . OPENING_CLIENT_RELEASE OPEN CLOSED . REVOKED .
    OPEN  . . CLOSING . CLOSING_CLIENT_RELEASE . . . REVOKED .
    CLOSING  . CLOSING_REOPEN . CLOSING_CLIENT_RELEASE CLOSING_CLIENT_RELEASE . . CLOSED REVOKED .
    CLOSING_REOPEN  . . . . CLOSING_CLIENT_RELEASE . . OPENING REVOKED .
    REVOKED  . REVOKED REVOKED gone gone . . . . REOFFERED
    REOFFERED  . REOFFERED REOFFERED CLOSED CLIENT_RELEASED . . . REVOKED .
    CLOSING_CLIENT_RELEASE  . . . . CLOSING_CLIENT_RELEASE . . CLIENT_RELEASED gone .
    OPENING_CLIENT_RELEASE  . . . . OPENING_CLIENT_RELEASE CLOSING_CLIENT_RELEASE CLIENT_RELEASED . gone .
"""
# Columns: completed, refused, device accepted, device refused, teardown, torn down, channel released,
# revoked, then completed and torn down without a device.
GPADLS = """
    IN_PROGRESS           OFFERED gone . . . . gone IN_PROGRESS ACCEPTED .
    OFFERED               . . ACCEPTED gone . . OFFERED_TEARING_DOWN gone ACCEPTED .
    ACCEPTED              . . . . TEARING_DOWN . TEARING_DOWN ACCEPTED . gone
    TEARING_DOWN          . . . . . gone TEARING_DOWN gone . .
    OFFERED_TEARING_DOWN  . . TEARING_DOWN gone . . OFFERED_TEARING_DOWN gone . .
"""


def rows(text: str) -> dict[str, list[str]]:
    """Read a table of next states."""
    return {words[0]: words[1:] for words in map(str.split, text.strip().splitlines())}


@pytest.mark.parametrize(
    ("text", "transitions", "states", "events"),
    [(CHANNELS, TRANSITIONS, S, E), (GPADLS, GPADL_TRANSITIONS, GpadlState, GpadlEvent)],
    ids=["channel", "gpadl"],
)
def test_every_edge_is_meant(
    text: str,
    transitions: Mapping[IntEnum, Mapping[IntEnum, IntEnum | None]],
    states: type[IntEnum],
    events: type[IntEnum],
) -> None:
    """Each event in each state leads where this test says, or nowhere."""
    expected = rows(text)

    assert set(expected) == {state.name for state in states}
    for state, (column, event) in product(states, enumerate(events)):
        if event not in transitions[state]:
            found = "."
        else:
            after = transitions[state][event]
            found = "gone" if after is None else after.name
        assert found == expected[state.name][column], (state, event)


def test_an_event_out_of_place_is_named() -> None:
    """A refusal says which event met which state."""
    with pytest.raises(ProtocolViolation) as channel:
        advance(S.OPEN, E.OPEN_REQUESTED)
    with pytest.raises(ProtocolViolation) as gpadl:
        advance_gpadl(GpadlState.OFFERED, GpadlEvent.TEARDOWN_REQUESTED)

    assert channel.value.rule == "open-requested-while-open"
    assert gpadl.value.rule == "gpadl-teardown-requested-while-offered"


def bring_to(state: ChannelState) -> tuple[World, int]:
    """Return a world whose only channel (relid 1, if any) is in `state`, and its device's key."""
    world = World(quick=False)
    (key,) = world.boot()
    if state in REVOKED_STATES:
        world.revoke(key)
        if state is S.REOFFERED:
            key = world.offer()
        return world, key
    if state is S.CLIENT_RELEASED:
        world.release()
        return world, key
    world.lend()
    world.answer(MapGpadl)
    steps: dict[ChannelState, list[Callable[[], None]]] = {}
    opening = [lambda: world.post(open_channel())]
    is_open = [*opening, lambda: world.answer(OpenDevice)]
    closing = [*is_open, lambda: world.post(CloseChannel(1))]
    steps[S.CLOSED] = []
    steps[S.OPENING] = opening
    steps[S.OPEN] = is_open
    steps[S.CLOSING] = closing
    steps[S.CLOSING_REOPEN] = [*closing, lambda: world.post(open_channel())]
    steps[S.CLOSING_CLIENT_RELEASE] = [*closing, world.release]
    steps[S.OPENING_CLIENT_RELEASE] = [*opening, lambda: world.post(Unload())]
    for step in steps[state]:
        step()
    return world, key


def happen(world: World, key: int, event: ChannelEvent) -> None:
    """Let the outside do what this event stands for."""
    server = world.server
    match event:
        case E.OFFER_SENT:
            world.post(RequestOffers())
        case E.OPEN_REQUESTED:
            world.post(open_channel())
        case E.CLOSE_REQUESTED:
            world.post(CloseChannel(1))
        case E.RELID_RELEASED:
            world.post(RelidReleased(1))
        case E.DISCONNECTED:
            world.post(Unload())
        case E.DEVICE_OPENED:
            server.device_opened(key)
        case E.DEVICE_REFUSED:
            server.device_refused(key)
        case E.DEVICE_CLOSED:
            server.device_closed(key)
        case E.OFFER_REVOKED:
            server.revoke(key)
        case E.OFFERED_AGAIN:
            server.offer(key + 1000, parameters())


def state_of(world: World) -> str:
    """Return the state of the only channel, or that it is gone."""
    channels = world.server.channels()
    return ChannelState(channels[0].state).name if channels else "gone"


@pytest.mark.parametrize("state", list(ChannelState), ids=lambda state: state.name)
def test_every_state_is_reached(state: ChannelState) -> None:
    """There is a way into each of the ten states."""
    world, _key = bring_to(state)

    assert state_of(world) == state.name


@pytest.mark.parametrize(("state", "event"), list(product(ChannelState, ChannelEvent)), ids=lambda value: value.name)
def test_server_follows_the_table(state: ChannelState, event: ChannelEvent) -> None:
    """Whatever happens in whatever state, the server goes where the table says, or stays."""
    world, key = bring_to(state)
    legal = event in TRANSITIONS[state]
    # A guest asks for offers once a connection, so a channel is offered again only to the next one.
    if state is S.CLIENT_RELEASED and event is E.OFFER_SENT:
        world.post(Unload())
        world.connect()
    world.forget()

    happen(world, key, event)

    after = TRANSITIONS[state][event] if legal else state
    assert state_of(world) == ("gone" if after is None else after.name)


@pytest.mark.parametrize("state", sorted(set(ChannelState) - CLIENT_RELEASE_STATES - {S.CLIENT_RELEASED}))
def test_unload_is_answered_from_every_state(state: ChannelState) -> None:
    """UNLOAD is answered once the devices have closed, and nothing is left in use (the ledger looks)."""
    world, _key = bring_to(state)
    world.forget()

    world.post(Unload())
    while world.waiting:
        world.answer(type(world.waiting[0]))

    assert [message.TYPE.name for message in world.sent()] == ["UNLOAD_RESPONSE"]
    assert world.server.summary().gpadls == 0


@pytest.mark.parametrize("state", sorted(set(ChannelState) - {S.REVOKED}))
def test_revoke_is_told_once_from_every_state(state: ChannelState) -> None:
    """A device may go at any moment: its guest gets one RESCIND, if it holds a relid that had none."""
    world, key = bring_to(state)
    held = world.server.summary().offers
    world.forget()

    world.revoke(key)

    told = [message for message in world.sent() if isinstance(message, RescindChannelOffer)]
    assert told == ([RescindChannelOffer(1)] if held and state is not S.REOFFERED else [])
    assert not world.server.has_device(key)
