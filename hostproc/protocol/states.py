"""The host's two state machines as tables: a channel's ten states, and a GPADL's five.

A pair that is not in a table does not happen by our doing, so it is the peer's fault: `advance` refuses it
and nothing has changed. `None` as the next state says that the record is deleted.

A channel is *held* while the guest owns its relid; in CLIENT_RELEASED and the two ..._CLIENT_RELEASE it is
not.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Final

from emu.errors import ProtocolViolation


class ChannelState(IntEnum):
    """Where the host is with a channel."""

    CLIENT_RELEASED = 0
    """The device is there; the guest has no relid for it."""
    CLOSED = 1
    """Offered."""
    OPENING = 2
    """The device is opening."""
    OPEN = 3
    CLOSING = 4
    """The device is closing."""
    CLOSING_REOPEN = 5
    """The device is closing; the guest already asked to open again."""
    REVOKED = 6
    """The device is gone, RESCIND was sent, the guest still holds the relid."""
    REOFFERED = 7
    """The device came back; its offer waits until the guest lets go of the relid."""
    CLOSING_CLIENT_RELEASE = 8
    """The guest let go while the device was closing."""
    OPENING_CLIENT_RELEASE = 9
    """The guest went away while the device was opening."""


class ChannelEvent(IntEnum):
    """What may happen to a channel: by the guest, by its device, by whoever adds and removes devices."""

    OFFER_SENT = 0
    OPEN_REQUESTED = 1
    CLOSE_REQUESTED = 2
    RELID_RELEASED = 3
    DISCONNECTED = 4
    """UNLOAD, a new INITIATE_CONTACT, or the partition's reset."""
    DEVICE_OPENED = 5
    DEVICE_REFUSED = 6
    DEVICE_CLOSED = 7
    OFFER_REVOKED = 8
    OFFERED_AGAIN = 9


class GpadlState(IntEnum):
    """Where the host is with a GPADL."""

    IN_PROGRESS = 0
    """More GPADL_BODY messages must come."""
    OFFERED = 1
    """The device decides."""
    ACCEPTED = 2
    TEARING_DOWN = 3
    """The device gives it up."""
    OFFERED_TEARING_DOWN = 4
    """The guest let go of the channel while the device decided."""


class GpadlEvent(IntEnum):
    """What may happen to a GPADL; the last four come with its channel."""

    COMPLETED = 0
    REFUSED = 1
    """It became whole, and is malformed or against the host's policy."""
    DEVICE_ACCEPTED = 2
    DEVICE_REFUSED = 3
    TEARDOWN_REQUESTED = 4
    DEVICE_TORN_DOWN = 5
    CHANNEL_RELEASED = 6
    """The guest gave up the relid, or the connection."""
    CHANNEL_REVOKED = 7
    """The device is gone."""
    COMPLETED_WITHOUT_DEVICE = 8
    """It is whole on a revoked channel, whose device did not decide; the host takes it all the same."""
    TEARDOWN_WITHOUT_DEVICE = 9
    """The guest tears down on a revoked channel."""


S = ChannelState
E = ChannelEvent

TRANSITIONS: Final[Mapping[ChannelState, Mapping[ChannelEvent, ChannelState | None]]] = {
    S.CLIENT_RELEASED: {
        E.OFFER_SENT: S.CLOSED,
        E.DISCONNECTED: S.CLIENT_RELEASED,
        # The guest has nothing to let go of, so no RESCIND and no waiting.
        E.OFFER_REVOKED: None,
    },
    S.CLOSED: {
        E.OPEN_REQUESTED: S.OPENING,
        E.RELID_RELEASED: S.CLIENT_RELEASED,
        E.DISCONNECTED: S.CLIENT_RELEASED,
        E.OFFER_REVOKED: S.REVOKED,
    },
    S.OPENING: {
        E.DEVICE_OPENED: S.OPEN,
        E.DEVICE_REFUSED: S.CLOSED,
        # Only the device's answer says when it stopped looking at the ring.
        E.DISCONNECTED: S.OPENING_CLIENT_RELEASE,
        E.OFFER_REVOKED: S.REVOKED,
    },
    S.OPEN: {
        E.CLOSE_REQUESTED: S.CLOSING,
        E.DISCONNECTED: S.CLOSING_CLIENT_RELEASE,
        E.OFFER_REVOKED: S.REVOKED,
    },
    S.CLOSING: {
        E.DEVICE_CLOSED: S.CLOSED,
        # CLOSECHANNEL has no reply: the guest cannot know that the device still closes, so it may open again.
        E.OPEN_REQUESTED: S.CLOSING_REOPEN,
        E.RELID_RELEASED: S.CLOSING_CLIENT_RELEASE,
        E.DISCONNECTED: S.CLOSING_CLIENT_RELEASE,
        E.OFFER_REVOKED: S.REVOKED,
    },
    S.CLOSING_REOPEN: {
        E.DEVICE_CLOSED: S.OPENING,
        E.DISCONNECTED: S.CLOSING_CLIENT_RELEASE,
        E.OFFER_REVOKED: S.REVOKED,
    },
    S.REVOKED: {
        # OPEN and CLOSE may cross our RESCIND on its way, so they are no violation here, nor in REOFFERED.
        E.OPEN_REQUESTED: S.REVOKED,
        E.CLOSE_REQUESTED: S.REVOKED,
        E.RELID_RELEASED: None,
        E.DISCONNECTED: None,
        E.OFFERED_AGAIN: S.REOFFERED,
    },
    S.REOFFERED: {
        E.OPEN_REQUESTED: S.REOFFERED,
        E.CLOSE_REQUESTED: S.REOFFERED,
        # The new offer goes out at once, under the same relid.
        E.RELID_RELEASED: S.CLOSED,
        E.DISCONNECTED: S.CLIENT_RELEASED,
        # The guest still owes the answer to the first RESCIND, so no second one is sent.
        E.OFFER_REVOKED: S.REVOKED,
    },
    S.CLOSING_CLIENT_RELEASE: {
        E.DEVICE_CLOSED: S.CLIENT_RELEASED,
        E.DISCONNECTED: S.CLOSING_CLIENT_RELEASE,
        E.OFFER_REVOKED: None,
    },
    S.OPENING_CLIENT_RELEASE: {
        # Nobody wants it open any more: it is closed again as soon as it is open.
        E.DEVICE_OPENED: S.CLOSING_CLIENT_RELEASE,
        E.DEVICE_REFUSED: S.CLIENT_RELEASED,
        E.DISCONNECTED: S.OPENING_CLIENT_RELEASE,
        E.OFFER_REVOKED: None,
    },
}

REVOKED_STATES: Final = frozenset({S.REVOKED, S.REOFFERED})
"""The guest holds a relid behind which there is no device."""
CLIENT_RELEASE_STATES: Final = frozenset({S.CLOSING_CLIENT_RELEASE, S.OPENING_CLIENT_RELEASE})
"""The guest let go, the device is not done yet: what a disconnect waits for."""

G = GpadlState
V = GpadlEvent

GPADL_TRANSITIONS: Final[Mapping[GpadlState, Mapping[GpadlEvent, GpadlState | None]]] = {
    G.IN_PROGRESS: {
        V.COMPLETED: G.OFFERED,
        V.COMPLETED_WITHOUT_DEVICE: G.ACCEPTED,
        V.REFUSED: None,
        V.CHANNEL_RELEASED: None,
        # The guest goes on posting bodies until it sees the RESCIND; it is answered when they are all there.
        V.CHANNEL_REVOKED: G.IN_PROGRESS,
    },
    G.OFFERED: {
        V.DEVICE_ACCEPTED: G.ACCEPTED,
        V.DEVICE_REFUSED: None,
        V.CHANNEL_RELEASED: G.OFFERED_TEARING_DOWN,
        V.CHANNEL_REVOKED: None,
        V.COMPLETED_WITHOUT_DEVICE: G.ACCEPTED,
    },
    G.ACCEPTED: {
        V.TEARDOWN_REQUESTED: G.TEARING_DOWN,
        V.TEARDOWN_WITHOUT_DEVICE: None,
        V.CHANNEL_RELEASED: G.TEARING_DOWN,
        # The device's mapping is gone, the handle stays taken: the guest may still tear it down and be
        # answered.
        V.CHANNEL_REVOKED: G.ACCEPTED,
    },
    G.TEARING_DOWN: {
        V.DEVICE_TORN_DOWN: None,
        V.CHANNEL_RELEASED: G.TEARING_DOWN,
        V.CHANNEL_REVOKED: None,
    },
    G.OFFERED_TEARING_DOWN: {
        V.DEVICE_ACCEPTED: G.TEARING_DOWN,
        V.DEVICE_REFUSED: None,
        V.CHANNEL_RELEASED: G.OFFERED_TEARING_DOWN,
        V.CHANNEL_REVOKED: None,
    },
}


def advance(state: ChannelState, event: ChannelEvent) -> ChannelState | None:
    """Return the state that `event` leads to; or ProtocolViolation, `open-requested-while-open` say."""
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise _out_of_place(event, state, "channel") from None


def advance_gpadl(state: GpadlState, event: GpadlEvent) -> GpadlState | None:
    """Return the state that `event` leads to; or ProtocolViolation, `gpadl-completed-while-offered` say."""
    try:
        return GPADL_TRANSITIONS[state][event]
    except KeyError:
        raise _out_of_place(event, state, "gpadl") from None


_MESSAGES: Final = {
    "OPEN_REQUESTED": "OPENCHANNEL",
    "CLOSE_REQUESTED": "CLOSECHANNEL",
    "TEARDOWN_REQUESTED": "GPADL_TEARDOWN",
}
"""What a guest calls its part of the events."""


def _out_of_place(event: IntEnum, state: IntEnum, what: str) -> ProtocolViolation:
    prefix = "gpadl-" if what == "gpadl" else ""
    rule = f"{prefix}{event.name}-while-{state.name}".lower().replace("_", "-")
    name = _MESSAGES.get(event.name, event.name)
    return ProtocolViolation(f"{name} while the {what} is {state.name}", rule=rule, field="state", value=state.name)


def named(violation: ProtocolViolation, what: str) -> ProtocolViolation:
    """The same, said of `what`: the tables know no numbers."""
    text = f"{what}: {violation}"
    return ProtocolViolation(text, rule=violation.rule, field=violation.field, value=violation.value)
