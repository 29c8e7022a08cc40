"""A device asked for sub-channels: what it grants, in which order, and which packets are a request at all."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from emu.wire.packets import COMPLETION_REQUESTED, VM_PKT_COMP
from emu.wire.subchannel_request import (
    ECHO_USERDATA,
    SubchannelStatus,
    pack_completion,
    pack_request,
)
from hostproc.devices.backend import Backend
from hostproc.devices.echo import Echo
from hostproc.devices.netlike import Netlike
from tests.hostproc.devices.ring_bench import OpenChannel

SUCCESS, INVALID, ALREADY, UNSUPPORTED = SubchannelStatus


class Primary(OpenChannel):
    """An open channel whose sub-channel offers are kept, each with how many packets had been answered before."""

    def __init__(self, backend: Backend, *, subchannels: int = 4, seed: int = 0, index: int = 0) -> None:
        backend.subchannels, backend.seed = subchannels, seed
        self.offers: list[int] = []
        self.relids = 64
        super().__init__(backend)
        self.channel.userdata = ECHO_USERDATA.ljust(120, b"\0")
        self.channel.sub_channel_index = index
        self.channel.offer_subchannels = self._offer
        self.channel.subchannel_room = lambda: self.relids
        self.completed_before_offers = False
        self.body = backend.open(self.channel)

    def _offer(self, indices: Iterable[int]) -> None:
        self.offers += indices
        self.completed_before_offers = bool(self.channel.outgoing.bytes)

    def ask(self, count: int | bytes) -> list[bytes]:
        """Send a request; the payloads that came back, each a completion of it."""
        payload = pack_request(count) if isinstance(count, int) else count
        self.send(payload, trans_id=5, flags=COMPLETION_REQUESTED)
        self.run()
        back = self.received()
        assert all(packet[:3] == (VM_PKT_COMP, 0, 5) for packet in back)
        return [packet[3][:12] for packet in back]


@pytest.mark.parametrize("kind", [Echo, Netlike])
@pytest.mark.parametrize(("asked", "granted"), [(1, 1), (4, 4), (5, 4), (64, 4)])
def test_as_many_as_there_are_are_granted(kind: type[Backend], asked: int, granted: int) -> None:
    """The completion says how many; each index is offered once."""
    primary = Primary(kind())

    assert primary.ask(asked) == [pack_completion(SUCCESS, granted)]
    assert sorted(primary.offers) == list(range(1, granted + 1))


@pytest.mark.parametrize("kind", [Echo, Netlike])
@pytest.mark.parametrize("count", [0, 65, 1 << 31])
def test_none_and_too_many_are_refused(kind: type[Backend], count: int) -> None:
    """With a status, a violation, and no offer; the channel goes on."""
    primary = Primary(kind())

    assert primary.ask(count) == [pack_completion(INVALID)]
    assert [one.rule for one in primary.violations] == ["subchannel-count"]
    assert primary.offers == []


@pytest.mark.parametrize("kind", [Echo, Netlike])
def test_a_device_without_sub_channels_says_so(kind: type[Backend]) -> None:
    """That is nobody's fault."""
    primary = Primary(kind(), subchannels=0)

    assert primary.ask(3) == [pack_completion(UNSUPPORTED)]
    assert primary.violations == [] and primary.offers == []


def test_a_second_request_is_refused() -> None:
    """One opening of a netlike primary gets its sub-channels once."""
    primary = Primary(Netlike())
    primary.ask(2)

    assert primary.ask(2) == [pack_completion(ALREADY)]
    assert [one.rule for one in primary.violations] == ["subchannels-twice"]
    assert len(primary.offers) == 2


def test_a_second_request_of_echo_is_echoed() -> None:
    """Only the first packet can be one: behind it every payload comes back, also this."""
    primary = Primary(Echo())
    primary.ask(2)

    assert primary.ask(2) == [pack_request(2)]
    assert len(primary.offers) == 2 and primary.violations == []


def test_a_first_packet_that_was_not_announced_is_echoed() -> None:
    """Without the user data no payload whatever is a request."""
    primary = Primary(Echo())
    primary.channel.userdata = bytes(120)

    assert primary.ask(2) == [pack_request(2)]
    assert primary.offers == []


def test_a_first_packet_that_is_no_request_is_refused() -> None:
    """A guest that announced one and sends another thing gets a status; what follows is echoed."""
    primary = Primary(Echo())

    assert primary.ask(b"something   ") == [pack_completion(INVALID)]
    assert primary.ask(b"another     ") == [b"another     "]
    assert [one.rule for one in primary.violations] == ["subchannel-request"]


def test_a_sub_channel_has_none_itself() -> None:
    """Echo gives the request back, netlike refuses it."""
    assert Primary(Echo(), index=1).ask(2) == [pack_request(2)]
    assert Primary(Netlike(), index=1).ask(2) == [pack_completion(UNSUPPORTED)]


def test_offers_come_in_any_order_before_or_after_the_completion() -> None:
    """Both are drawn from the seed: over twenty seeds there is more than one of each, and a seed repeats itself."""

    def drawn(seed: int) -> tuple[tuple[int, ...], bool]:
        primary = Primary(Echo(), seed=seed)
        primary.ask(4)
        return tuple(primary.offers), primary.completed_before_offers

    outcomes = [drawn(seed) for seed in range(20)]

    assert len({order for order, _ in outcomes}) > 5
    assert {late for _, late in outcomes} == {False, True}
    assert [drawn(seed) for seed in range(20)] == outcomes


@pytest.mark.parametrize("room", [0, 1])
def test_no_more_is_granted_than_there_are_relids(room: int) -> None:
    """Whether the offers come before the completion or after it."""
    for seed in range(8):
        primary = Primary(Echo(), seed=seed)
        primary.relids = room

        assert primary.ask(4) == [pack_completion(SUCCESS if room else UNSUPPORTED, room)]
        assert len(primary.offers) == room
