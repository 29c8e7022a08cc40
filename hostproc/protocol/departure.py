"""A guest that has said UNLOAD: what it is owed, and what the policy tells it if it goes on talking.

An answer says that nothing of the guest's is in use any more, so while devices still close every answer waits behind
the UNLOAD_RESPONSE; a guest that asks for more than `MOST_OWED` meanwhile is told nothing about the rest. Nothing is
done for such a guest: it is answered, and that is all. The next INITIATE_CONTACT, or the partition's reset, ends it.
"""

from __future__ import annotations

from typing import Final

from emu.wire.messages import (
    STATUS_CONNECTION_REFUSED,
    STATUS_SUCCESS,
    AllOffersDelivered,
    ConnectionState,
    GpadlCreated,
    GpadlHeader,
    GpadlTeardown,
    GpadlTorndown,
    Message,
    ModifyChannel,
    ModifyChannelResponse,
    ModifyConnection,
    ModifyConnectionResponse,
    OpenChannel,
    OpenChannelResult,
    Pause,
    PauseResponse,
    RequestOffers,
    TlConnectRequest,
    TlConnectResult,
    Unload,
    UnloadResponse,
)
from hostproc.protocol.effects import SendMessage
from hostproc.protocol.policy import Answer, Moment
from hostproc.protocol.session import Link, Session
from hostproc.protocol.versions import FAILED, VMBUS_SINT

MOST_OWED: Final = 16
"""Answers that wait until the devices have closed; as many as a port has buffers."""


class Departure:
    """The one guest that is going or gone; who is connected is nobody's here."""

    __slots__ = ("_owed", "_session", "_unloaded")

    def __init__(self, session: Session) -> None:
        self._session = session
        self._unloaded = False
        self._owed: list[Message] = []

    def begin(self) -> None:
        """It says UNLOAD, which is answered at the end."""
        self._unloaded = True
        self._owed = [UnloadResponse()]

    def answer(self, message: Message) -> None:
        """Answer what comes afterwards, if the policy has an answer for it."""
        session = self._session
        if not self._unloaded or not session.knows(type(message)):
            return
        answer = session.policy.get((message.TYPE, Moment.UNLOADED), Answer.SILENT)
        reply = reply_to(message, answer)
        if reply is None:
            return
        if session.link is Link.DISCONNECTED:
            self._send(reply)
        elif len(self._owed) < MOST_OWED:
            self._owed.append(reply)

    def end(self) -> None:
        """Everything of its is given back: say so, in the order in which it asked."""
        for reply in self._owed:
            self._send(reply)
        self._owed.clear()

    def forget(self) -> None:
        """Another guest is there, or none: nobody is owed anything."""
        self._unloaded = False
        self._owed.clear()

    def _send(self, reply: Message) -> None:
        """Tell the guest where it was connected, in the version that it had."""
        if self._session.knows(type(reply)):
            self._session.emit(SendMessage(reply, self._session.vp_index, VMBUS_SINT))


def reply_to(message: Message, answer: Answer) -> Message | None:
    """The answer to a message for which nothing is done; None: none, or none that says this."""
    if answer is Answer.SILENT:
        return None
    accepted = answer is Answer.ACCEPT
    status = STATUS_SUCCESS if accepted else FAILED
    match message:
        case OpenChannel():
            return OpenChannelResult(message.child_relid, message.openid, status)
        case GpadlHeader():
            return GpadlCreated(message.child_relid, message.gpadl, status)
        case ModifyChannel():
            return ModifyChannelResponse(message.child_relid, status)
        case ModifyConnection():
            state = ConnectionState.SUCCESSFUL if accepted else ConnectionState.FAILED_UNKNOWN_FAILURE
            return ModifyConnectionResponse(state)
        case TlConnectRequest():
            # A connect that succeeds is answered by an offer, of which there are none for this guest.
            ids = message.guest_endpoint_id, message.host_service_id
            return None if accepted else TlConnectResult(*ids, STATUS_CONNECTION_REFUSED)
        # These say that it is done, and have no way to say that it is not.
        case GpadlTeardown():
            return GpadlTorndown(message.gpadl) if accepted else None
        case RequestOffers():
            return AllOffersDelivered() if accepted else None
        case Pause():
            return PauseResponse() if accepted else None
        case Unload():
            return UnloadResponse() if accepted else None
    return None
