"""Many packets at once: whatever they are and wherever the ring wraps, the bytes and the packets of one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle, groupby, islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu.errors import ProtocolViolation, RingFull
from emu.ring import Packet, RingConsumer, RingProducer
from emu.ring_memory import Payload, UnpackRun
from emu.ring_packets import LONGEST_RUN, RUN_BYTES
from emu.wire.packets import COMPLETION_REQUESTED, DESCRIPTOR, VM_PKT_COMP, VM_PKT_DATA_INBAND, ring_bytes
from tests.emu.ring_pages import KINDS, RingPages, ring_pages

DATA_PAGES = 2

LONGER = 12
LENGTHS = {DATA_PAGES: [0, 1, 8, 13, 64, 100, 700, 2048, 2049], LONGER: [0, 64, 1500, 4096, 8191, 8192, 8193, 20_000]}
"""By the pages of a ring, lengths of payload of which it holds some."""


@st.composite
def rings_and_stretches(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    """A ring's pages, and a batch as traffic has them: so many payloads of one length, then so many of another."""
    data_pages = draw(st.sampled_from(sorted(LENGTHS)))
    stretch = st.tuples(st.sampled_from(LENGTHS[data_pages]), st.integers(1, 40))
    return data_pages, draw(st.lists(stretch, max_size=6 if data_pages == DATA_PAGES else 3))


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


def write_one_by_one(producer: RingProducer, payloads: Sequence[Payload], first_id: int) -> int:
    """What `write_many` is held against: how many fitted."""
    for number, payload in enumerate(payloads):
        try:
            producer.write(payload, first_id + number if first_id else 0)
        except RingFull:
            return number
    return len(payloads)


@settings(max_examples=40, deadline=None)
@given(
    rings_and_stretches(), st.integers(0, 2**20), st.sampled_from([0, 1, 2**63]), st.sampled_from(KINDS), st.booleans()
)
def test_batch_is_what_single_writes_are(
    ring: tuple[int, list[tuple[int, int]]], begin: int, first_id: int, kind: str, sole: bool
) -> None:
    """The same number fits, and every byte of the ring but the published index is the same."""
    data_pages, shape = ring
    payloads = payloads_of(shape)
    seen = []
    for batched in (False, True):
        with ring_pages(kind, data_pages=data_pages) as pages:
            pages.start_at(8 * begin % pages.data_size)
            producer = RingProducer(pages.memory, sole=sole)
            if batched:
                count, _ = producer.write_many(payloads, first_id)
                assert producer.batch_bytes == sum(map(len, payloads[:count]))
            else:
                count = write_one_by_one(producer, payloads, first_id)
            seen.append((count, producer.bytes, pages.peek(0, pages.data_size), pages.control_page()))

    assert seen[0] == seen[1]


ODD_ONES = st.tuples(st.integers(0, 39), st.integers(-70, 70), st.sampled_from([bytes, bytearray, memoryview]))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([0, 1, 64, 253, 254, 255, 300]),
    st.integers(6, 40),
    st.lists(ODD_ONES, max_size=4),
    st.sampled_from([0, 1, 2**63]),
    st.sampled_from(KINDS),
    st.booleans(),
)
def test_batch_that_begins_like_the_one_before_may_be_another(
    length: int, count: int, odd_ones: list[tuple[int, int, type]], first_id: int, kind: str, sole: bool
) -> None:
    """One payload that is longer or shorter, two that make up for each other, or one of another type: the bytes of
    single writes."""
    payloads: list[Payload] = list(payloads_of([(length, count)]))
    for at, more, buffer in odd_ones:
        if 0 < at < count:
            payloads[at] = buffer(b"\x40" * max(0, length + more))
    alike = payloads_of([(length, count)])
    seen = []
    for batched in (False, True):
        with ring_pages(kind, data_pages=LONGER) as pages:
            producer = RingProducer(pages.memory, sole=sole)
            for batch, ids in ((alike, 0), (alike, 0), (payloads, first_id)):
                written = producer.write_many(batch, ids)[0] if batched else write_one_by_one(producer, batch, ids)
                assert written == count
            seen.append((producer.bytes, pages.peek(0, producer.bytes), pages.control_page()))

    assert seen[0] == seen[1]


@pytest.mark.parametrize("length", [0, 1, 5, 64, 253, 254, 255, 256, 300, 700])
@pytest.mark.parametrize("count", [1, 6, 64, 65])
@pytest.mark.parametrize("kind", ["contiguous", "bytearray"])
def test_batch_is_stored_if_all_its_payloads_have_the_length(kind: str, count: int, length: int) -> None:
    """As a run is, byte for byte; one that is a byte longer or shorter, or much longer, anywhere, is found out."""
    payloads: list[Payload] = list(payloads_of([(length, count)]))
    size = ring_bytes(length)
    with ring_pages(kind, data_pages=LONGER) as pages:
        pages.start_at(0)
        shape = length, size - ring_bytes(0) - length, bytes(range(1, 9))
        pages.memory.run_packer(*shape)(16, payloads, None)
        run = pages.peek(0, pages.data_size)
        pages.start_at(0)
        pack_alike = pages.memory.alike_packer(*shape)
        assert pack_alike(payloads, None, count, 16, 16 + count * size)
        assert pages.peek(0, pages.data_size) == run

        for at in (0, count // 2, count - 1):
            for other in {max(0, length - 1), length + 1, length + 600} - {length}:
                odd = [*payloads[:at], bytes(other), *payloads[at + 1 :]]
                assert not pack_alike(odd, None, count, 16, 16 + count * size)
        if count > 1 and length:
            odd = [bytes(length - 1), *payloads[1:-1], bytes(length + 1)]
            assert not pack_alike(odd, None, count, 16, 16 + count * size)
            assert not pack_alike(odd[::-1], None, count, 16, 16 + count * size)


@pytest.mark.parametrize("length", [64, 1500, 4096])
def test_reading_as_many_bytes_as_a_run_may_have_is_one_run(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left over by a round number would be taken packet by packet, each at the price of a small run."""
    counts: list[int] = []
    with ring_pages("contiguous", data_pages=256) as pages:
        producer = RingProducer(pages.memory)
        reader = pages.attach()
        make = reader.run_unpacker

        def counted(start: int, length: int, word: int) -> UnpackRun:
            unpack_run = make(start, length, word)

            def unpack(offset: int, count: int) -> tuple[list[int], Sequence[bytes]] | None:
                counts.append(count)
                return unpack_run(offset, count)

            return unpack

        monkeypatch.setattr(reader, "run_unpacker", counted)
        consumer = RingConsumer(reader)
        size = ring_bytes(length)
        most = min(LONGEST_RUN, -(-RUN_BYTES // size))
        payloads = [bytes(length)] * most
        for _ in range(3):
            assert producer.write_many(payloads)[0] == most
            assert len(consumer.read_many(most_bytes=most * size)) == most

    assert counts[-1] == most
    assert counts.count(most) == 2


@settings(max_examples=60, deadline=None)
@given(
    rings_and_stretches(),
    st.integers(0, 2**20),
    st.sampled_from(KINDS),
    st.integers(1, 50),
    st.integers(1, 6000),
    st.lists(st.sampled_from(["runs", "many", "drain", "left", "hold", "one"]), min_size=1, max_size=3),
    st.booleans(),
)
def test_every_way_of_reading_gives_the_same_packets(
    ring: tuple[int, list[tuple[int, int]]],
    begin: int,
    kind: str,
    limit: int,
    most_bytes: int,
    ways: list[str],
    sole: bool,
) -> None:
    """Runs, packets, drains (also left early) and views, in turn: all that was written, in order, each once."""
    data_pages, shape = ring
    payloads = payloads_of(shape)
    read: list[Packet] = []
    with ring_pages(kind, data_pages=data_pages) as pages:
        pages.start_at(8 * begin % pages.data_size)
        producer, consumer = RingProducer(pages.memory), RingConsumer(pages.attach(), sole=sole)
        written = 0
        turns = cycle(ways)
        while written < len(payloads):
            flags = COMPLETION_REQUESTED if written % 3 else 0
            count, _ = producer.write_many(payloads[written:], 1 + written, flags, VM_PKT_COMP)
            written += count
            while consumer.bytes_to_read:
                way = next(turns)
                taken = read_some(consumer, way, limit, most_bytes)
                assert taken
                assert way == "drain" or len(taken) <= limit
                read += taken
        assert (consumer.bytes, consumer.bytes_to_read, consumer.packets) == (producer.bytes, 0, len(payloads))

    assert {type(packet[3]) for packet in read} <= {bytes}
    assert [(one[0], one[2], one[3]) for one in read] == [
        (VM_PKT_COMP, 1 + number, padded(payload)) for number, payload in enumerate(payloads)
    ]


def read_some(consumer: RingConsumer, way: str, limit: int, most_bytes: int) -> list[Packet]:
    """Read in one of the ways there are."""
    match way:
        case "runs":
            return [
                (packet_type, flags, trans_id, payload)
                for packet_type, flags, trans_ids, payloads in consumer.read_runs(limit, most_bytes)
                for trans_id, payload in zip(trans_ids, payloads, strict=True)
            ]
        case "many":
            return consumer.read_many(limit, most_bytes)
        case "one":
            packet = consumer.read()
            assert packet is not None
            return [packet]
        case "drain":
            return list(consumer.drain())
        case "left":
            drain = consumer.drain()
            packets = list(islice(drain, limit))
            drain.close()
            return packets
        case _:
            with consumer.hold(limit, most_bytes) as held:
                return [(*one[:3], bytes(one[3])) for one in held.packets]


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


def test_look_ends_where_packets_stop_making_sense(pages: RingPages) -> None:
    """Packets like those shown before are shown up to a descriptor that is another; a bad one is told then."""
    producer, consumer = RingProducer(pages.memory), RingConsumer(pages.attach())
    producer.write_many([bytes([number]) * 8 for number in range(10)])
    pages.poke(32 * 5, DESCRIPTOR.pack(VM_PKT_COMP, 2, 3, 1, 77))
    pages.poke(32 * 8, DESCRIPTOR.pack(VM_PKT_COMP, 9, 3, 1, 77))
    shown = []
    for limit in (3, None, None):
        with consumer.hold(limit) as held:
            shown.append([packet[:3] for packet in held.packets])

    assert shown == [[(6, 0, 0)] * 3, [(6, 0, 0)] * 2, [(VM_PKT_COMP, 1, 77), *[(6, 0, 0)] * 2]]
    with pytest.raises(ProtocolViolation, match="payload at byte 72"):
        consumer.hold()


def test_what_is_read_after_a_look_is_copied(pages: RingPages) -> None:
    """Packets behind those that were held come out as bytes of their own, though they are like them."""
    producer, consumer = RingProducer(pages.memory), RingConsumer(pages.attach())
    producer.write_many([bytes([number]) * 100 for number in range(30)])
    with consumer.hold(limit=10):
        pass
    (few,) = consumer.read_runs(limit=3)
    rest = consumer.read_many()
    pages.poke(0, bytes(pages.data_size))

    assert [*few[3], *(packet[3] for packet in rest)] == [bytes([number]) * 100 + bytes(4) for number in range(10, 30)]


@pytest.mark.parametrize("lengths", [[300] * 40, [300, 8, 300, 16] * 20])
def test_room_known_of_before_a_wrap_is_none_behind_it(pages: RingPages, lengths: list[int]) -> None:
    """A batch that meets a wrong read_index once it has wrapped leaves a writer that looks again at once."""
    pages.start_at(pages.data_size - 2048)
    words = pages.memory.words
    words.store_mask(1)
    # It looks when it attaches, at its first packet, and at the wrap.
    seen = iter([words.load_read()] * 3)
    producer = RingProducer(pages.memory, words=replace(words, load_read=lambda: next(seen, 4)))
    producer.write(b"")
    with pytest.raises(ProtocolViolation, match="read_index"):
        producer.write_many([bytes(length) for length in lengths])
    assert producer.bytes > 2048

    with pytest.raises(ProtocolViolation, match="read_index"):
        producer.write(b"")


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
