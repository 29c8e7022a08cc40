"""The ring against a model of it: a queue of packets, a number of free bytes, and two rules about signals."""

from __future__ import annotations

import random
from collections import deque
from contextlib import ExitStack

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from emu.errors import RingFull
from emu.ring import PacketTooLong, RingConsumer, RingProducer
from emu.wire.packets import ring_bytes
from tests.emu.ring_pages import KINDS, RingPages, ring_pages

PAYLOADS = st.integers(0, 5000).map(lambda length: bytes([length & 0xFF]) * length) | st.binary(max_size=300)
KINDS_OF_PACKET = st.sampled_from([(6, 0), (6, 1), (0xB, 0)])

Written = tuple[int, int, int, bytes]


class RingMachine(RuleBasedStateMachine):
    """Any sequence of writes, batches, reads, masks and wishes, with ends that are attached afresh at times."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.queue: deque[Written] = deque()
        self.masked = False
        self.wish = 0
        self.owed = False
        self.trans_id = 0

    @initialize(kind=st.sampled_from(KINDS), data_pages=st.integers(1, 3), begin=st.integers(0, 511))
    def attach(self, kind: str, data_pages: int, begin: int) -> None:
        """An empty ring whose indices stand anywhere."""
        self.pages: RingPages = self.stack.enter_context(ring_pages(kind, data_pages))
        self.pages.start_at(8 * begin)
        self.producer = RingProducer(self.pages.memory)
        self.consumer = RingConsumer(self.pages.memory)

    def teardown(self) -> None:
        """Give the memory back."""
        self.stack.close()

    # -- the model ----------------------------------------------------------------------------------

    @property
    def used(self) -> int:
        """Bytes in the ring."""
        return sum(ring_bytes(len(packet[3])) for packet in self.queue)

    @property
    def free(self) -> int:
        """Bytes that may be written."""
        return self.pages.data_size - 8 - self.used

    def sent(self, kind: tuple[int, int], payload: bytes) -> None:
        """A packet went in."""
        self.queue.append((*kind, self.trans_id, payload.ljust(len(payload) + -len(payload) % 8, b"\0")))

    # -- the writer ---------------------------------------------------------------------------------

    @rule(payload=PAYLOADS, kind=KINDS_OF_PACKET)
    def write(self, payload: bytes, kind: tuple[int, int]) -> None:
        """It fits exactly when the model says so; it signals exactly when the queue was empty and unmasked."""
        self.trans_id += 1
        size, capacity = ring_bytes(len(payload)), self.pages.data_size - 8
        expected = not self.queue and not self.masked
        try:
            signal = self.producer.write(payload, self.trans_id, kind[1], kind[0])
        except PacketTooLong:
            assert size > capacity
        except RingFull as full:
            assert (full.needed, full.free) == (size, self.free)
            assert self.free < size <= capacity
        else:
            assert size <= self.free
            assert signal == expected
            self.sent(kind, payload)

    @rule(payloads=st.lists(st.binary(max_size=200), max_size=30), kind=KINDS_OF_PACKET)
    def write_many(self, payloads: list[bytes], kind: tuple[int, int]) -> None:
        """The batch is what single writes would have been, up to the first that does not fit."""
        expected = not self.queue and not self.masked and bool(payloads)
        written, signal = self.producer.write_many(payloads, self.trans_id + 1, kind[1], kind[0])
        for payload in payloads[:written]:
            self.trans_id += 1
            assert ring_bytes(len(payload)) <= self.free
            self.sent(kind, payload)
        assert signal == expected
        assert written == len(payloads) or ring_bytes(len(payloads[written])) > self.free

    @rule(size=st.integers(1, 5000))
    def want_room(self, size: int) -> None:
        """It is there, or the wish stands in the ring."""
        if size > self.pages.data_size - 8:
            return
        there = self.producer.want_room(size)
        assert there == (size <= self.free)
        self.wish = 0 if there else size

    @rule()
    def cancel_room(self) -> None:
        """The wish is gone."""
        self.producer.cancel_room()
        self.wish = 0

    @rule()
    def attach_producer(self) -> None:
        """Another writer takes over."""
        self.producer = RingProducer(self.pages.memory, sole=self.trans_id % 2 == 0)

    # -- the reader ---------------------------------------------------------------------------------

    @rule(count=st.integers(0, 40))
    def drain(self, count: int) -> None:
        """The oldest packets, in order; a signal is owed exactly if that crossed the wish."""
        before = self.free
        taken = list(self.consumer.drain(count))
        assert taken == [self.queue.popleft() for _ in range(min(count, len(self.queue)))]
        wish = self.wish & ~7
        self.owed |= before < wish <= self.free

    @rule()
    def take_signal(self) -> None:
        """Owed once for each crossing, and taken once."""
        assert self.consumer.take_signal() == self.owed
        self.owed = False

    @rule()
    def begin_read(self) -> None:
        """Masked."""
        self.consumer.begin_read()
        self.masked = True

    @precondition(lambda self: self.masked)
    @rule()
    def end_read(self) -> None:
        """Unmasked, with a look at what is there."""
        assert self.consumer.end_read() == self.used
        self.masked = False

    @precondition(lambda self: not self.owed)
    @rule()
    def attach_consumer(self) -> None:
        """Another reader takes over."""
        self.consumer = RingConsumer(self.pages.memory, sole=self.trans_id % 2 == 0)

    # -- always -------------------------------------------------------------------------------------

    @invariant()
    def numbers_agree(self) -> None:
        """Both ends see the bytes that the model has, and the indices are on the grid."""
        words, data_size = self.pages.memory.words, self.pages.data_size
        assert self.producer.free_bytes == self.free
        assert self.consumer.bytes_to_read == self.producer.bytes_to_read == self.used
        assert words.load_pending() == self.wish
        for index in (words.load_write(), words.load_read()):
            assert index < data_size
            assert index % 8 == 0


TestRingMachine = RingMachine.TestCase
TestRingMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def exchange(kind: str, seed: int, packets: int) -> None:
    """Random packets in random bursts through a small ring; every one comes out as it went in."""
    chance = random.Random(seed)
    with ring_pages(kind, data_pages=2) as pages:
        pages.start_at(8 * chance.randrange(1024))
        producer, consumer = RingProducer(pages.memory), RingConsumer(pages.memory)
        queue: deque[tuple[int, bytes]] = deque()
        number = 0
        while number < packets or queue:
            burst = [chance.randbytes(int(8000 ** chance.random()) - 1) for _ in range(chance.randrange(1, 40))]
            if chance.random() < 0.5:
                written, _ = producer.write_many(burst, number + 1)
                queue.extend(zip(range(number + 1, number + 1 + written), burst, strict=False))
                number += written
            else:
                for payload in burst:
                    try:
                        producer.write(payload, number + 1)
                    except RingFull:
                        break
                    number += 1
                    queue.append((number, payload))
            for _, _, trans_id, read in consumer.drain(chance.randrange(60)):
                expected, payload = queue.popleft()
                assert (trans_id, read) == (expected, payload.ljust(len(read), b"\0")), f"seed {seed}"
                assert len(read) - len(payload) < 8, f"seed {seed}"
        assert consumer.packets == number
        assert producer.bytes == consumer.bytes


@pytest.mark.parametrize("kind", KINDS)
def test_random_packets_come_out_as_they_went_in(kind: str) -> None:
    """Thousands of packets of random sizes over each kind of memory."""
    exchange(kind, seed=1, packets=3_000)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_a_million_random_packets_come_out_as_they_went_in(kind: str) -> None:
    """The same, a million times."""
    exchange(kind, seed=2, packets=1_000_000)
