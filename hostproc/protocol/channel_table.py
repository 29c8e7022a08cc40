"""The records of all channels, and the numbers that the guest knows them by.

A relid goes to the guest with an offer, the lowest free one first, and comes back with RELID_RELEASED or at
the end of the connection, never earlier. Nothing here costs more because there are more channels, but what
says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from uuid import UUID

from emu.errors import ProtocolViolation
from emu.mirror import MirrorChannel
from emu.wire.messages import NO_MONITOR
from hostproc.protocol.numbers import LowestFree
from hostproc.protocol.offers import (
    FIRST_RELID,
    LAST_MONITOR_ID,
    LAST_RELID,
    Channel,
    Identity,
    OfferParameters,
    offer_message,
)
from hostproc.protocol.session import Session
from hostproc.protocol.states import CLIENT_RELEASE_STATES, ChannelEvent, ChannelState, advance, named


class ChannelTable:
    """The channels, found by device, by relid, and by what they are."""

    __slots__ = (
        "_by_identity",
        "_by_key",
        "_by_relid",
        "_changed",
        "_generations",
        "_monitor_ids",
        "_relids",
        "_session",
        "_subchannels",
        "offer_count",
        "open_count",
        "release_count",
        "releasing",
    )

    def __init__(self, session: Session) -> None:
        self._session = session
        self._by_key: dict[int, Channel] = {}
        self._by_relid: dict[int, Channel] = {}
        self._by_identity: dict[Identity, Channel] = {}
        self._subchannels: dict[tuple[UUID, UUID], dict[int, Channel]] = {}
        self._relids = LowestFree(FIRST_RELID, LAST_RELID)
        self._monitor_ids = LowestFree(0, LAST_MONITOR_ID)
        self._generations = [0] * (LAST_RELID + 1)
        self._changed: dict[int, Channel | None] = {}
        self.offer_count = 0  # OFFERs ever sent
        self.release_count = 0  # RELID_RELEASEDs that gave a relid back
        self.open_count = 0
        self.releasing = 0  # how many have no guest any more, and a device that is not done

    # -- looking ----------------------------------------------------------------------------------

    def of_relid(self, relid: int) -> Channel | None:
        """Return the channel that the guest calls `relid`."""
        return self._by_relid.get(relid)

    def of_device(self, key: int) -> Channel:
        """Return the channel of a device that is there; else ProtocolViolation (`late-device-answer`)."""
        channel = self._by_key.get(key)
        if channel is None:
            text = f"an answer of device {key}, which is gone"
            raise ProtocolViolation(text, rule="late-device-answer", field="key", value=key)
        return channel

    def has_device(self, key: int) -> bool:
        """Whether device `key` is still there."""
        return key in self._by_key

    def of_identity(self, identity: Identity) -> Channel | None:
        """Return the channel of this class, instance and index."""
        return self._by_identity.get(identity)

    def generation(self, relid: int) -> int:
        """How often a relid was offered."""
        return self._generations[relid]

    @property
    def held_count(self) -> int:
        """How many relids the guest holds."""
        return len(self._by_relid)

    def subchannels(self, primary: Channel) -> list[Channel]:
        """Return the sub-channels of the same device."""
        return list(self._subchannels.get(primary.device, {}).values())

    def __iter__(self) -> Iterator[Channel]:
        """All of them, in the order of their appearance; the table may change meanwhile."""
        return iter(list(self._by_identity.values()))

    def take_changed(self) -> dict[int, MirrorChannel | None]:
        """Return, by relid, what changed since the last call; None: the relid is free."""
        changed, self._changed = self._changed, {}
        return {relid: channel.summary() if channel else None for relid, channel in changed.items()}

    # -- changing -----------------------------------------------------------------------------------

    def advance(self, channel: Channel, event: ChannelEvent) -> ChannelState | None:
        """Follow the table of states; None: remove the record. ProtocolViolation: nothing has changed."""
        before = channel.state
        try:
            state = advance(before, event)
        except ProtocolViolation as violation:
            raise named(violation, f"channel {channel.relid}") from None
        self.open_count -= before is ChannelState.OPEN
        self.releasing -= before in CLIENT_RELEASE_STATES
        if state is not None:
            channel.state = state
            self.open_count += state is ChannelState.OPEN
            self.releasing += state in CLIENT_RELEASE_STATES
        if self._session.watcher is not None:
            self._session.watcher.channel(channel.relid, channel.generation, before, state)
        self.changed(channel)
        return state

    def changed(self, channel: Channel) -> None:
        """Note that there is something new to say of a channel."""
        if channel.relid:
            self._changed[channel.relid] = channel

    def add(self, key: int, parameters: OfferParameters) -> Channel:
        """Take a new device in; one whose channel the guest still holds gets that channel's record."""
        assert key not in self._by_key, f"device {key} is offered already"
        channel = self._by_identity.get(parameters.identity)
        if channel is None:
            channel = Channel(key, parameters)
            self._by_identity[parameters.identity] = channel
            if parameters.sub_channel_index:
                siblings = self._subchannels.setdefault(channel.device, {})
                siblings[parameters.sub_channel_index] = channel
        else:
            self.advance(channel, ChannelEvent.OFFERED_AGAIN)
            channel.key = key
            channel.parameters = parameters
        self._by_key[key] = channel
        return channel

    def drop_device(self, channel: Channel) -> None:
        """The channel's device is gone; its record stays for as long as the guest holds the relid."""
        del self._by_key[channel.key]

    def remove(self, channel: Channel) -> None:
        """Forget a record; its device went before."""
        assert not channel.relid and not channel.gpadls and not channel.bound, channel
        del self._by_identity[channel.parameters.identity]
        if channel.parameters.sub_channel_index:
            siblings = self._subchannels[channel.device]
            del siblings[channel.parameters.sub_channel_index]
            if not siblings:
                del self._subchannels[channel.device]

    # -- numbers --------------------------------------------------------------------------------------

    def offer(self, channel: Channel) -> None:
        """Give the channel a relid and offer it, if this guest can have it."""
        parameters = channel.parameters
        if parameters.sub_channel_index and not self._session.version.sub_channels:
            return
        relid = self._relids.take()
        if relid is None:
            instance = str(parameters.if_instance)
            text = f"{LAST_RELID} channels are offered, {instance} is not"
            self._session.ignore("offer-without-relid", text, "if_instance", instance)
            return
        channel.relid = relid
        self._by_relid[relid] = channel
        if parameters.wants_monitor and self._session.monitored:
            monitorid = self._monitor_ids.take()
            channel.monitorid = NO_MONITOR if monitorid is None else monitorid
        self.advance(channel, ChannelEvent.OFFER_SENT)
        self.announce(channel)

    def announce(self, channel: Channel) -> None:
        """Send the offer of a channel that has its relid: the next generation of that number."""
        self.offer_count += 1
        self._generations[channel.relid] += 1
        channel.generation = self._generations[channel.relid]
        self._changed[channel.relid] = channel
        dedicated = self._session.version.dedicated_doorbell
        self._session.send(offer_message(channel, dedicated_doorbell=dedicated))

    def free_relid(self, channel: Channel) -> None:
        """The guest does not know this channel any more."""
        relid, channel.relid = channel.relid, 0
        del self._by_relid[relid]
        self._relids.give_back(relid)
        if channel.monitorid != NO_MONITOR:
            self._monitor_ids.give_back(channel.monitorid)
            channel.monitorid = NO_MONITOR
        self._changed[relid] = None
