"""The life of channels: offer, open, close, retarget, revoke, release.

A channel has two owners who act without asking each other: the guest, which opens, closes and lets go of its
relid, and the device, which answers in its own time and may be gone at any moment. The state table says what
each may do when; here is what follows from it.
"""

from __future__ import annotations

from emu.errors import ProtocolViolation
from emu.wire.messages import (
    STATUS_SUCCESS,
    VP_INDEX_DISABLE_INTERRUPT,
    CloseChannel,
    MessageType,
    ModifyChannel,
    ModifyChannelResponse,
    OpenChannel,
    OpenChannelResult,
    RelidReleased,
    RescindChannelOffer,
)
from hostproc.protocol.channel_table import ChannelTable
from hostproc.protocol.effects import (
    BindEvent,
    CloseDevice,
    CloseDoorbell,
    DropDevice,
    OpenDevice,
    OpenDoorbell,
    RetargetEvent,
    UnbindEvent,
)
from hostproc.protocol.gpadls import Gpadls
from hostproc.protocol.offers import Channel, OfferParameters
from hostproc.protocol.openings import judge_opening
from hostproc.protocol.policy import Answer, Moment
from hostproc.protocol.session import Session
from hostproc.protocol.states import REVOKED_STATES, ChannelEvent, ChannelState
from hostproc.protocol.versions import FAILED, VMBUS_SINT

S = ChannelState
E = ChannelEvent

_Fault = tuple[str, str, int]
"""Rule, field, value."""


class Channels:
    """What guest, devices and their owner do with channels."""

    __slots__ = ("_doorbells", "_gpadls", "_session", "_table")

    def __init__(self, session: Session, table: ChannelTable, gpadls: Gpadls) -> None:
        self._session = session
        self._table = table
        self._gpadls = gpadls
        self._doorbells: dict[int, Channel] = {}

    # -- from the owner of the devices --------------------------------------------------------------

    def offer(self, key: int, parameters: OfferParameters) -> None:
        """Take a device in, and offer it if the guest has asked for offers."""
        channel = self._table.add(key, parameters)
        if self._session.offers_requested and channel.state is S.CLIENT_RELEASED:
            self._table.offer(channel)

    def revoke(self, key: int) -> None:
        """A device is gone; its sub-channels go first."""
        channel = self._table.of_device(key)
        self._revoke_subchannels(channel)
        self._revoke(channel)

    # -- from the device ----------------------------------------------------------------------------

    def device_opened(self, channel: Channel) -> None:
        """The device uses the rings."""
        if self._table.advance(channel, E.DEVICE_OPENED) is S.OPEN:
            self._send_open_result(channel, STATUS_SUCCESS)
        else:
            self._session.emit(CloseDevice(channel.key))

    def device_refused(self, channel: Channel, status: int) -> None:
        """The device will not open."""
        self._table.advance(channel, E.DEVICE_REFUSED)
        self._close_signals(channel)
        self._gpadls.ring_released(channel)
        self._send_open_result(channel, status)

    def device_closed(self, channel: Channel) -> None:
        """The device does not use the rings any more."""
        state = self._table.advance(channel, E.DEVICE_CLOSED)
        self._gpadls.ring_released(channel)
        if state is S.OPENING:
            self._begin_opening(channel)

    def event_retargeted(self, channel: Channel, *, done: bool) -> None:
        """The event is at its new VP, or cannot go there."""
        if channel.retarget is None:
            text = f"channel {channel.relid} was not being retargeted"
            raise ProtocolViolation(text, rule="late-retarget-answer", field="relid", value=channel.relid)
        if done:
            channel.target_vp = channel.retarget
        channel.retarget, channel.retarget_next = channel.retarget_next, None
        if channel.retarget is not None:
            self._session.emit(RetargetEvent(channel.key, channel.relid, channel.retarget))
        self._table.changed(channel)
        self._session.send(ModifyChannelResponse(channel.relid, STATUS_SUCCESS if done else FAILED))

    # -- from the guest -----------------------------------------------------------------------------

    def request_offers(self) -> None:
        """Offer everything there is, in the order that keeps relids stable."""
        waiting = [channel for channel in self._table if channel.state is S.CLIENT_RELEASED]
        waiting.sort(key=lambda channel: channel.parameters.sort_key)
        for channel in waiting:
            self._table.offer(channel)

    def open(self, message: OpenChannel) -> None:
        """Open a channel, now or once its device has closed."""
        channel = self._find(message.child_relid, "open-unknown-relid", "OPENCHANNEL")
        if channel is None:
            return
        state = self._table.advance(channel, E.OPEN_REQUESTED)
        if state in REVOKED_STATES:
            status = self._status_without_device(channel, MessageType.OPENCHANNEL, "open-on-revoked-channel")
            if status is not None:
                self._session.send(OpenChannelResult(channel.relid, message.openid, status))
            return
        channel.request = message
        if state is S.OPENING:
            self._begin_opening(channel)

    def close(self, message: CloseChannel) -> None:
        """Close a channel; a primary's sub-channels do not outlive it."""
        channel = self._find(message.child_relid, "close-unknown-relid", "CLOSECHANNEL")
        if channel is None:
            return
        if self._table.advance(channel, E.CLOSE_REQUESTED) in REVOKED_STATES:
            self._status_without_device(channel, MessageType.CLOSECHANNEL, "close-on-revoked-channel")
            return
        self._end_retarget(channel)
        self._close_signals(channel)
        self._session.emit(CloseDevice(channel.key))
        self._revoke_subchannels(channel)

    def release(self, message: RelidReleased) -> None:
        """Take a relid back; a device that came back meanwhile is offered under it at once."""
        channel = self._find(message.child_relid, "release-unknown-relid", "RELID_RELEASED")
        if channel is None:
            return
        revoked = channel.state in REVOKED_STATES
        state = self._table.advance(channel, E.RELID_RELEASED)
        self._table.release_count += 1
        if revoked:
            self._gpadls.forget(channel)
        else:
            self._gpadls.release(channel)
        if state is S.CLOSED:
            self._table.announce(channel)
            return
        self._table.free_relid(channel)
        if state is None:
            self._table.remove(channel)

    def modify(self, message: ModifyChannel) -> None:
        """Send a channel's interrupts to another VP."""
        channel = self._find(message.child_relid, "modify-unknown-relid", "MODIFYCHANNEL")
        if channel is None:
            self._session.send(ModifyChannelResponse(message.child_relid, FAILED))
            return
        if channel.state is not S.OPEN:
            rule = "modify-of-closed-channel"
            status = self._status_without_device(channel, MessageType.MODIFYCHANNEL, rule)
            if status is not None:
                self._session.send(ModifyChannelResponse(channel.relid, status))
            return
        fault = self._modify_fault(channel, message.target_vp)
        if fault is not None:
            rule, field, value = fault
            self._session.refuse(rule, f"MODIFYCHANNEL of {channel.relid}: {field} {value:#x}", field, value)
            self._session.send(ModifyChannelResponse(channel.relid, FAILED))
        elif channel.retarget is None:
            channel.retarget = message.target_vp
            self._session.emit(RetargetEvent(channel.key, channel.relid, message.target_vp))
        elif self._session.knows(ModifyChannelResponse):
            text = f"MODIFYCHANNEL of {channel.relid} before the last one was answered"
            self._session.refuse("modify-in-progress", text, "target_vp", message.target_vp)
        else:
            # Without answers a guest cannot know that one is under way; the last wish counts.
            channel.retarget_next = message.target_vp

    def disconnect(self) -> None:
        """The guest is gone: let go of everything in its name, drop what was there for it alone."""
        for channel in self._table:
            if channel.parameters.transient and channel.state is not S.REVOKED:
                self._revoke(channel)
        for channel in self._table:
            self._disconnect(channel)

    # -- inside: revoke and disconnect ----------------------------------------------------------------

    def _revoke_subchannels(self, channel: Channel) -> None:
        """Revoke the sub-channels of a primary; a sub-channel has none."""
        if channel.parameters.sub_channel_index:
            return
        for subchannel in self._table.subchannels(channel):
            if subchannel.state is not S.REVOKED:
                self._revoke(subchannel)

    def _revoke(self, channel: Channel) -> None:
        """Stop the device at once, answer what it left open, then tell the guest."""
        before = channel.state
        state = self._table.advance(channel, E.OFFER_REVOKED)
        self._close_signals(channel)
        # Before RESCIND: a guest that has seen it uses the pages for something else, without a teardown.
        self._session.emit(DropDevice(channel.key))
        self._table.drop_device(channel)
        self._end_retarget(channel, self._status_at_revoke(MessageType.MODIFYCHANNEL))
        self._gpadls.revoke(channel)
        if before in (S.OPENING, S.CLOSING_REOPEN):
            status = self._status_at_revoke(MessageType.OPENCHANNEL)
            if status is not None:
                self._send_open_result(channel, status)
        if state is None:
            self._gpadls.forget(channel)
            self._table.remove(channel)
        elif before is not S.REOFFERED:
            self._session.send(RescindChannelOffer(channel.relid))

    def _disconnect(self, channel: Channel) -> None:
        """Let go of one channel in the guest's name."""
        before = channel.state
        state = self._table.advance(channel, E.DISCONNECTED)
        self._close_signals(channel)
        channel.retarget = channel.retarget_next = None
        if channel.relid:
            self._table.free_relid(channel)
        if before in REVOKED_STATES:
            self._gpadls.forget(channel)
        else:
            self._gpadls.release(channel)
        if before is S.OPEN:
            self._session.emit(CloseDevice(channel.key))
        if state is None:
            self._table.remove(channel)

    # -- inside: open ---------------------------------------------------------------------------------

    def _begin_opening(self, channel: Channel) -> None:
        """Let the device open the rings that the guest named, or tell the guest what is wrong with them."""
        request = channel.request
        assert request is not None
        try:
            opening = judge_opening(channel, request, self._session, self._doorbells)
        except ProtocolViolation as violation:
            self._session.refuse_violation(violation)
            self._table.advance(channel, E.DEVICE_REFUSED)
            self._send_open_result(channel, FAILED)
            return
        emit, key, relid, target_vp = self._session.emit, channel.key, channel.relid, opening.target_vp
        channel.ring_gpadl = opening.ring_gpadl
        channel.doorbell = opening.connection_id
        self._doorbells[opening.connection_id] = channel
        if target_vp is not None:
            channel.bound = True
            channel.target_vp = target_vp
            emit(BindEvent(key, relid, target_vp, VMBUS_SINT, opening.event_flag, opening.shared_interrupt))
        emit(OpenDoorbell(key, opening.connection_id))
        emit(
            OpenDevice(
                key=key,
                relid=relid,
                sub_channel_index=channel.parameters.sub_channel_index,
                ring_gpadl=opening.ring_gpadl,
                ring_pages=opening.ring_pages,
                downstream_page_offset=opening.downstream_page_offset,
                target_vp=VP_INDEX_DISABLE_INTERRUPT if target_vp is None else target_vp,
                event_flag=opening.event_flag,
                userdata=opening.userdata,
            )
        )

    def _send_open_result(self, channel: Channel, status: int) -> None:
        """Answer the OPENCHANNEL that was carried out; nobody waits for it once the relid is gone."""
        request, channel.request = channel.request, None
        assert request is not None
        if channel.relid:
            self._session.send(OpenChannelResult(channel.relid, request.openid, status))

    def _close_signals(self, channel: Channel) -> None:
        """Neither end of a channel that is not open can signal the other."""
        if channel.bound:
            channel.bound = False
            channel.target_vp = VP_INDEX_DISABLE_INTERRUPT
            self._session.emit(UnbindEvent(channel.key))
        if channel.doorbell is not None:
            if self._doorbells.get(channel.doorbell) is channel:
                del self._doorbells[channel.doorbell]
            self._session.emit(CloseDoorbell(channel.key, channel.doorbell))
            channel.doorbell = None

    # -- inside: the rest -----------------------------------------------------------------------------

    def _modify_fault(self, channel: Channel, target_vp: int) -> _Fault | None:
        """Say why an open channel cannot be retargeted."""
        if not channel.bound:
            return "modify-without-interrupts", "child_relid", channel.relid
        if target_vp >= self._session.limits.vp_count:
            return "modify-target-vp", "target_vp", target_vp
        return None

    def _end_retarget(self, channel: Channel, status: int | None = FAILED) -> None:
        """Answer a MODIFYCHANNEL that will not be carried out; None: not at all."""
        if channel.retarget is not None:
            channel.retarget = channel.retarget_next = None
            if status is not None:
                self._session.send(ModifyChannelResponse(channel.relid, status))

    def _status_without_device(self, channel: Channel, message_type: MessageType, rule: str) -> int | None:
        """Look up how to answer for a channel that has no open device, and record it; None: not at all."""
        text = f"{message_type.name} for channel {channel.relid}, which is {channel.state.name}"
        self._session.ignore(rule, text, "child_relid", channel.relid)
        return _status(self._session.policy[message_type, channel.state])

    def _status_at_revoke(self, message_type: MessageType) -> int | None:
        """How to answer what was asked before the revoke; None: not at all."""
        return _status(self._session.policy[message_type, Moment.REVOKING])

    def _find(self, relid: int, rule: str, name: str) -> Channel | None:
        channel = self._table.of_relid(relid)
        if channel is None:
            text = f"{name} for channel {relid:#x}, which is not offered"
            self._session.refuse(rule, text, "child_relid", relid)
        return channel


def _status(answer: Answer) -> int | None:
    """What the guest is told; None: nothing."""
    match answer:
        case Answer.SILENT:
            return None
        case Answer.REFUSE:
            return FAILED
        case Answer.ACCEPT:
            return STATUS_SUCCESS
