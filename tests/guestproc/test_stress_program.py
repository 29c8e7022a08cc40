"""What the stress program sends, and that it sees every way in which a packet can come back wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu.ipc.atomics import AtomicView
from emu.wire.packets import VM_PKT_COMP, VM_PKT_DATA_INBAND
from guestproc.stress import Lane, Payloads, Stresser

LIMIT = 61_400
PAYLOADS = Payloads(7)


def trans_id(sender: int, sequence: int) -> int:
    """How a packet is named."""
    return (sender + 1) << 40 | sequence


class Checker(Stresser):
    """Of a stresser only what checks."""

    def __init__(self) -> None:
        self.payloads = PAYLOADS
        self.complaints = []
        self.lane = Lane(
            session=cast(Any, None),
            handle=3,
            relid=3,
            device=1,
            owned=True,
            limit=LIMIT,
            owner_bit=1,
            owned_word=cast(Any, None),
            sent_word=cast(Any, None),
            received_word=cast(Any, None),
            senders_word=cast(Any, None),
        )

    def take(self, sender: int, sequence: int, payload: bytes | None = None, kind: int = VM_PKT_COMP) -> int:
        """One packet comes back; how many were wrong so far."""
        right = PAYLOADS.of(sender, sequence, LIMIT)
        sent = right if payload is None else payload
        self.check(self.lane, (kind, 0, trans_id(sender, sequence), sent.ljust(-(-len(sent) // 8) * 8, b"\0")))
        return self.lane.corrupt


@given(st.integers(0, 63), st.integers(0, 2**40 - 1), st.integers(0, 70_000))
def test_payload_is_the_same_for_whoever_asks(sender: int, sequence: int, limit: int) -> None:
    """Sender and number decide it, and never is it longer than the ring allows."""
    payload = PAYLOADS.of(sender, sequence, limit)

    assert payload == Payloads(7).of(sender, sequence, limit)
    assert len(payload) <= limit


def test_lengths_reach_from_nothing_to_the_limit() -> None:
    """Every kind of length comes up: empty, odd, a frame's, a page's, the longest that the ring can take."""
    lengths = Counter(len(PAYLOADS.of(0, sequence, LIMIT)) for sequence in range(20_000))

    assert lengths[0] and lengths[LIMIT]
    assert any(1_400 < length <= 1_500 for length in lengths) and any(length > 16_384 for length in lengths)
    assert sum(length % 8 != 0 for length in lengths) > 1_000


def test_packets_of_two_senders_in_their_orders_are_right() -> None:
    """Each sender's row counts by itself."""
    checker = Checker()

    assert [checker.take(sender, n) for n in range(5) for sender in (0, 1)] == [0] * 10


def test_bytes_are_those_of_the_packets_that_came_back() -> None:
    """As they were sent, without what fills them up on the wire; what never came back counts in neither figure."""
    checker = Checker()
    for number in range(50):
        checker.take(1, number)
    checker.lane.sequence = 70

    told = checker.lane.report()
    assert (told["sent"], told["received"]) == (70, {"1": 50})
    assert told["bytes"] == sum(len(PAYLOADS.of(1, number, LIMIT)) for number in range(50))


@pytest.mark.parametrize("numbers", [(0, 2), (1,), (0, 0), (0, 1, 1)], ids=["lost", "first-lost", "doubled", "again"])
def test_lost_and_doubled_packets_are_seen(numbers: tuple[int, ...]) -> None:
    """The number of a packet must be the next one."""
    checker = Checker()
    for number in numbers[:-1]:
        checker.take(0, number)

    assert checker.take(0, numbers[-1]) == 1
    assert "instead of" in checker.complaints[0]


def test_changed_packets_are_seen() -> None:
    """One other bit, one byte less than a word, a byte behind the end, or no completion."""
    right = PAYLOADS.of(0, 0, LIMIT)
    assert len(right) > 16

    assert Checker().take(0, 0, bytes([right[0] ^ 1]) + right[1:]) == 1
    assert Checker().take(0, 0, right[:-9]) == 1
    assert Checker().take(0, 0, right.ljust(len(right) + 9, b"x")) == 1
    assert Checker().take(0, 0, kind=VM_PKT_DATA_INBAND) == 1


class Owner(Stresser):
    """Of a stresser what settles: one channel of its own, whose packets another CPU (bit 2) sends."""

    def __init__(self, between: Callable[[Lane], None]) -> None:
        view = AtomicView(bytearray(32))
        owned, sent, received, senders = (view.cell_u64(8 * number) for number in range(4))
        session = cast(Any, SimpleNamespace(inbox=()))
        self.cpu = 0
        self.lane = Lane(session, 3, 3, 1, True, LIMIT, 1, owned, sent, received, senders)
        self.lanes = {3: self.lane}
        owned.store(1)
        self.waits = 0
        self._between = between
        self.vcpu = cast(Any, SimpleNamespace(idle=self._wait))

    def let_go(self) -> None:
        """Nothing is wanted back."""

    def give_up_owning(self) -> None:
        """The moment that matters: another CPU goes on just before."""
        self._between(self.lane)
        super().give_up_owning()

    def _wait(self, _nanoseconds: int) -> None:
        """The other CPU's packets come back, and it ends."""
        self.waits += 1
        assert self.lane.owned_word.load() == 1
        self.lane.received_word.store(self.lane.sent_word.load())
        self.lane.senders_word.store(0)


def test_owner_stays_for_a_sender_that_saw_it_just_before_it_left() -> None:
    """Whoever announces itself between an owner's look and its going is waited for, with what it sends."""

    def sends(lane: Lane) -> None:
        if owner.waits == 0:
            lane.senders_word.store(2)
            assert lane.owned_word.load() & lane.owner_bit
            lane.sent_word.fetch_add(16)

    owner = Owner(sends)
    owner.settle()

    assert (owner.waits, owner.lane.received_word.load(), owner.lane.owned_word.load()) == (1, 16, 0)


def test_owner_leaves_when_nobody_sends_and_everything_is_back() -> None:
    """It waits for nothing then."""
    owner = Owner(lambda _lane: None)
    owner.settle()

    assert (owner.waits, owner.lane.owned_word.load()) == (0, 0)


class Sender(Stresser):
    """Of a stresser what sends: one channel whose ring is full, and is taken away at the third look."""

    def __init__(self) -> None:
        view = AtomicView(bytearray(32))
        owned, sent, received, senders = (view.cell_u64(8 * number) for number in range(4))
        session = SimpleNamespace(inbox=(), begin=lambda: None, send=lambda *_args, **_more: 0)
        self.cpu = 0
        self.payloads = PAYLOADS
        self.lane = Lane(cast(Any, session), 3, 3, 1, False, LIMIT, 1, owned, sent, received, senders)
        self.lanes = {3: self.lane}
        self.looks = 0

    def let_go(self) -> None:
        """What is wanted back goes, the channel that is waited for included."""
        self.looks += 1
        if self.looks == 3:
            del self.lanes[3]


def test_sender_that_waits_for_room_lets_go_of_what_is_wanted_back() -> None:
    """Its ring may be full because it was taken away, behind a removal that waits for this very program."""
    sender = Sender()
    sender.burst(sender.lane, 2)

    assert (sender.looks, sender.lane.sent_word.load()) == (3, 0)
