"""The VMBus server of one partition: logic without I/O.

In go a guest's messages, what its devices answer, and which devices come and go; out come effects, in the
order in which they are to be carried out. Nothing a guest sends raises an exception: what is not legal is
answered as the protocol says, and recorded as `Refused`. The server grows with the devices that its owner
offers and, within `Limits`, with the GPADLs of the guest; nothing else of a guest's is remembered.

    DISCONNECTED ── INITIATE_CONTACT ──► CONNECTED ── UNLOAD, INITIATE_CONTACT, reset ──► DISCONNECTING
          ▲                                                                                     │
          └────────── every device closed, every GPADL given back; UNLOAD_RESPONSE ────────────┘
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final
from uuid import UUID

from emu.errors import ProtocolViolation
from emu.host_tables import HostGpadl
from emu.mirror import MirrorChannel
from emu.values import valueclass
from emu.wire.messages import (
    MESSAGES,
    STATUS_CONNECTION_REFUSED,
    AllOffersDelivered,
    CloseChannel,
    CloseReservedChannel,
    ConnectionState,
    Direction,
    GpadlBody,
    GpadlHeader,
    GpadlTeardown,
    InitiateContact,
    Message,
    ModifyChannel,
    ModifyConnection,
    ModifyConnectionResponse,
    OpenChannel,
    OpenReservedChannel,
    Pause,
    PauseResponse,
    RelidReleased,
    RequestOffers,
    RescindChannelOffer,
    Resume,
    TlConnectRequest,
    Unload,
    parse,
)
from emu.wire.versions import FeatureFlags
from hostproc.protocol.channel_table import ChannelTable
from hostproc.protocol.channels import Channels
from hostproc.protocol.departure import Departure
from hostproc.protocol.effects import (
    Connected,
    Disconnected,
    Effect,
    MonitorPages,
    SendMessage,
)
from hostproc.protocol.gpadls import Gpadls
from hostproc.protocol.offers import LAST_RELID, Identity, OfferParameters
from hostproc.protocol.policy import DEFAULT_POLICY, Policy
from hostproc.protocol.session import Link, Session, StateWatcher
from hostproc.protocol.sockets import Sockets
from hostproc.protocol.states import REVOKED_STATES, ChannelState
from hostproc.protocol.versions import (
    FAILED,
    MULTICLIENT_CONNECTION_ID,
    VERSIONS,
    Limits,
    Verdict,
    elsewhere,
    granted_features,
    judge,
    monitor_pages_fault,
)

_FROM_GUEST: Final = frozenset(s.cls for s in MESSAGES.values() if s.direction is Direction.GUEST_TO_HOST)
_WHILE_PAUSED: Final = (Resume, Unload, InitiateContact)


@valueclass()
class ServerSummary:
    """The server in numbers; `version` is 0 while nobody is connected, `offers` are relids in use."""

    link: Link
    version: int
    features: FeatureFlags
    vp_index: int
    offers: int
    open_channels: int
    gpadls: int
    gpadl_pages: int
    gpadls_in_progress: int


class Server:
    """One partition's server. Every public method but the looking ones returns the effects of one input."""

    def __init__(self, limits: Limits, policy: Policy = DEFAULT_POLICY) -> None:
        self.limits = limits
        self._session = Session(limits, policy)
        self._table = ChannelTable(self._session)
        self._gpadls = Gpadls(self._session, self._table)
        self._channels = Channels(self._session, self._table, self._gpadls)
        self._sockets = Sockets(self._session)
        # What ended the connection: an UNLOAD that wants an answer, or the contact that comes next.
        self._departure = Departure(self._session)
        self._next_contact: InitiateContact | None = None

    def watch(self, watcher: StateWatcher) -> None:
        """Tell `watcher` of every change of a channel's or GPADL's state from now on."""
        self._session.watcher = watcher

    # -- from the guest ---------------------------------------------------------------------------

    def receive(self, payload: bytes, *, connection_id: int) -> list[Effect]:
        """Take a message that the guest posted on message connection `connection_id`. Never raises."""
        try:
            self._receive(payload, connection_id)
        except ProtocolViolation as violation:
            self._session.refuse_violation(violation)
        return self._settle()

    def reset(self) -> list[Effect]:
        """The guest is gone without a word: disconnect, and answer nobody."""
        return self._act(self._reset)

    # -- from the owner of the devices --------------------------------------------------------------

    def offer(self, key: int, parameters: OfferParameters) -> list[Effect]:
        """Offer a channel under `key`, a number never used before; nobody there has its identity."""
        return self._act(lambda: self._offer(key, parameters))

    def revoke(self, key: int) -> list[Effect]:
        """Take a device away, at any moment; DropDevice is among the effects."""
        return self._act(lambda: self._channels.revoke(key))

    def rescind_again(self, relid: int) -> list[Effect]:
        """Repeat the RESCIND of a relid that the guest has not given back."""
        assert self.holds(relid) and not self.key_of(relid), relid
        return self._act(lambda: self._session.send(RescindChannelOffer(relid)))

    # -- from the devices -----------------------------------------------------------------------------

    def device_opened(self, key: int) -> list[Effect]:
        """Answer OpenDevice: it is open."""
        return self._act(lambda: self._channels.device_opened(self._table.of_device(key)))

    def device_refused(self, key: int, status: int = FAILED) -> list[Effect]:
        """Answer OpenDevice: it is not; `status` (not 0) goes to the guest."""
        assert status != 0
        return self._act(lambda: self._channels.device_refused(self._table.of_device(key), status))

    def device_closed(self, key: int) -> list[Effect]:
        """Answer CloseDevice: it touches the rings no more."""
        return self._act(lambda: self._channels.device_closed(self._table.of_device(key)))

    def event_retargeted(self, key: int, *, done: bool = True) -> list[Effect]:
        """Answer RetargetEvent."""
        return self._act(lambda: self._channels.event_retargeted(self._table.of_device(key), done=done))

    def gpadl_accepted(self, key: int, gpadl: int) -> list[Effect]:
        """Answer MapGpadl: the pages can be used."""
        return self._act(lambda: self._gpadls.accepted(self._table.of_device(key), gpadl))

    def gpadl_refused(self, key: int, gpadl: int, status: int = FAILED) -> list[Effect]:
        """Answer MapGpadl: they cannot; `status` (not 0) goes to the guest."""
        assert status != 0
        return self._act(lambda: self._gpadls.refused(self._table.of_device(key), gpadl, status))

    def gpadl_torn_down(self, key: int, gpadl: int) -> list[Effect]:
        """Answer UnmapGpadl: nothing touches the pages any more."""
        return self._act(lambda: self._gpadls.torn_down(self._table.of_device(key), gpadl))

    def connect_refused(
        self, endpoint_id: UUID, service_id: UUID, status: int = STATUS_CONNECTION_REFUSED
    ) -> list[Effect]:
        """Answer ConnectSocket: nobody listens."""
        return self._act(lambda: self._sockets.refuse(endpoint_id, service_id, status))

    # -- looking --------------------------------------------------------------------------------------

    @property
    def link(self) -> Link:
        """Whether a guest is connected."""
        return self._session.link

    def offered(self, identity: Identity) -> bool:
        """Whether a device that is there has this identity already."""
        channel = self._table.of_identity(identity)
        return channel is not None and channel.state is not ChannelState.REVOKED

    def known(self, identity: Identity) -> bool:
        """Whether any channel has this identity, also one that is revoked and that the guest still holds."""
        return self._table.of_identity(identity) is not None

    def relid_of(self, key: int) -> int:
        """The relid of a device that is there; 0 while the guest has none for it."""
        return self._table.of_device(key).relid

    def key_of(self, relid: int) -> int:
        """The device that has this relid now; 0 if none has, or the one that had it is gone."""
        channel = self._table.of_relid(relid)
        return channel.key if channel is not None and self._table.has_device(channel.key) else 0

    @property
    def subchannel_room(self) -> int:
        """How many sub-channels the guest could be given now: the free relids, none before versions that have them."""
        return LAST_RELID - self._table.held_count if self._session.version.sub_channels else 0

    def holds(self, relid: int) -> bool:
        """Whether the guest was offered `relid` and has not released it."""
        return self._table.of_relid(relid) is not None

    def has_device(self, key: int) -> bool:
        """Whether device `key` is still there: a sub-channel may have gone with its primary."""
        return self._table.has_device(key)

    def generation(self, relid: int) -> int:
        """How often `relid` was offered: with it, the name of one life of the number."""
        return self._table.generation(relid)

    @property
    def open_channels(self) -> int:
        """How many channels are open."""
        return self._table.open_count

    def lives(self) -> tuple[int, int, int, int]:
        """How many relids were offered ever, were given back, are held now; and of these, how many are rescinded."""
        table = self._table
        rescinded = sum(channel.state in REVOKED_STATES for channel in table)
        return table.offer_count, table.release_count, table.held_count, rescinded

    def take_changed(self) -> dict[int, MirrorChannel | None]:
        """Return, by relid, the channels that changed since the last call; None: the relid is free."""
        return self._table.take_changed()

    def gpadls_of(self, relid: int) -> tuple[HostGpadl, ...]:
        """Say where the GPADLs of a channel are; none of a relid that is free."""
        channel = self._table.of_relid(relid)
        return () if channel is None else channel.gpadl_summaries()

    def channels(self) -> list[MirrorChannel]:
        """Say where every channel is; costs as much as there are channels."""
        return [channel.summary() for channel in self._table]

    def summary(self) -> ServerSummary:
        """Say where the connection is, and what there is of what; costs the same however much there is."""
        session = self._session
        return ServerSummary(
            link=session.link,
            version=0 if session.link is Link.DISCONNECTED else session.version.number,
            features=session.features,
            vp_index=session.vp_index,
            offers=self._table.held_count,
            open_channels=self._table.open_count,
            gpadls=self._gpadls.count,
            gpadl_pages=self._gpadls.pages,
            gpadls_in_progress=self._gpadls.in_progress,
        )

    def head(self) -> tuple[int, int, int, int]:
        """Say in numbers what the mirror begins with: version (0: none), relids in use, open channels, GPADLs."""
        session = self._session
        version = 0 if session.link is Link.DISCONNECTED else session.version.number
        return version, self._table.held_count, self._table.open_count, self._gpadls.count

    # -- messages -------------------------------------------------------------------------------------

    def _receive(self, payload: bytes, connection_id: int) -> None:
        message = parse(payload)
        if not self._legal(message):
            return
        if connection_id == MULTICLIENT_CONNECTION_ID and not isinstance(message, InitiateContact):
            # Real hosts take it too: which port a message came in on counts for a contact's SINT and VTL only.
            text = f"{message.TYPE.name} on connection 4, which is for INITIATE_CONTACT: the rest goes to connection 1"
            self._session.ignore("message-on-contact-connection", text, "connection_id", connection_id)
        match message:
            case InitiateContact():
                self._contact(message, connection_id)
            case RequestOffers():
                self._request_offers()
            case OpenChannel():
                self._channels.open(message)
            case CloseChannel():
                self._channels.close(message)
            case GpadlHeader():
                self._gpadls.header(message, self._table.of_relid(message.child_relid))
            case GpadlBody():
                self._gpadls.body(message)
            case GpadlTeardown():
                self._gpadls.teardown(message, self._table.of_relid(message.child_relid))
            case RelidReleased():
                self._channels.release(message)
            case ModifyChannel():
                self._channels.modify(message)
            case TlConnectRequest():
                self._sockets.request(message)
            case Unload():
                self._departure.begin()
                self._disconnect()
            case OpenReservedChannel() | CloseReservedChannel():
                self._refuse_reserved(message)
            case ModifyConnection():
                self._modify_connection(message)
            case Pause():
                self._session.send(PauseResponse())
                self._session.paused = True
            case Resume():
                self._session.resume()
            case _:
                raise AssertionError(message)

    def _legal(self, message: Message) -> bool:
        """Whether a guest may send this now, whatever is in it; what it may not send has no answer."""
        session = self._session
        kind = type(message)
        if session.link is Link.CONNECTED and not session.paused and kind in _FROM_GUEST and session.knows(kind):
            return True
        spec, name = MESSAGES[message.TYPE], message.TYPE.name
        if spec.direction is not Direction.GUEST_TO_HOST:
            session.refuse("wrong-direction", f"{name} is the host's to send", "msgtype", int(message.TYPE))
        elif spec.while_disconnected:
            return True
        elif not session.connected:
            if isinstance(message, RelidReleased):
                # After UNLOAD Linux lets go of every relid by name, although they are all forgotten already.
                text = f"{name} for {message.child_relid} while nobody is connected"
                session.ignore("released-while-disconnected", text, "child_relid", message.child_relid)
            else:
                session.refuse("not-connected", f"{name} while nobody is connected", "msgtype", int(message.TYPE))
                self._departure.answer(message)
        elif session.version.number < spec.least_version:
            text = f"{name} in version {session.version.text}"
            session.refuse("message-before-its-version", text, "msgtype", int(message.TYPE))
        elif spec.feature and spec.feature not in session.features:
            text = f"{name} without feature {spec.feature.name}"
            session.refuse("message-without-its-feature", text, "msgtype", int(message.TYPE))
        elif session.paused and not isinstance(message, _WHILE_PAUSED):
            session.refuse("message-while-paused", f"{name} between PAUSE and RESUME", "msgtype", int(message.TYPE))
        else:
            return True
        return False

    # -- the connection -------------------------------------------------------------------------------

    def _contact(self, contact: InitiateContact, connection_id: int) -> None:
        """Answer a first contact; a guest that is connected has been replaced, and is disconnected first."""
        verdict = elsewhere(contact, connection_id, self.limits)
        if verdict is not None:
            self._respond(verdict)
        elif self._session.link is Link.DISCONNECTED:
            self._connect(contact)
        else:
            self._next_contact = contact
            self._departure.forget()
            if self._session.connected:
                self._disconnect()

    def _connect(self, contact: InitiateContact) -> None:
        verdict = judge(contact, self.limits)
        if verdict.refused is None:
            self._departure.forget()
            version = VERSIONS[contact.vmbus_version_requested]
            features = granted_features(contact, self.limits)
            monitored = contact.monitor_page1 != 0
            self._session.connect(version, features, verdict.vp_index, monitored=monitored)
            self._session.emit(
                Connected(
                    version.number,
                    features,
                    verdict.vp_index,
                    0 if version.event_flags else contact.interrupt_page,
                    contact.monitor_page1,
                    contact.monitor_page2,
                )
            )
        self._respond(verdict)

    def _respond(self, verdict: Verdict) -> None:
        if verdict.refused is not None:
            self._session.emit(verdict.refused)
        self._session.emit(SendMessage(verdict.response, verdict.vp_index, verdict.sint))

    def _request_offers(self) -> None:
        session = self._session
        if session.offers_requested:
            session.refuse("offers-requested-twice", "a second REQUESTOFFERS on this connection", "msgtype", 3)
            return
        session.offers_requested = True
        self._channels.request_offers()
        session.send(AllOffersDelivered())

    def _disconnect(self) -> None:
        self._session.disconnecting()
        self._gpadls.note_incomplete()
        self._sockets.clear()
        self._channels.disconnect()

    def _reset(self) -> None:
        self._departure.forget()
        self._next_contact = None
        if self._session.connected:
            self._disconnect()

    def _end_disconnecting(self) -> None:
        """Nothing of the guest's is in use any more: say so to whoever waits for it."""
        self._session.disconnected()
        contact, self._next_contact = self._next_contact, None
        self._session.emit(Disconnected(replaced=contact is not None))
        self._departure.end()
        if contact is not None:
            self._connect(contact)

    # -- the rest -------------------------------------------------------------------------------------

    def _offer(self, key: int, parameters: OfferParameters) -> None:
        self._sockets.connected(parameters)
        self._channels.offer(key, parameters)

    def _refuse_reserved(self, message: OpenReservedChannel | CloseReservedChannel) -> None:
        """No channel of ours is reserved: such are for firmware, which keeps them while guests change."""
        text = f"{message.TYPE.name} for channel {message.child_relid}, which is not reserved"
        self._session.refuse("channel-not-reserved", text, "child_relid", message.child_relid)

    def _modify_connection(self, message: ModifyConnection) -> None:
        page1, page2 = message.parent_to_child_monitor_page_gpa, message.child_to_parent_monitor_page_gpa
        fault = monitor_pages_fault(page1, page2, self.limits)
        if fault is not None:
            rule, field, value = fault
            self._session.refuse(rule, f"MODIFY_CONNECTION with {field} {value:#x}", field, value)
            self._session.send(ModifyConnectionResponse(ConnectionState.FAILED_UNKNOWN_FAILURE))
            return
        self._session.monitored = page1 != 0
        self._session.emit(MonitorPages(page1, page2))
        self._session.send(ModifyConnectionResponse(ConnectionState.SUCCESSFUL))

    def _act(self, action: Callable[[], None]) -> list[Effect]:
        """Do one thing, and what becomes possible by it."""
        try:
            action()
        except ProtocolViolation as violation:
            self._session.refuse_violation(violation)
        return self._settle()

    def _settle(self) -> list[Effect]:
        """What becomes possible by what was done; then the decisions of both."""
        if self._session.link is Link.DISCONNECTING and not self._table.releasing and not self._gpadls.count:
            self._end_disconnecting()
        return self._session.take_effects()
