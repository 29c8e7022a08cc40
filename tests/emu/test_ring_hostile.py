"""A peer that writes nonsense into the ring: refused by name, nothing trusted twice, nothing else touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu.errors import ProtocolViolation, RingFull
from emu.memory import PAGE_SIZE
from emu.ring import RingConsumer, RingMemory, RingProducer
from emu.ring_memory import Pack, PackRun, Seal, Unpack, UnpackRun
from emu.ring_packets import Plans, Shapes
from emu.wire.packets import COMPLETION_REQUESTED, DESCRIPTOR, VM_PKT_DATA_INBAND, parse_gpa_direct, parse_xfer_pages
from emu.wire.ring_layout import PENDING_SEND_SZ, READ_INDEX, WRITE_INDEX
from tests.emu.ring_pages import KINDS, RingPages, ring_pages

DATA_SIZE = PAGE_SIZE
IMPOSSIBLE_INDICES = [1, 4, 7, 12, DATA_SIZE - 1, DATA_SIZE, DATA_SIZE + 8, 0x7FFF_FFF8, 0xFFFF_FFF8, 0xFFFF_FFFF]


@pytest.fixture(params=KINDS)
def pages(request: pytest.FixtureRequest) -> Iterator[RingPages]:
    """A ring of one data page, over each kind of memory."""
    with ring_pages(request.param) as ring:
        yield ring


@pytest.mark.parametrize("index", IMPOSSIBLE_INDICES)
@pytest.mark.parametrize("field", ["write_index", "read_index"])
def test_ring_whose_indices_cannot_be_is_not_attached(field: str, index: int) -> None:
    """Beyond the data or off the 8-byte grid: neither end attaches."""
    memory = RingMemory.on(bytearray(PAGE_SIZE + DATA_SIZE))
    memory.init()
    {"write_index": memory.words.store_write, "read_index": memory.words.store_read}[field](index)

    for end in (RingProducer, RingConsumer):
        with pytest.raises(ProtocolViolation) as caught:
            end(memory)
        assert (caught.value.rule, caught.value.field, caught.value.value) == ("ring-index", field, index)


@pytest.mark.parametrize("index", IMPOSSIBLE_INDICES)
def test_write_index_that_cannot_be_is_refused(pages: RingPages, index: int) -> None:
    """The reader refuses it at every look, and its own read_index stays."""
    producer, consumer = RingProducer(pages.memory), RingConsumer(pages.memory)
    producer.write(b"x")
    consumer.read()
    pages.memory.words.store_write(index)

    looks: tuple[Callable[[], object], ...] = (
        lambda: list(consumer.drain()),
        consumer.read,
        consumer.end_read,
        consumer.hold,
        lambda: consumer.bytes_to_read,
    )
    for look in looks:
        with pytest.raises(ProtocolViolation) as caught:
            look()
        assert (caught.value.rule, caught.value.field, caught.value.value) == ("ring-index", "write_index", index)
    assert pages.memory.words.load_read() == 32


@pytest.mark.parametrize("index", IMPOSSIBLE_INDICES)
@pytest.mark.parametrize("sole", [True, False])
def test_read_index_that_cannot_be_is_refused(index: int, sole: bool) -> None:
    """The writer refuses it wherever it needs the room, and writes nothing."""
    memory = RingMemory.on(bytearray(PAGE_SIZE + DATA_SIZE))
    memory.init()
    producer = RingProducer(memory, sole=sole)
    memory.words.store_read(index)

    uses = (
        lambda: producer.write(bytes(100)),
        lambda: producer.write_many([bytes(100)]),
        lambda: producer.want_room(100),
        lambda: producer.free_bytes,
        lambda: producer.bytes_to_read,
        producer.check_read_index,
    )
    for use in uses:
        with pytest.raises(ProtocolViolation) as caught:
            use()
        assert (caught.value.rule, caught.value.field) == ("ring-index", "read_index")
    assert memory.words.load_write() == 0


def test_read_index_that_claims_too_little_was_read_only_stops_the_writer() -> None:
    """A reader that moves back keeps its own ring full: no harm to anybody else."""
    memory = RingMemory.on(bytearray(PAGE_SIZE + DATA_SIZE))
    memory.init()
    producer = RingProducer(memory)
    for _ in range(3):
        producer.write(bytes(1000))
    memory.words.store_read(producer.bytes_to_read + 8)

    with pytest.raises(RingFull):
        for _ in range(3):
            producer.write(bytes(1000))


def test_own_index_in_the_ring_is_not_read_again(pages: RingPages) -> None:
    """A sole end keeps its own index: who overwrites that word confuses nobody for longer than to the next store."""
    producer, consumer = RingProducer(pages.memory), RingConsumer(pages.attach())
    read = []
    for number in range(300):
        pages.memory.words.store_write(8 * (number % 500))
        producer.write(number.to_bytes(8, "little"))
        pages.memory.words.store_read(8 * (7 * number % 500))
        read += [int.from_bytes(packet[3], "little") for packet in consumer.drain()]

    assert read == list(range(300))


def test_write_index_that_moves_back_is_refused() -> None:
    """Bytes that were handed out cannot be unpublished."""
    memory = RingMemory.on(bytearray(PAGE_SIZE + DATA_SIZE))
    memory.init()
    producer, consumer = RingProducer(memory), RingConsumer(memory)
    producer.write_many([b"a", b"b", b"c"])
    read = []
    with pytest.raises(ProtocolViolation) as caught:
        for packet in consumer.drain():
            read.append(packet[3][:1])
            memory.words.store_write(32)

    assert (caught.value.rule, caught.value.field) == ("ring-index", "write_index")
    assert read == [b"a", b"b", b"c"]
    assert memory.words.load_read() == 96


RULES = {"ring-index", "packet-type", "packet-flags", "packet-length", "packet-offset", "pending-send-size"}

BAD_DESCRIPTORS = {
    "no length at all": ((6, 2, 0, 0), "packet-length", "len8", 0),
    "shorter than its descriptor": ((6, 2, 1, 0), "packet-length", "len8", 1),
    "longer than what is there": ((6, 2, 6, 0), "packet-length", "len8", 6),
    "no room for the trailer": ((6, 2, 5, 0), "packet-length", "len8", 5),
    "as long as can be said": ((6, 2, 0xFFFF, 0), "packet-length", "len8", 0xFFFF),
    "payload inside the descriptor": ((6, 1, 4, 0), "packet-offset", "offset8", 1),
    "payload at byte 0": ((6, 0, 4, 0), "packet-offset", "offset8", 0),
    "payload past the end": ((6, 5, 4, 0), "packet-offset", "offset8", 5),
    "payload far past the end": ((6, 0xFFFF, 4, 0), "packet-offset", "offset8", 0xFFFF),
    "invalid type": ((0, 2, 4, 0), "packet-type", "type", 0),
    "type that nobody sends": ((8, 2, 4, 0), "packet-type", "type", 8),
    "unknown type": ((0xFFFF, 2, 4, 0), "packet-type", "type", 0xFFFF),
    "unknown flags": ((6, 2, 4, 2), "packet-flags", "flags", 2),
    "flags beside the known one": ((6, 2, 4, 0x8001), "packet-flags", "flags", 0x8001),
}


@pytest.mark.parametrize("name", BAD_DESCRIPTORS)
@pytest.mark.parametrize("begin", [0, 4040])
def test_bad_descriptor_is_refused_by_name(pages: RingPages, name: str, begin: int) -> None:
    """40 bytes are published behind a good packet: that one is handed out, then the ring stops there."""
    (packet_type, offset8, len8, flags), rule, field, value = BAD_DESCRIPTORS[name]
    pages.start_at(begin)
    RingProducer(pages.memory).write(b"good")
    bad = (begin + 32) % DATA_SIZE
    pages.poke(bad, DESCRIPTOR.pack(packet_type, offset8, len8, flags, 0))
    pages.memory.words.store_write((bad + 40) % DATA_SIZE)
    consumer = RingConsumer(pages.memory)
    for _ in range(2):  # and again at the next look
        with pytest.raises(ProtocolViolation) as caught:
            list(consumer.drain())

        assert (caught.value.rule, caught.value.field, caught.value.value) == (rule, field, value)
    assert consumer.packets == 1
    assert pages.memory.words.load_read() == bad


def test_packets_before_the_fault_are_handed_out(pages: RingPages) -> None:
    """A batch with a bad packet in it is read up to there."""
    producer = RingProducer(pages.memory)
    producer.write_many([b"1", b"2", b"3"])
    pages.poke(64, DESCRIPTOR.pack(6, 2, 1, 0, 0))
    consumer = RingConsumer(pages.memory)
    read = []
    with pytest.raises(ProtocolViolation):
        for packet in consumer.drain():
            read.append(packet[3][:1])

    assert read == [b"1", b"2"]
    assert producer.bytes_to_read == 32


def test_range_counts_are_checked_against_the_header(pages: RingPages) -> None:
    """GPA-direct and transfer-page packets whose ranges do not fit their header are refused by their parsers."""
    producer = RingProducer(pages.memory)
    empty_gpa_direct = bytes(8)
    too_many = (0).to_bytes(4, "little") + (9).to_bytes(4, "little") + bytes(16)
    xfer_pages = bytes.fromhex("feca 00 00 03000000") + bytes(16)
    producer.write_with_header(empty_gpa_direct, b"", 9)
    producer.write_with_header(too_many, b"", 9)
    producer.write_with_header(xfer_pages, b"", 7)
    headers = [packet[3][0] for packet in RingConsumer(pages.memory).drain_with_headers()]

    for parse, header in zip((parse_gpa_direct, parse_gpa_direct, parse_xfer_pages), headers, strict=True):
        with pytest.raises(ProtocolViolation):
            parse(header)


class SwitchingMemory(RingMemory):
    """A ring whose peer rewrites each descriptor between the look at it and the copy of the packet."""

    def __init__(self, pages: RingPages) -> None:
        self._pages = pages
        real = pages.memory
        self.buffer, self.headers, self.words = real.buffer, real.headers, real.words
        self.data_size, self.closed = real.data_size, False

    def _switch(self, offset: int) -> None:
        self._pages.poke(offset, DESCRIPTOR.pack(0xDEAD, 0xFFFF, 0xFFFF, 0xFFFF, 1234)[:8])

    def unpacker(self, start: int, length: int) -> Unpack:
        real = self._pages.memory.unpacker(start, length)

        def switch_then_copy(buffer: object, offset: int) -> tuple[int, bytes]:
            self._switch(offset)
            trans_id, payload = real(buffer, offset)
            return trans_id, payload

        return switch_then_copy

    def run_unpacker(self, start: int, length: int, word: int) -> UnpackRun:
        real = self._pages.memory.run_unpacker(start, length, word)

        def switch_then_copy(offset: int, count: int) -> tuple[list[int], Sequence[bytes]] | None:
            self._switch(offset)
            return real(offset, count)

        return switch_then_copy

    def viewer(self, start: int, length: int) -> Unpack:
        real = self._pages.memory.viewer(start, length)

        def switch_then_show(buffer: object, offset: int) -> tuple[int, memoryview]:
            self._switch(offset)
            trans_id, payload = real(buffer, offset)
            return trans_id, payload

        return switch_then_show

    def packer(self, length: int, padding: int) -> Pack:
        return self._pages.memory.packer(length, padding)

    def run_packer(self, length: int, padding: int, word: bytes) -> PackRun:
        return self._pages.memory.run_packer(length, padding, word)

    def reserve(self, offset: int, length: int, padding: int, word: bytes) -> tuple[memoryview, Seal]:
        return self._pages.memory.reserve(offset, length, padding, word)

    def clear_control_page(self) -> None:
        self._pages.memory.clear_control_page()

    def close(self) -> None:
        self._pages.memory.close()


def test_descriptor_is_fetched_once(pages: RingPages) -> None:
    """What was checked is what is used: lengths, type and flags come from one copy of the word."""
    RingProducer(pages.memory).write_many([b"one", b"two"], 7, COMPLETION_REQUESTED)

    assert list(RingConsumer(SwitchingMemory(pages)).drain()) == [
        (VM_PKT_DATA_INBAND, 1, 7, b"one".ljust(8, b"\0")),
        (VM_PKT_DATA_INBAND, 1, 8, b"two".ljust(8, b"\0")),
    ]


def test_tables_are_bounded() -> None:
    """A peer that never sends the same descriptor twice makes neither table grow without end."""
    memory = RingMemory.on(bytearray(PAGE_SIZE + DATA_SIZE))
    plans, shapes = Plans(memory), Shapes(memory, VM_PKT_DATA_INBAND, 0)
    most_plans = most_shapes = 0
    for number in range(10_000):
        plans.add(6 | 2 << 16 | (2 + number) << 32)
        shapes.add(number)
        most_plans, most_shapes = max(most_plans, len(plans.table)), max(most_shapes, len(shapes.table))

    assert (most_plans, most_shapes) == (1024, 4096)


@given(
    words=st.tuples(*[st.integers(0, 0xFFFF_FFFF) | st.integers(0, 600).map(lambda n: 8 * n)] * 3),
    data=st.lists(
        st.tuples(
            st.sampled_from([6, 7, 9, 0xB, 0, 0xFFFF]),
            st.integers(0, 8),
            st.integers(0, 40),
            st.sampled_from([0, 1, 2]),
            st.integers(0, 2**64 - 1),
        ),
        max_size=12,
    ),
    headers=st.booleans(),
)
def test_arbitrary_rings_end_in_packets_or_a_violation(
    words: tuple[int, int, int], data: list[tuple[int, int, int, int, int]], headers: bool
) -> None:
    """Whatever the ring's bytes are, a drain ends, with packets that were published or with a refusal."""
    buffer = bytearray(PAGE_SIZE + DATA_SIZE)
    memory = RingMemory.on(buffer)
    memory.init()
    at = PAGE_SIZE
    for one in data:
        buffer[at : at + 16] = DESCRIPTOR.pack(*one)
        at += 8 * one[2] + 8
    for offset, value in zip((WRITE_INDEX, READ_INDEX, PENDING_SEND_SZ), words, strict=True):
        buffer[offset : offset + 4] = value.to_bytes(4, "little")
    taken = 0
    try:
        consumer = RingConsumer(memory)
        published = consumer.bytes_to_read
        for _ in consumer.drain_with_headers() if headers else consumer.drain():
            taken += 1
        assert consumer.bytes == published
    except ProtocolViolation as violation:
        assert violation.rule in {
            "ring-index",
            "packet-type",
            "packet-flags",
            "packet-length",
            "packet-offset",
            "pending-send-size",
        }
    assert taken <= DATA_SIZE // 24
