"""Sub-channels on a whole bus: offered by a back end, revoked with their primary, offered again to who asks again."""

from __future__ import annotations

from uuid import UUID

from emu.ring import RingConsumer, RingProducer
from emu.wire.messages import (
    CloseChannel,
    GpadlTeardown,
    GpadlTorndown,
    Message,
    OfferChannel,
    OpenChannel,
    OpenChannelResult,
    RelidReleased,
    RescindChannelOffer,
    Unload,
    UnloadResponse,
    gpadl_messages,
)
from emu.wire.packets import COMPLETION_REQUESTED
from emu.wire.subchannel_request import ECHO_USERDATA, SubchannelStatus, pack_completion, pack_request
from hostproc.devices.echo import Echo
from hostproc.devices.table import new_backend, offer_of
from tests.hostproc.test_bus import HALF, RING, RING_PFN, Guest

PRIMARY = 1


class Asking(Guest):
    """A guest with one echo device of `most` sub-channels; its primary announces a request."""

    def __init__(self, most: int = 3, seed: int = 0) -> None:
        super().__init__(new_backend("echo", subchannels=most, seed=seed))
        self.offers = {offer.child_relid: offer for offer in self.boot() if isinstance(offer, OfferChannel)}

    def lend(self, relid: int) -> None:
        """A GPADL for the rings of a channel, initialised."""
        first = RING_PFN + 2 * HALF * (relid - 1)
        self.post(*gpadl_messages(relid, RING + relid, range(first, first + 2 * HALF)))
        for pfn in (first, first + HALF):
            self.ring(pfn).init()

    def ask(self, count: int = 3) -> list[OfferChannel]:
        """Open the primary and ask; the offers that come."""
        self.lend(PRIMARY)
        result = self.post(OpenChannel(PRIMARY, PRIMARY, RING + PRIMARY, 0, HALF, ECHO_USERDATA.ljust(120, b"\0")))
        assert result == [OpenChannelResult(PRIMARY, PRIMARY, 0)]
        self.out = RingProducer(self.ring(RING_PFN))
        self.inbound = RingConsumer(self.ring(RING_PFN + HALF))
        if self.out.write(pack_request(count), 5, COMPLETION_REQUESTED):
            self.doorbell()
        self.partition.run()
        self.completions = [packet[3][:12] for packet in self.inbound.drain()]
        return [message for message in self.sent() if isinstance(message, OfferChannel)]


def rescinds(messages: list[Message]) -> list[int]:
    """Relids of the RESCINDs among messages."""
    return [message.child_relid for message in messages if isinstance(message, RescindChannelOffer)]


def test_sub_channels_are_offered_like_their_primary() -> None:
    """Class and instance are the primary's, the index is their own, relids are the lowest free ones."""
    guest = Asking()

    offers = guest.ask()

    primary = guest.offers[PRIMARY]
    assert {(offer.if_type, offer.if_instance) for offer in offers} == {(primary.if_type, primary.if_instance)}
    assert sorted(offer.sub_channel_index for offer in offers) == [1, 2, 3]
    assert sorted(offer.child_relid for offer in offers) == [2, 3, 4]
    assert guest.completions == [pack_completion(SubchannelStatus.SUCCESS, 3)]


def test_sub_channels_carry_packets() -> None:
    """Each has a task and rings of its own behind the one back end."""
    guest = Asking()
    for offer in guest.ask():
        assert guest.open(offer.child_relid) == [OpenChannelResult(offer.child_relid, offer.child_relid, 0)]
        guest.out.write(b"12345678")
        guest.doorbell(offer.child_relid)
        guest.partition.run()
        assert [packet[3] for packet in guest.inbound.drain()] == [b"12345678"]
    assert len({id(backend) for backend in guest.bus.backends().values()}) == 1


def test_sub_channels_are_revoked_before_their_primary() -> None:
    """The device goes: a RESCIND for each sub-channel, open or not, then the primary's."""
    guest = Asking()
    relids = [offer.child_relid for offer in guest.ask()]
    guest.open(relids[0])

    guest.bus.remove(guest.keys[0])

    revoked = rescinds(guest.sent())
    assert sorted(revoked[:-1]) == sorted(relids) and revoked[-1] == PRIMARY
    assert guest.bus.backends() == {} and guest.partition.doorbells == {}
    guest.post(*[RelidReleased(relid) for relid in revoked])
    assert guest.bus.server.channels() == []


def test_closing_the_primary_revokes_its_sub_channels() -> None:
    """The host does so by itself; the primary stays offered."""
    guest = Asking()
    relids = [offer.child_relid for offer in guest.ask()]
    guest.open(relids[1])

    sent = guest.post(CloseChannel(PRIMARY), GpadlTeardown(PRIMARY, RING + PRIMARY))

    assert sorted(rescinds(sent)) == sorted(relids)
    assert GpadlTorndown(RING + PRIMARY) in sent
    assert list(guest.bus.backends()) == guest.keys


def test_what_was_granted_is_forgotten_at_the_close() -> None:
    """Whoever opens again must ask again: relids that are still held come back when they are released."""
    guest = Asking()
    relids = [offer.child_relid for offer in guest.ask()]
    guest.post(CloseChannel(PRIMARY), GpadlTeardown(PRIMARY, RING + PRIMARY))

    assert guest.ask() == []
    assert guest.completions == [pack_completion(SubchannelStatus.SUCCESS, 3)]
    again = guest.post(*[RelidReleased(relid) for relid in relids])

    assert [offer.child_relid for offer in again if isinstance(offer, OfferChannel)] == relids
    assert not guest.bus.refusals.refused


def test_a_sub_channel_taken_back_alone_leaves_the_others() -> None:
    """One RESCIND, and the device goes on."""
    guest = Asking()
    guest.ask()
    key = next(key for key, one in guest.bus.offered().items() if one.sub_channel_index == 2)
    relid = guest.bus.server.relid_of(key)

    guest.bus.remove(key)

    assert rescinds(guest.sent()) == [relid]
    assert sorted(one.sub_channel_index for one in guest.bus.offered().values()) == [0, 1, 3]
    assert guest.echo(b"12345678") == [b"12345678"]


def test_unload_forgets_sub_channels() -> None:
    """They were there for this connection: the next one sees the primary alone."""
    guest = Asking()
    for offer in guest.ask():
        guest.open(offer.child_relid)

    assert UnloadResponse() in guest.post(Unload())

    assert list(guest.bus.backends()) == guest.keys
    offers = [message for message in guest.boot() if isinstance(message, OfferChannel)]
    assert [(offer.child_relid, offer.sub_channel_index) for offer in offers] == [(PRIMARY, 0)]


def test_no_more_is_granted_than_there_are_relids() -> None:
    """Room for two of three: two are granted, whether they are offered before or after the answer."""
    for seed in range(8):
        guest = Asking(seed=seed)
        for number in range(2047 - 1 - 2):
            guest.bus.add(offer_of("echo", UUID(int=100 + number)), Echo())
        guest.sent()

        assert len(guest.ask()) == 2

        assert guest.completions == [pack_completion(SubchannelStatus.SUCCESS, 2)]
