"""hv_sock connects that a guest asked for: each ends in the offer of a channel, or in a refusal.

A channel for a socket has the service as its class and the guest's endpoint as its instance. A guest older
than TL_CONNECT_RESULT (4.1) is not told of a refusal; its connect ends by its own time-out.
"""

from __future__ import annotations

from uuid import UUID

from emu.wire.messages import STATUS_CONNECTION_REFUSED, ChannelFlags, TlConnectRequest, TlConnectResult
from hostproc.protocol.effects import ConnectSocket
from hostproc.protocol.offers import OfferParameters
from hostproc.protocol.session import Session


class Sockets:
    """The requests that wait for an answer, as many as the limits allow."""

    __slots__ = ("_session", "_waiting")

    def __init__(self, session: Session) -> None:
        self._session = session
        self._waiting: set[tuple[UUID, UUID]] = set()

    def request(self, message: TlConnectRequest) -> None:
        """A guest's socket wants to connect."""
        request = message.guest_endpoint_id, message.host_service_id
        if request in self._waiting:
            text = f"TL_CONNECT_REQUEST of {request[0]} to {request[1]}, which waits already"
            self._session.refuse("socket-request-twice", text, "guest_endpoint_id", str(request[0]))
            return
        if len(self._waiting) >= self._session.limits.socket_requests:
            text = f"TL_CONNECT_REQUEST while {len(self._waiting)} wait"
            self._session.refuse("socket-requests", text, "guest_endpoint_id", str(request[0]))
            self._session.send(TlConnectResult(*request, STATUS_CONNECTION_REFUSED))
            return
        self._waiting.add(request)
        silo_id = message.silo_id if self._session.version.silo_id else None
        self._session.emit(ConnectSocket(*request, silo_id))

    def connected(self, parameters: OfferParameters) -> None:
        """A channel is offered; if a request waited for it, it does no longer."""
        if parameters.chn_flags & ChannelFlags.TLNPI_PROVIDER_OFFER:
            self._waiting.discard((parameters.if_instance, parameters.if_type))

    def refuse(self, endpoint_id: UUID, service_id: UUID, status: int) -> None:
        """Nobody answers this request. It was a legal one, so it counts as ignored."""
        if (endpoint_id, service_id) in self._waiting:
            self._waiting.discard((endpoint_id, service_id))
            text = f"TL_CONNECT_REQUEST of {endpoint_id} to {service_id}, where nobody listens: status {status:#x}"
            self._session.ignore("socket-service", text, "host_service_id", str(service_id))
            self._session.send(TlConnectResult(endpoint_id, service_id, status))

    def clear(self) -> None:
        """The guest is gone."""
        self._waiting.clear()
