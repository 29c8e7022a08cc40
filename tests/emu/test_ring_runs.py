"""Many packets at once: whatever they are and wherever the ring wraps, the bytes and the packets of one by one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu.errors import ProtocolViolation, RingFull
from emu.ring import Packet, RingConsumer, RingProducer
from emu.wire.packets import COMPLETION_REQUESTED, DESCRIPTOR, VM_PKT_COMP, VM_PKT_DATA_INBAND
from tests.emu.ring_pages import KINDS, RingPages, ring_pages

DATA_PAGES = 2

stretches = st.lists(
    st.tuples(st.sampled_from([0, 1, 8, 13, 64, 100, 700, 2048, 2049]), st.integers(1, 40)), max_size=6
)
"""Batches as traffic has them: so many payloads of one length, then so many of another."""


@pytest.fixture(params=KINDS)
def pages(request: pytest.FixtureRequest) -> Iterator[RingPages]:
    """A ring of two data pages, over each kind of memory."""
    with ring_pages(request.param, data_pages=DATA_PAGES) as ring:
        yield ring


def payloads_of(shape: list[tuple[int, int]]) -> list[bytes]:
    """Payloads that tell one from another."""
    lengths = [length for length, count in shape for _ in range(count)]
    return [bytes((number * 7 + at) & 0xFF for at in range(length)) for number, length in enumerate(lengths)]


def padded(payload: bytes) -> bytes:
    """As a reader gets it."""
    return payload + bytes(-len(payload) % 8)


def write_one_by_one(producer: RingProducer, payloads: list[bytes], first_id: int) -> int:
    """What `write_many` is held against: how many fitted."""
    for number, payload in enumerate(payloads):
        try:
            producer.write(payload, first_id + number if first_id else 0)
        except RingFull:
            return number
    return len(payloads)


@settings(max_examples=40, deadline=None)
@given(stretches, st.integers(0, DATA_PAGES * 512 - 1), st.sampled_from([0, 1, 2**63]), st.sampled_from(KINDS))
def test_batch_is_what_single_writes_are(shape: list[tuple[int, int]], begin: int, first_id: int, kind: str) -> None:
    """The same number fits, and every byte of the ring but the published index is the same."""
    payloads = payloads_of(shape)
    seen = []
    for batched in (False, True):
        with ring_pages(kind, data_pages=DATA_PAGES) as pages:
            pages.start_at(8 * begin)
            producer = RingProducer(pages.memory)
            if batched:
                count, _ = producer.write_many(payloads, first_id)
                assert producer.batch_bytes == sum(map(len, payloads[:count]))
            else:
                count = write_one_by_one(producer, payloads, first_id)
            seen.append((count, producer.bytes, pages.peek(0, pages.data_size), pages.control_page()))

    assert seen[0] == seen[1]


@settings(max_examples=40, deadline=None)
@given(
    stretches,
    st.integers(0, DATA_PAGES * 512 - 1),
    st.sampled_from(KINDS),
    st.integers(1, 50),
    st.integers(1, 6000),
    st.sampled_from(["runs", "many", "drain", "left", "hold"]),
)
def test_every_way_of_reading_gives_the_same_packets(
    shape: list[tuple[int, int]], begin: int, kind: str, limit: int, most_bytes: int, way: str
) -> None:
    """Runs, packets, drains (also left early) and views: all that was written, in order, each once."""
    payloads = payloads_of(shape)
    read: list[Packet] = []
    with ring_pages(kind, data_pages=DATA_PAGES) as pages:
        pages.start_at(8 * begin)
        producer, consumer = RingProducer(pages.memory), RingConsumer(pages.attach())
        written = 0
        while written < len(payloads):
            flags = COMPLETION_REQUESTED if written % 3 else 0
            count, _ = producer.write_many(payloads[written:], 1 + written, flags, VM_PKT_COMP)
            written += count
            for taken in read_all(consumer, way, limit, most_bytes):
                assert way == "drain" or len(taken) <= limit
                read += taken
        assert (consumer.bytes, consumer.bytes_to_read, consumer.packets) == (producer.bytes, 0, len(payloads))

    assert [(one[0], one[2], one[3]) for one in read] == [
        (VM_PKT_COMP, 1 + number, padded(payload)) for number, payload in enumerate(payloads)
    ]


def read_all(consumer: RingConsumer, way: str, limit: int, most_bytes: int) -> Iterator[list[Packet]]:
    """Empty the ring in one of the ways there are."""
    while consumer.bytes_to_read:
        match way:
            case "runs":
                yield [
                    (packet_type, flags, trans_id, payload)
                    for packet_type, flags, trans_ids, payloads in consumer.read_runs(limit, most_bytes)
                    for trans_id, payload in zip(trans_ids, payloads, strict=True)
                ]
            case "many":
                yield consumer.read_many(limit, most_bytes)
            case "drain":
                yield list(consumer.drain())
            case "left":
                drain = consumer.drain()
                yield list(islice(drain, limit))
                drain.close()
            case "hold":
                with consumer.hold(limit, most_bytes) as held:
                    yield [(*one[:3], bytes(one[3])) for one in held.packets]


def test_runs_are_cut_where_type_or_flags_change(pages: RingPages) -> None:
    """A run has one type and one flags; lengths may differ within it."""
    producer = RingProducer(pages.memory)
    sent = [(VM_PKT_DATA_INBAND, 0)] * 9 + [(VM_PKT_DATA_INBAND, 1)] * 3 + [(VM_PKT_COMP, 0)] * 12
    for number, (packet_type, flags) in enumerate(sent):
        producer.write(bytes(number % 3), number, flags, packet_type)

    runs = RingConsumer(pages.memory).read_runs()
    assert [(one[0], one[1], len(one[2])) for one in runs] == [
        (*kind, len(list(alike))) for kind, alike in groupby(sent)
    ]
    assert [trans_id for one in runs for trans_id in one[2]] == list(range(24))


def test_run_that_the_peer_changes_is_read_as_it_then_is(pages: RingPages) -> None:
    """A descriptor rewritten in the middle of a run ends the run; a bad one ends the reading, once told."""
    producer = RingProducer(pages.memory)
    producer.write_many([bytes([number]) * 8 for number in range(64)])
    pages.poke(32 * 40, DESCRIPTOR.pack(VM_PKT_COMP, 2, 3, 1, 77))
    pages.poke(32 * 50, DESCRIPTOR.pack(VM_PKT_COMP, 9, 3, 1, 77))
    consumer = RingConsumer(pages.memory)

    read = consumer.read_many()
    assert [packet[:3] for packet in read[38:42]] == [(6, 0, 0), (6, 0, 0), (VM_PKT_COMP, 1, 77), (6, 0, 0)]
    assert (len(read), consumer.bytes_to_read) == (50, 32 * 14)
    pages.poke(32 * 50, DESCRIPTOR.pack(VM_PKT_COMP, 2, 3, 1, 77))
    with pytest.raises(ProtocolViolation, match="payload at byte 72"):
        consumer.read_many()
    assert len(consumer.read_many()) == 14


def test_held_packets_stay_in_the_ring_until_they_are_released(pages: RingPages) -> None:
    """Their room is the reader's, and their views read-only; released, they are gone and the writer has the room."""
    producer, consumer = RingProducer(pages.memory), RingConsumer(pages.attach())
    producer.write_many([bytes([number]) * 1000 for number in range(7)])
    with consumer.hold(limit=5) as held:
        views = [one[3] for one in held.packets]
        assert [bytes(view[:1]) for view in views] == [bytes([number]) for number in range(5)]
        assert all(view.readonly for view in views)
        assert producer.bytes_to_read == 7 * 1024
        with pytest.raises(AssertionError, match="still held"):
            consumer.read_many()
    assert producer.bytes_to_read == 2 * 1024
    with pytest.raises(ValueError, match="released"):
        views[0][0]
    held.release()

    assert [packet[3][0] for packet in consumer.drain()] == [5, 6]


def test_view_of_a_mapped_ring_is_the_ring(pages: RingPages) -> None:
    """Nothing was copied: what the peer writes later is seen, which is why a view decides nothing."""
    RingProducer(pages.memory).write(b"before  ")
    with RingConsumer(pages.attach()).hold() as held:
        ((_, _, _, view),) = held.packets
        pages.poke(16, b"after   ")
        assert bytes(view) == (b"after   " if pages.memory.buffer is not None else b"before  ")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, DATA_PAGES * 512 - 1), st.integers(0, 3000), st.sampled_from(KINDS), st.booleans())
def test_packet_written_in_place_is_any_packet(begin: int, length: int, kind: str, cancelled: bool) -> None:
    """Reserved, filled and committed leaves the bytes that `write` leaves; cancelled leaves the ring as it was."""
    payload = bytes(number & 0xFF for number in range(length))
    seen = []
    for in_place in (False, True):
        with ring_pages(kind, data_pages=DATA_PAGES) as pages:
            pages.start_at(8 * begin)
            producer = RingProducer(pages.memory)
            if in_place:
                if cancelled:
                    with pytest.raises(KeyError), producer.reserve(length) as room:
                        raise KeyError
                with producer.reserve(length, 5, COMPLETION_REQUESTED, VM_PKT_COMP) as room:
                    room.payload[:] = payload
                signal = room.signal
            else:
                signal = producer.write(payload, 5, COMPLETION_REQUESTED, VM_PKT_COMP)
            seen.append((signal, producer.bytes, pages.peek(0, pages.data_size), pages.control_page()))

    assert seen[0] == seen[1]


def test_reserving_finds_the_ring_full_like_writing(pages: RingPages) -> None:
    """RingFull with what is needed; a packet written in between is our own mistake."""
    producer = RingProducer(pages.memory)
    producer.write(bytes(6000))
    with pytest.raises(RingFull):
        producer.reserve(3000)
    room = producer.reserve(8)
    producer.write(b"")
    with pytest.raises(AssertionError, match="while room was reserved"):
        room.commit()
