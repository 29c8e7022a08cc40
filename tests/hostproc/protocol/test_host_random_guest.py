"""Random guests, devices and operators against the server, with what must hold after each step."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from emu.wire.messages import (
    CloseChannel,
    GpadlBody,
    GpadlCreated,
    GpadlTeardown,
    GpadlTorndown,
    InitiateContact,
    Message,
    MessageType,
    ModifyChannel,
    ModifyChannelResponse,
    OfferChannel,
    OpenChannelResult,
    RequestOffers,
    RescindChannelOffer,
    Unload,
    UnloadResponse,
    VersionResponse,
    gpadl_messages,
)
from emu.wire.versions import KNOWN_VERSIONS, VERSION_COPPER
from hostproc.protocol.effects import Effect
from hostproc.protocol.session import Link
from hostproc.protocol.versions import Limits
from tests.hostproc.protocol.fake_partition import RAM_BYTES, World, open_channel, parameters

RELIDS = st.integers(0, 6)
HANDLES = st.integers(1, 4)
NUMBERS = st.integers(0, 3)


class RandomGuest(RuleBasedStateMachine):
    """Any order of messages, answers, hot adds and removes, on few numbers so that they meet.

    The ledger of the world watches the effects; here is what a guest may rely on.
    """

    def __init__(self) -> None:
        super().__init__()
        limits = Limits(
            vp_count=2,
            ram_bytes=RAM_BYTES,
            max_version=VERSION_COPPER,
            gpadls_per_channel=3,
            gpadls_in_progress=2,
            gpadl_pages=200,
        )
        self.world = World(limits=limits, quick=False)
        self.keys: list[int] = []
        self.held: set[int] = set()
        self.rescinded: set[int] = set()
        self.owed: Counter[tuple[str, int, int]] = Counter()

    # -- the guest ------------------------------------------------------------------------------------

    @rule(version=st.sampled_from([*KNOWN_VERSIONS, 7]), pages=st.sampled_from([(0, 0), (4096, 8192), (0, 1)]))
    def contact(self, version: int, pages: tuple[int, int]) -> None:
        message = InitiateContact(
            vmbus_version_requested=version, msg_sint=2, monitor_page1=pages[0], monitor_page2=pages[1]
        )
        self.post(message)

    @rule()
    def request_offers(self) -> None:
        self.post(RequestOffers())

    @rule()
    def unload(self) -> None:
        self.post(Unload())

    @rule(relid=RELIDS, handle=HANDLES, pages=st.sampled_from([3, 8, 26, 27, 60]))
    def lend(self, relid: int, handle: int, pages: int) -> None:
        header, *bodies = gpadl_messages(relid, handle, range(pages))
        self.owed["gpadl", relid, handle] += 1
        self.post(header)
        self.post(*bodies)

    @rule(handle=HANDLES, size=st.integers(0, 224))
    def stray_body(self, handle: int, size: int) -> None:
        self.post(GpadlBody(0, handle, bytes(size)))

    @rule(relid=RELIDS, handle=HANDLES)
    def begin_gpadl(self, relid: int, handle: int) -> None:
        self.owed["gpadl", relid, handle] += 1
        self.post(gpadl_messages(relid, handle, range(30))[0])

    @rule(relid=RELIDS, handle=HANDLES)
    def tear_down(self, relid: int, handle: int) -> None:
        self.owed["torndown", 0, handle] += 1
        self.post(GpadlTeardown(relid, handle))

    @rule(
        relid=RELIDS,
        handle=HANDLES,
        target_vp=st.sampled_from([0, 1, 2, 0xFFFFFFFF]),
        offset=st.integers(0, 9),
    )
    def open(self, relid: int, handle: int, target_vp: int, offset: int) -> None:
        self.owed["open", relid, 0] += 1
        self.post(open_channel(relid, handle, target_vp=target_vp, downstream_ringbuffer_pageoffset=offset))

    @rule(relid=RELIDS)
    def close(self, relid: int) -> None:
        self.post(CloseChannel(relid))

    @rule(relid=RELIDS)
    def release(self, relid: int) -> None:
        before = self.world.states().get(relid)
        self.world.release(relid)
        # Who owns the number now is decided by the offer that comes with it, if one does.
        if before in ("REVOKED", "CLOSED", "CLOSING", "REOFFERED"):
            self.held.discard(relid)
            self.rescinded.discard(relid)
        self.look()

    @rule(relid=RELIDS, target_vp=st.integers(0, 2))
    def modify(self, relid: int, target_vp: int) -> None:
        self.owed["modify", relid, 0] += 1
        self.post(ModifyChannel(relid, target_vp))

    @rule(data=st.binary(min_size=8, max_size=240), msgtype=st.integers(0, 31))
    def garbage(self, data: bytes, msgtype: int) -> None:
        # Messages that the model follows are sent by the rules above only.
        followed = (1, 3, 5, 8, 11, 13, 14, 16, 22, 27)
        if msgtype not in followed:
            self.world.post_bytes(bytes([msgtype, 0, 0, 0]) + data[4:])
            self.look()

    # -- devices and operator ---------------------------------------------------------------------------

    @rule(number=NUMBERS, sub=st.sampled_from([0, 0, 1]))
    def hot_add(self, number: int, sub: int) -> None:
        identity = parameters(number, sub_channel_index=sub).identity
        if not self.world.server.offered(identity):
            self.keys.append(self.world.offer(number, sub_channel_index=sub))
            self.look()

    @precondition(lambda self: self.keys)
    @rule(data=st.data())
    def hot_remove(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.keys))
        self.keys.remove(key)
        self.world.revoke(key)
        self.look()

    @precondition(lambda self: self.world.waiting)
    @rule(data=st.data(), yes=st.booleans())
    def answer(self, data: st.DataObject, yes: bool) -> None:
        effect: Effect = data.draw(st.sampled_from(self.world.waiting))
        self.world.answer(type(effect), yes=yes)
        self.look()

    @precondition(lambda self: self.world.server.link is not Link.DISCONNECTED)
    @rule()
    def reset(self) -> None:
        self.world.take(self.world.server.reset())
        self.look()

    # -- what holds ---------------------------------------------------------------------------------------

    def post(self, *messages: Message) -> None:
        """Post, and look at what came back."""
        self.world.post(*messages)
        self.look()

    def look(self) -> None:
        """Follow the messages to the guest: no number twice, no answer that nobody asked for."""
        if self.world.server.link is not Link.CONNECTED:
            # Whatever was sent before the end is judged; then everything is forgotten.
            self.judge(self.world.sent())
            self.held.clear()
            self.rescinded.clear()
            self.owed.clear()
        else:
            self.judge(self.world.sent())

    def judge(self, messages: list[Message]) -> None:
        """Judge messages in their order."""
        for message in messages:
            match message:
                case OfferChannel():
                    assert message.child_relid not in self.held, "a relid in use was offered"
                    self.held.add(message.child_relid)
                case RescindChannelOffer():
                    assert message.child_relid in self.held - self.rescinded
                    self.rescinded.add(message.child_relid)
                case GpadlCreated():
                    self.pay("gpadl", message.child_relid, message.gpadl)
                case GpadlTorndown():
                    self.pay("torndown", 0, message.gpadl)
                case OpenChannelResult():
                    self.pay("open", message.child_relid, 0)
                    assert message.child_relid in self.held - self.rescinded
                case ModifyChannelResponse():
                    self.pay("modify", message.child_relid, 0)
                case VersionResponse():
                    self.held.clear()
                    self.rescinded.clear()
                    self.owed.clear()
                case UnloadResponse():
                    assert self.world.server.link is not Link.DISCONNECTING
                case _:
                    assert message.TYPE is MessageType.ALLOFFERS_DELIVERED, message

    def pay(self, *request: str | int) -> None:
        """Each answer was asked for, and is given once."""
        key = tuple(request)
        assert self.owed[key] > 0, key  # type: ignore[index]
        self.owed[key] -= 1  # type: ignore[index]

    @invariant()
    def relids_are_known_to_both(self) -> None:
        """What the server says the guest holds is what the guest holds."""
        server = self.world.server
        if server.link is Link.CONNECTED:
            assert set(self.world.states()) == self.held
        else:
            assert self.world.states() == {}

    @invariant()
    def the_numbers_add_up(self) -> None:
        """Counters kept along the way equal what is there."""
        server = self.world.server
        rows, summary = server.channels(), server.summary()
        assert summary.gpadls == sum(row.gpadl_count for row in rows)
        assert summary.open_channels == self.world.counted()["OPEN"]
        assert summary.offers == len(self.world.states())
        assert 0 <= summary.gpadl_pages <= 200 and summary.gpadls_in_progress <= 2

    @invariant()
    def a_disconnect_ends(self) -> None:
        """A server that is disconnecting waits for an answer that a device owes."""
        if self.world.server.link is Link.DISCONNECTING:
            assert self.world.waiting


RandomGuest.TestCase.settings = settings(stateful_step_count=60)
TestRandomGuest = RandomGuest.TestCase


@pytest.mark.soak
@pytest.mark.timeout(900)
class TestRandomGuestAtLength(RandomGuest.TestCase):  # type: ignore[misc, valid-type]
    """The same, many times longer."""

    settings = settings(max_examples=3_000, stateful_step_count=120)
