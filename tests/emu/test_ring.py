"""The ring: packets byte for byte as the wire has them, over every kind of memory, from one byte to all it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from emu.errors import RingFull
from emu.memory import PAGE_SIZE
from emu.ring import PacketTooLong, RingConsumer, RingMemory, RingProducer
from emu.ring_producer import SHORTEST_RUN
from emu.wire.gpa_range import GpaRange
from emu.wire.packets import (
    COMPLETION_REQUESTED,
    MAX_PACKET_SIZE,
    VM_PKT_COMP,
    VM_PKT_DATA_INBAND,
    VM_PKT_DATA_USING_GPA_DIRECT,
    pack_gpa_direct,
    pack_packet,
    pack_trailer,
    parse_gpa_direct,
    ring_bytes,
)
from tests.emu.ring_pages import KINDS, RingPages, ring_pages


@pytest.fixture(params=KINDS)
def pages(request: pytest.FixtureRequest) -> Iterator[RingPages]:
    """A ring of four data pages, over each kind of memory."""
    with ring_pages(request.param, data_pages=4) as ring:
        yield ring


@pytest.fixture
def ring() -> RingMemory:
    """A ring of one data page, initialised."""
    memory = RingMemory.on(bytearray(2 * PAGE_SIZE))
    memory.init()
    return memory


def counting(length: int) -> bytes:
    """A payload in which every byte tells where it stands."""
    return bytes(at & 0xFF for at in range(1, length + 1))


# -- bytes ----------------------------------------------------------------------------------------


def test_worked_packet(pages: RingPages) -> None:
    """The reference's example: 8 bytes, id 7, completion requested, written at 0x40."""
    pages.start_at(0x40)
    RingProducer(pages.memory).write(bytes(range(1, 9)), 7, COMPLETION_REQUESTED)

    expected = bytes.fromhex("0600 0200 0300 0100 0700000000000000 0102030405060708 0000000040000000")
    assert pages.peek(0x40, 32) == expected
    assert pages.peek(0x60, 8) == b"\xee" * 8
    assert pages.control_page()[:16] == bytes.fromhex("60000000 40000000 00000000 00000000")


@pytest.mark.parametrize("kind", KINDS)
def test_every_payload_size_at_every_wrap_offset(kind: str) -> None:
    """0 to 256 bytes, begun at each offset from which a packet can reach the end of the data or cross it."""
    wrong = []
    with ring_pages(kind) as pages:
        for length in range(257):
            payload = counting(length)
            packet = pack_packet(payload, length, 1)
            for begin in range(pages.data_size - ring_bytes(length), pages.data_size, 8):
                pages.start_at(begin)
                RingProducer(pages.memory).write(payload, length, 1)
                written = pages.peek(begin, len(packet) + 8) == packet + pack_trailer(begin)
                (read,) = RingConsumer(pages.memory).drain()
                padded = payload + bytes(-length % 8)
                if not written or read != (VM_PKT_DATA_INBAND, 1, length, padded):
                    wrong.append((length, begin))

    assert wrong == []


@pytest.mark.parametrize("length", [4095, 4096, 4097, 5000, 8192, 16_000])
def test_large_payload_lies_as_a_small_one_does(pages: RingPages, length: int) -> None:
    """Payloads of pages, from a wrapping offset: the same bytes whichever way they were copied."""
    pages.start_at(pages.data_size - 2048)
    payload = counting(length)
    RingProducer(pages.memory).write(payload, 1 << 40)

    packet = pack_packet(payload, 1 << 40)
    assert pages.peek(pages.data_size - 2048, len(packet) + 8) == packet + pack_trailer(pages.data_size - 2048)
    assert RingConsumer(pages.memory).read() == (VM_PKT_DATA_INBAND, 0, 1 << 40, payload.ljust(len(packet) - 16, b"\0"))


@pytest.mark.parametrize("length", [0, 5, 64, 4096, 4099, 9000])
@pytest.mark.parametrize("form", [bytes, bytearray, memoryview])
def test_payload_may_be_any_buffer_of_bytes(pages: RingPages, form: Callable[[bytes], bytes], length: int) -> None:
    """bytes, bytearray and memoryview leave the same packet, one by one and in a batch."""
    payload = counting(length)
    producer = RingProducer(pages.memory)
    producer.write(form(payload))
    if length < 5000:
        producer.write_many([form(payload), form(payload)])

    read = [packet[3] for packet in RingConsumer(pages.memory).drain()]
    assert read == [payload + bytes(-length % 8)] * (3 if length < 5000 else 1)


def test_batch_leaves_the_bytes_of_single_writes() -> None:
    """`write_many` is `write` for each, byte for byte, around the end of the ring."""
    payloads = [counting(length) for length in (0, 1, 8, 100, 4000, 64, 64, 300)]
    seen = []
    for batched in (False, True):
        with ring_pages("contiguous", data_pages=2) as pages:
            pages.start_at(pages.data_size - 200)
            producer = RingProducer(pages.memory)
            if batched:
                assert producer.write_many(payloads, 5, COMPLETION_REQUESTED) == (8, True)
            else:
                for number, payload in enumerate(payloads):
                    producer.write(payload, 5 + number, COMPLETION_REQUESTED)
            seen.append(pages.peek(0, pages.data_size) + pages.control_page())

    assert seen[0] == seen[1]


def test_packet_with_a_header_of_its_type(pages: RingPages) -> None:
    """GPA-direct: ranges between descriptor and payload; readers get the payload, or both, from any offset."""
    ranges = [GpaRange(100, 8, (0x123,)), GpaRange(8192, 0, (0x55, 0x66))]
    pages.start_at(pages.data_size - 40)
    producer = RingProducer(pages.memory)
    producer.write_with_header(
        pack_gpa_direct(ranges), b"request", VM_PKT_DATA_USING_GPA_DIRECT, 9, COMPLETION_REQUESTED
    )
    begin = pages.data_size - 40
    packet = pack_packet(b"request", 9, 1, VM_PKT_DATA_USING_GPA_DIRECT, pack_gpa_direct(ranges))

    assert pages.peek(begin, len(packet) + 8) == packet + pack_trailer(begin)
    ((packet_type, flags, trans_id, (header, payload)),) = RingConsumer(pages.attach()).drain_with_headers()
    assert (packet_type, flags, trans_id, payload) == (VM_PKT_DATA_USING_GPA_DIRECT, 1, 9, b"request\0")
    assert list(parse_gpa_direct(header)) == ranges
    pages.memory.words.store_read(begin)
    assert RingConsumer(pages.attach()).read() == (VM_PKT_DATA_USING_GPA_DIRECT, 1, 9, b"request\0")


def test_packet_with_a_header_may_find_the_ring_full(ring: RingMemory) -> None:
    """It is refused like any other, whole."""
    producer = RingProducer(ring)
    producer.write(bytes(4000))

    with pytest.raises(RingFull) as caught:
        producer.write_with_header(bytes(16), bytes(32), VM_PKT_DATA_USING_GPA_DIRECT)

    assert (caught.value.needed, caught.value.free) == (72, 4088 - 4024)
    assert producer.bytes_to_read == 4024


def test_kinds_of_packet_take_turns(ring: RingMemory) -> None:
    """Types and flags may change from packet to packet."""
    producer = RingProducer(ring)
    sent = [(VM_PKT_DATA_INBAND, 0), (VM_PKT_COMP, 0), (VM_PKT_DATA_INBAND, 1), (VM_PKT_DATA_INBAND, 0)]
    for packet_type, flags in sent:
        producer.write(b"", 1, flags, packet_type)
    for packet_type, flags in sent:
        producer.write_many([b""], 1, flags, packet_type)

    assert [(packet[0], packet[1]) for packet in RingConsumer(ring).drain()] == sent * 2


def test_init_zeroes_the_control_page_and_sets_the_feature_bit(pages: RingPages) -> None:
    """The guest's part before OPENCHANNEL, whatever the pages held; data is left as it is."""
    pages.dirty_control_page()
    pages.memory.init()

    expected = bytearray(PAGE_SIZE)
    expected[64] = 1
    assert pages.control_page() == bytes(expected)


def test_producer_init_begins_at_zero(ring: RingMemory) -> None:
    """A producer that initialises its ring goes on with the fresh indices."""
    producer = RingProducer(ring)
    producer.write(b"before")
    producer.init()
    producer.write(b"after")

    assert ring.words.load_write() == 32
    assert RingConsumer(ring).read() == (VM_PKT_DATA_INBAND, 0, 0, b"after\0\0\0")


def test_announce_promises_pending_sizes(ring: RingMemory) -> None:
    """What a host does to the ring it writes: feature bit set, no wish."""
    ring.words.store_features(0)
    ring.words.store_pending(800)
    RingProducer(ring).announce()

    assert (ring.words.load_features(), ring.words.load_pending()) == (1, 0)


# -- room -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("begin", [0, 8, 2048, 4088])
def test_largest_packet_and_one_byte_more(begin: int) -> None:
    """A packet may fill the ring but for 8 bytes; one byte more never fits, and is not waited for."""
    with ring_pages("contiguous") as pages:
        pages.start_at(begin)
        producer = RingProducer(pages.memory)
        largest = pages.data_size - 8 - 24

        for too_long in (largest + 1, largest + 5000):
            with pytest.raises(PacketTooLong) as caught:
                producer.write(bytes(too_long))
            assert caught.value.most == producer.capacity == 4088
        with pytest.raises(PacketTooLong):
            producer.write_many([bytes(largest + 1)])
        producer.write(counting(largest))
        assert producer.free_bytes == 0
        assert RingConsumer(pages.memory).read() == (VM_PKT_DATA_INBAND, 0, 0, counting(largest))


def test_packet_of_the_largest_len8() -> None:
    """524,280 bytes is what len8 can say; a larger packet fits no ring of any size."""
    with ring_pages("contiguous", data_pages=200) as pages:
        producer = RingProducer(pages.memory)
        producer.write(counting(MAX_PACKET_SIZE - 16))
        read = RingConsumer(pages.memory).read()

        assert read is not None
        assert read[3] == counting(MAX_PACKET_SIZE - 16)
        with pytest.raises(PacketTooLong) as caught:
            producer.write(bytes(MAX_PACKET_SIZE - 15))
        assert caught.value.most == MAX_PACKET_SIZE + 8


def test_full_ring_says_what_is_needed_and_what_is_free(ring: RingMemory) -> None:
    """RingFull carries both numbers, and changes nothing."""
    producer = RingProducer(ring)
    producer.write(bytes(3000))
    before = ring.words.load_write()

    with pytest.raises(RingFull) as caught:
        producer.write(bytes(1200))

    assert (caught.value.needed, caught.value.free) == (1224, 4088 - 3024)
    assert (ring.words.load_write(), producer.free_bytes) == (before, 4088 - 3024)


def test_ring_is_full_only_when_it_is(ring: RingMemory) -> None:
    """Packets that fill it to the last usable byte fit; after a release the same again, all the way around."""
    producer, consumer = RingProducer(ring), RingConsumer(ring)
    for _ in range(50):
        for _ in range(4088 // 56):
            producer.write(bytes(32))
        with pytest.raises(RingFull):
            producer.write(bytes(32))
        assert len(list(consumer.drain())) == 4088 // 56

    assert producer.bytes == consumer.bytes == 50 * (4088 // 56) * 56


def test_full_counters_are_the_kernels(ring: RingMemory) -> None:
    """`out_full_total` counts refusals; `out_full_first` those that followed a write that went in."""
    producer, consumer = RingProducer(ring), RingConsumer(ring)
    for _ in range(2):
        producer.write(bytes(4000))
        for _ in range(3):
            with pytest.raises(RingFull):
                producer.write(bytes(4000))
        assert consumer.read() is not None

    assert (producer.out_full_total, producer.out_full_first) == (6, 2)


def test_batch_that_does_not_fit_is_cut(ring: RingMemory) -> None:
    """`write_many` says how many fitted; those are readable, the rest can be sent later."""
    producer, consumer = RingProducer(ring), RingConsumer(ring)
    payloads = [bytes([number]) * 500 for number in range(20)]
    written, must_signal = producer.write_many(payloads)

    assert (written, must_signal) == (4088 // 528, True)
    assert producer.out_full_total == 1
    assert producer.write_many(payloads[written:]) == (0, False)
    assert [packet[3][:500] for packet in consumer.drain()] == payloads[:written]
    assert producer.write_many(payloads[written:])[0] == written


def test_batch_ends_before_a_packet_that_never_fits(ring: RingMemory) -> None:
    """Those before it are written; it alone raises PacketTooLong, when it is the first."""
    producer = RingProducer(ring)
    payloads = [b"one", b"two", bytes(5000), b"three"]

    assert producer.write_many(payloads)[0] == 2
    with pytest.raises(PacketTooLong):
        producer.write_many(payloads[2:])
    assert producer.bytes == 2 * 32


@pytest.mark.parametrize(
    ("ids", "expected"), [(0, [0, 0, 0]), (7, [7, 8, 9]), ([4, 2, 1 << 63], [4, 2, 1 << 63]), (iter([5, 6]), [5, 6])]
)
def test_transaction_ids_of_a_batch(ring: RingMemory, ids: int | list[int], expected: list[int]) -> None:
    """None, counted up, or given one by one; when they run out the batch ends."""
    RingProducer(ring).write_many([b"a", b"b", b"c"], ids)

    assert [packet[2] for packet in RingConsumer(ring).drain()] == expected


@pytest.mark.parametrize("batches_before", [0, 1])
def test_batches_publish_an_eighth_at_a_time(batches_before: int) -> None:
    """The reader may begin while the writer still copies: at most an eighth of the ring stays back.

    Also of a batch whose payloads have the length of those before, which is stored at once where it is small.
    """
    with ring_pages("contiguous", data_pages=8) as pages:
        indices: list[int] = []
        words = pages.memory.words

        def store(index: int) -> None:
            indices.append(index)
            words.store_write(index)

        producer = RingProducer(pages.memory, words=replace(words, store_write=store))
        for _ in range(batches_before):
            producer.write_many([bytes(1000)] * SHORTEST_RUN)
        begin = SHORTEST_RUN * 1024 * batches_before
        indices.clear()
        written, _ = producer.write_many([bytes(1000)] * 25)

    assert written == 25
    assert indices == [begin + 4096 * step for step in range(1, 7)] + [begin + 25 * 1024]
    assert producer.bytes == begin + 25 * 1024


# -- reading --------------------------------------------------------------------------------------


def test_drain_releases_an_eighth_at_a_time() -> None:
    """The writer gets room back while the reader still reads, and all of it at the end."""
    with ring_pages("contiguous", data_pages=8) as pages:
        producer, consumer = RingProducer(pages.memory), RingConsumer(pages.memory)
        producer.write_many([bytes(1000)] * 25)
        seen = [pages.memory.words.load_read() for _ in consumer.drain()]

        assert seen == [at // 4 * 4096 for at in range(25)]
        assert pages.memory.words.load_read() == 25 * 1024
        assert (consumer.releases, consumer.packets, consumer.bytes) == (7, 25, 25 * 1024)


def test_drain_left_early_releases_what_it_handed_out(ring: RingMemory) -> None:
    """A reader that breaks off has read the packets it got, and no others."""
    producer, consumer = RingProducer(ring), RingConsumer(ring)
    producer.write_many([b"1", b"2", b"3"])
    for packet in consumer.drain():
        if packet[3][:1] == b"2":
            break

    assert consumer.bytes_to_read == 32
    assert [packet[3][:1] for packet in consumer.drain()] == [b"3"]


def test_limited_drain_stops_there(ring: RingMemory) -> None:
    """`limit` packets at most, the rest later."""
    producer, consumer = RingProducer(ring), RingConsumer(ring)
    producer.write_many([bytes([number]) for number in range(5)])

    assert [[packet[3][0] for packet in consumer.drain(2)] for _ in range(4)] == [[0, 1], [2, 3], [4], []]
    assert producer.bytes_to_read == 0


def test_drain_takes_what_arrives_meanwhile(ring: RingMemory) -> None:
    """The ring is left only when a second look finds it empty."""
    producer, consumer = RingProducer(ring), RingConsumer(ring)
    producer.write(b"\1")
    read = []
    for packet in consumer.drain():
        read.append(packet[3][0])
        if len(read) < 300:
            producer.write(bytes([(len(read) + 1) & 0xFF]))

    assert read == [number & 0xFF for number in range(1, 301)]


def test_read_takes_one_packet(ring: RingMemory) -> None:
    """One packet, released at once; None from an empty ring."""
    producer, consumer = RingProducer(ring), RingConsumer(ring)
    producer.write_many([b"1", b"2"])

    assert [consumer.read(), producer.bytes_to_read] == [(VM_PKT_DATA_INBAND, 0, 0, b"1".ljust(8, b"\0")), 32]
    assert consumer.read() is not None
    assert consumer.read() is None


def test_second_drain_before_the_first_is_closed_is_our_mistake(ring: RingMemory) -> None:
    """Two drains of one ring would hand out a packet twice."""
    RingProducer(ring).write_many([b"1", b"2"])
    consumer = RingConsumer(ring)
    first = consumer.drain()
    next(first)

    with pytest.raises(AssertionError):
        next(consumer.drain())
    first.close()
    assert len(list(consumer.drain())) == 1


# -- attaching ------------------------------------------------------------------------------------


def test_ends_attach_to_a_ring_in_use(pages: RingPages) -> None:
    """Fresh objects over other mappings go on where the last ones stopped."""
    sent = []
    read = []
    for number in range(200):
        producer = RingProducer(pages.memory)
        payload = counting(number).ljust(number + -number % 8, b"\0")
        producer.write(payload)
        sent.append(payload)
        if number % 3 == 2:
            consumer = RingConsumer(pages.memory)
            read += [packet[3] for packet in consumer.drain(2 + number % 2)]
    other = pages.attach()
    read += [packet[3] for packet in RingConsumer(other).drain()]

    assert read == sent


def test_several_producers_and_consumers_take_turns(pages: RingPages) -> None:
    """With `sole=False` each write and each drain begins where the others stopped; counters count their own."""
    producers = [RingProducer(memory, sole=False) for memory in (pages.memory, pages.attach(), pages.memory)]
    consumers = [RingConsumer(memory, sole=False) for memory in (pages.memory, pages.attach())]
    read = []
    for number in range(600):
        producer = producers[number % 3]
        if number % 2:
            producer.write(number.to_bytes(2, "big") * 50)
        else:
            producer.write_many([number.to_bytes(2, "big") * 50])
        if number % 40 == 39:
            read += [packet[3][:2] for packet in consumers[number // 40 % 2].drain()]

    assert read == [number.to_bytes(2, "big") for number in range(600)]
    assert [producer.bytes for producer in producers] == [200 * 128] * 3
    assert sum(consumer.bytes for consumer in consumers) == 600 * 128


def test_batches_of_several_producers_stay_whole(ring: RingMemory) -> None:
    """Packets alike, which are stored together: whoever writes begins where the last writer ended."""
    producers = [RingProducer(ring, sole=False) for _ in range(2)]
    consumer, read = RingConsumer(ring), []
    for number in range(40):
        batch = [bytes([number]) * 32] * 8
        assert producers[number % 3 == 0].write_many(batch)[0] == 8
        if number % 3 == 2:
            read += [packet[3][0] for packet in consumer.drain()]
    read += [packet[3][0] for packet in consumer.drain()]

    assert read == [number for number in range(40) for _ in range(8)]


def test_several_producers_never_overrun_the_reader(ring: RingMemory) -> None:
    """Whoever writes looks at the room there is now, even when the indices stand where it left them."""
    first, second = RingProducer(ring, sole=False), RingProducer(ring, sole=False)
    consumer = RingConsumer(ring)
    first.write(bytes(1000))
    assert consumer.read() is not None
    for _ in range(3):  # once around, so that write_index is what `first` left
        second.write(bytes(1000))
        assert consumer.read() is not None
    second.write(bytes(968))
    for _ in range(3):
        second.write(bytes(1000))

    with pytest.raises(RingFull):
        first.write(bytes(1000))
    assert len(list(consumer.drain())) == 4


# -- closing --------------------------------------------------------------------------------------


def test_closed_ring_is_not_touched(pages: RingPages) -> None:
    """After `close` every use is an error of Python's, not a crash; closing twice does no harm."""
    producer, consumer = RingProducer(pages.memory), RingConsumer(pages.memory)
    producer.write(b"packet")
    pages.memory.close()
    pages.memory.close()

    uses: list[Callable[[], object]] = [
        lambda: producer.write(b"x"),
        lambda: producer.write_many([b"x"]),
        lambda: list(consumer.drain()),
        lambda: producer.free_bytes,
        consumer.begin_read,
        consumer.end_read,
        pages.memory.init,
    ]
    for use in uses:
        with pytest.raises((ValueError, TypeError)):
            use()


def test_ring_closes_under_a_suspended_drain(pages: RingPages) -> None:
    """Neither an unfinished iterator nor a saved exception keeps the mapping alive."""
    producer, consumer = RingProducer(pages.memory), RingConsumer(pages.memory)
    producer.write_many([b"1", b"2"])
    drain = consumer.drain()
    next(drain)
    saved: list[BaseException] = []
    try:
        producer.write(bytes(1 << 15))
    except PacketTooLong as error:
        saved.append(error)
    pages.memory.close()

    drain.close()
    assert saved[0].__traceback__ is not None
