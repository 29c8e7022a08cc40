"""What is offered: a device's channel as its owner describes it, and the server's record of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Final
from uuid import UUID

from emu.host_tables import HostGpadl
from emu.mirror import MirrorChannel
from emu.wire.messages import (
    MAX_USER_DEFINED_BYTES,
    NO_MONITOR,
    VP_INDEX_DISABLE_INTERRUPT,
    ChannelFlags,
    OfferChannel,
    OpenChannel,
)
from hostproc.protocol.gpadl_ranges import GpadlRecord
from hostproc.protocol.states import ChannelState

FIRST_RELID: Final = 1
LAST_RELID: Final = 2047
"""Flag 0 of an event-flag page is nobody's; 2,047 is its last."""
LAST_MONITOR_ID: Final = 127

_UNORDERED: Final = 0xFFFF_FFFF
_EVENT_CONNECTION: Final = 0x2000
"""SINT 2 << 12: the host's part of a channel's event connection id."""

Identity = tuple[int, int, int]
"""Class, instance and sub-channel index: what makes two offers the same channel. GUIDs as numbers: a UUID's own hash
and comparison are calls of Python code."""


def identity_of(if_type: UUID, if_instance: UUID, sub_channel_index: int = 0) -> Identity:
    """The identity of a channel, without an offer of it."""
    return if_type.int, if_instance.int, sub_channel_index


@dataclass(frozen=True)
class OfferParameters:
    """One channel to offer. `order` sorts devices of a class; `user_def` is filled up with zeros."""

    if_type: UUID
    if_instance: UUID
    sub_channel_index: int = 0
    chn_flags: int = 0
    mmio_megabytes: int = 0
    mmio_megabytes_optional: int = 0
    user_def: bytes = b""
    order: int | None = None
    wants_monitor: bool = False

    def __post_init__(self) -> None:
        assert 0 <= self.sub_channel_index < 1 << 16 and len(self.user_def) <= MAX_USER_DEFINED_BYTES

    @cached_property
    def identity(self) -> Identity:
        """What a later offer of the same channel has in common with this one."""
        return identity_of(self.if_type, self.if_instance, self.sub_channel_index)

    @property
    def transient(self) -> bool:
        """Whether it exists for this connection only: a sub-channel, or a socket's channel."""
        return self.sub_channel_index != 0 or bool(self.chn_flags & ChannelFlags.TLNPI_PROVIDER_OFFER)

    @property
    def sort_key(self) -> tuple[int, int, int, int]:
        """The order in which offers get their relids, so that they keep them over a guest's hibernation."""
        order = _UNORDERED if self.order is None else self.order
        return self.if_type.int, order, self.if_instance.int, self.sub_channel_index


@dataclass(slots=True, eq=False)
class Channel:
    """The server's record of one channel.

    `relid` is 0 while the guest has none. `ring_gpadl` is the GPADL whose pages the device may be using.
    `request` is the OPENCHANNEL that is carried out, or that waits for the device to have closed. `retarget`
    is the VP that a RetargetEvent is under way to, `retarget_next` the one after it.
    """

    key: int
    parameters: OfferParameters
    state: ChannelState = ChannelState.CLIENT_RELEASED
    relid: int = 0
    generation: int = 0
    monitorid: int = NO_MONITOR
    request: OpenChannel | None = None
    ring_gpadl: int | None = None
    doorbell: int | None = None
    bound: bool = False
    target_vp: int = VP_INDEX_DISABLE_INTERRUPT
    retarget: int | None = None
    retarget_next: int | None = None
    gpadls: dict[int, GpadlRecord] = field(default_factory=dict)

    @property
    def device(self) -> tuple[UUID, UUID]:
        """What a device's channels have in common."""
        return self.parameters.if_type, self.parameters.if_instance

    def summary(self) -> MirrorChannel:
        """Say where the channel is, as the host's mirror shows it."""
        parameters = self.parameters
        return MirrorChannel(
            relid=self.relid,
            state=int(self.state),
            generation=self.generation,
            sub_channel_index=parameters.sub_channel_index,
            ring_gpadl=self.ring_gpadl or 0,
            gpadl_count=len(self.gpadls),
            target_vp=self.target_vp,
            connection_id=self.doorbell or 0,
            flags=parameters.chn_flags,
            if_type=parameters.if_type,
            if_instance=parameters.if_instance,
        )

    def gpadl_summaries(self) -> tuple[HostGpadl, ...]:
        """Say where the channel's GPADLs are, as the host's tables show them."""
        return tuple(
            HostGpadl(
                self.relid, one.handle, int(one.state), one.most_pages, one.handle == self.ring_gpadl, one.page_runs
            )
            for one in self.gpadls.values()
        )


def event_connection_id(relid: int) -> int:
    """Return the connection on which the guest signals channel `relid`."""
    return relid | _EVENT_CONNECTION


def relid_of_event_connection(connection_id: int) -> int:
    """Return the channel that is signalled on a connection, 0 for one that is no channel's."""
    relid = connection_id ^ _EVENT_CONNECTION
    return relid if relid <= LAST_RELID else 0


def offer_message(channel: Channel, *, dedicated_doorbell: bool) -> OfferChannel:
    """Write the offer of a channel that has a relid; without dedicated doorbells its last fields are 0."""
    parameters = channel.parameters
    return OfferChannel(
        if_type=parameters.if_type,
        if_instance=parameters.if_instance,
        chn_flags=parameters.chn_flags,
        mmio_megabytes=parameters.mmio_megabytes,
        user_def=parameters.user_def,
        sub_channel_index=parameters.sub_channel_index,
        mmio_megabytes_optional=parameters.mmio_megabytes_optional,
        child_relid=channel.relid,
        monitorid=channel.monitorid,
        monitor_allocated=dedicated_doorbell and channel.monitorid != NO_MONITOR,
        is_dedicated_interrupt=dedicated_doorbell,
        connection_id=event_connection_id(channel.relid) if dedicated_doorbell else 0,
    )
