"""`read_lone`, the short way of a single packet, does what `read_many` does, or nothing at all; `emptied` is a look."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu.errors import ProtocolViolation, RingFull
from emu.memory import PAGE_SIZE
from emu.ring import Packet, RingConsumer, RingMemory, RingProducer
from emu.wire.packets import COMPLETION_REQUESTED
from emu.wire.ring_layout import PENDING_SEND_SZ, READ_INDEX, WRITE_INDEX
from tests.emu.ring_pages import KINDS, ring_pages

DATA_SIZE = PAGE_SIZE
EVERYTHING = ("_read", "fault", "packets", "bytes", "releases", "intr_in_full", "signal_owed", "_bad_wish")
"""What a consumer keeps of the ring."""

indices = st.one_of(st.integers(0, DATA_SIZE // 8).map(lambda word: 8 * word), st.integers(0, 2**32 - 1))


def reader_of(kinds: list[int], *, sole: bool) -> tuple[bytearray, RingConsumer]:
    """A ring, and a reader that has seen packets of these lengths."""
    buffer = bytearray(PAGE_SIZE + DATA_SIZE)
    memory = RingMemory.on(buffer)
    memory.init()
    producer, consumer = RingProducer(memory), RingConsumer(memory, sole=sole)
    for length in kinds:
        producer.write(bytes(length), 1, COMPLETION_REQUESTED)
        consumer.read()
    return buffer, consumer


def outcome(read: Any) -> Any:
    """What a reading gives, or the rule that it says was broken."""
    try:
        return read()
    except ProtocolViolation as violation:
        return violation.rule


def state(buffer: bytearray, consumer: RingConsumer) -> tuple[Any, ...]:
    """Every byte, and all that the reader keeps."""
    kept = [getattr(consumer, name) for name in EVERYTHING]
    return bytes(buffer), *[repr(one) for one in kept]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from([0, 64, 100, 700]), max_size=3),
    st.lists(st.sampled_from([0, 64, 100, 700]), max_size=3),
    st.one_of(st.none(), st.tuples(st.sampled_from([WRITE_INDEX, READ_INDEX, PENDING_SEND_SZ]), indices)),
    st.booleans(),
)
def test_it_is_read_many_or_nothing(
    seen: list[int], written: list[int], lie: tuple[int, int] | None, sole: bool
) -> None:
    """Whatever the ring holds, whoever lies in its words: the same packet and state, or none and no change."""
    results = []
    for lone in (True, False):
        buffer, consumer = reader_of(seen, sole=sole)
        producer = RingProducer(consumer.memory)
        for number, length in enumerate(written):
            producer.write(bytes([number]) * length, number, COMPLETION_REQUESTED)
        if lie is not None:
            buffer[lie[0] : lie[0] + 4] = lie[1].to_bytes(4, "little")
        before = state(buffer, consumer)
        packet = consumer.read_lone() if lone else None
        if lone and packet is None:
            assert state(buffer, consumer) == before
            return
        packets: list[Packet] = [packet] if packet is not None else outcome(consumer.read_many)
        results.append((packets, state(buffer, consumer), consumer.take_signal(), outcome(consumer.read_many)))

    assert results[0] == results[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("begin", [0, DATA_SIZE - 8, DATA_SIZE - 40])
def test_packet_alone_is_taken(kind: str, begin: int) -> None:
    """Of a kind that was seen before, also where it wraps; its room is the writer's again."""
    with ring_pages(kind) as pages:
        pages.start_at(begin)
        producer, consumer = RingProducer(pages.memory), RingConsumer(pages.memory)
        producer.write(b"first", 1)
        consumer.read()
        producer.write(b"other", 2)

        assert consumer.read_lone() == (6, 0, 2, b"other\0\0\0")
        assert consumer.read_lone() is None
        assert producer.free_bytes == producer.capacity


def test_packet_that_is_not_alone_stays() -> None:
    """Two of them are `read_many`'s, as is one of a kind that was never looked at."""
    _buffer, consumer = reader_of([], sole=True)
    producer = RingProducer(consumer.memory)
    producer.write(bytes(8))

    assert consumer.read_lone() is None
    assert len(consumer.read_many()) == 1

    producer.write(bytes(8))
    producer.write(bytes(8))

    assert consumer.read_lone() is None
    assert len(consumer.read_many()) == 2


def test_packet_behind_a_fault_stays() -> None:
    """What was found wrong is told by the next reading, before anything else is read."""
    _buffer, consumer = reader_of([8], sole=True)
    RingProducer(consumer.memory).write(bytes(8), 1, COMPLETION_REQUESTED)
    consumer.fault = ProtocolViolation("wrong", rule="packet-length", field="len8", value=0)

    assert consumer.read_lone() is None
    with pytest.raises(ProtocolViolation):
        consumer.read_many()


@settings(max_examples=200, deadline=None)
@given(st.integers(0, DATA_SIZE // 8 - 1), st.integers(0, DATA_SIZE // 8 - 1), indices, st.integers(0, 1000))
def test_write_beside_others_is_a_write(begin: int, released: int, lie: int, length: int) -> None:
    """One of several producers looks at the indices itself before it writes: the same bytes, or the same refusal."""
    results = []
    for sole in (True, False):
        buffer = bytearray(PAGE_SIZE + DATA_SIZE)
        memory = RingMemory.on(buffer)
        memory.init()
        memory.words.store_write(8 * begin)
        memory.words.store_read(8 * released)
        producer = RingProducer(memory, sole=sole)
        memory.words.store_read(lie)
        try:
            signal: object = producer.write(bytes(length), 7)
        except (ProtocolViolation, RingFull) as refusal:
            signal = str(refusal)
        kept = producer.bytes, producer.out_full_total, producer.out_full_first
        results.append((signal, kept, bytes(buffer)))

    assert results[0] == results[1]


def test_emptied_where_a_reading_would_find_nothing() -> None:
    """Neither a packet, nor a fault, nor a wish that can never be met, which the next reading raises."""
    buffer, consumer = reader_of([], sole=True)
    producer = RingProducer(consumer.memory)
    assert consumer.emptied()

    producer.write(bytes(8))
    assert not consumer.emptied()
    consumer.read_many()
    assert consumer.emptied()

    producer.write(bytes(8))
    producer.words.store_pending(len(buffer))
    consumer.read_many()
    assert not consumer.emptied()
    with pytest.raises(ProtocolViolation, match="waits for"):
        consumer.read_many()
