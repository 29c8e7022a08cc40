"""A recorded ring: what is recorded of a publish, and which bytes of it are kept."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from emu.ipc.segments import Segment
from emu.ring import RingConsumer, RingProducer
from emu.ring_memory import Payload
from emu.ring_trace import SNAP_BYTES, recorded
from emu.tracing import (
    CAPACITY,
    E_EOM,
    E_RING_ATTACH,
    E_RING_PUBLISH,
    E_RING_RELEASE,
    RECORD,
    TRACE_BYTES,
    BytesRecorder,
    Drain,
    OneByOne,
    Recorder,
)
from emu.wire.packets import VM_PKT_COMP, VM_PKT_DATA_INBAND, VM_PKT_DATA_USING_GPA_DIRECT
from tests.emu.ring_pages import KINDS, RingPages, ring_pages


class Recorded(OneByOne):
    """A recorder that remembers."""

    def __init__(self, *, keeps_bytes: bool) -> None:
        self.keeps_bytes = keeps_bytes
        self.records: list[tuple[int, ...]] = []
        self.kept: list[bytes] = []

    def record(self, *what: int) -> None:
        """Remember a record."""
        self.records.append(what)

    def keep(self, data: bytes) -> None:
        """Remember bytes, behind the record that they are about."""
        assert self.records[-1][0] == E_RING_PUBLISH
        self.kept.append(data)


@pytest.mark.parametrize("kind", KINDS)
def test_first_bytes_of_a_publish_are_kept(kind: str) -> None:
    """Of a small packet all, also over the end of the ring; of a large one as many as `SNAP_BYTES`."""
    with ring_pages(kind) as ring:
        begin = ring.data_size - 16
        ring.start_at(begin)
        recorder = Recorded(keeps_bytes=True)
        producer = RingProducer(ring.memory, words=recorded(ring.memory, recorder, 7, 0))  # type: ignore[arg-type]
        producer.write(b"x" * 24, 5)
        producer.write(b"y" * 1000, 6)

        small, large = 16 + 24 + 8, 16 + 1000 + 8
        assert recorder.records == [
            (E_RING_ATTACH, 7, 0, ring.data_size, begin, begin),
            (E_RING_PUBLISH, 7, 0, 32, small),
            (E_RING_PUBLISH, 7, 0, 32 + large, large),
        ]
        assert recorder.kept == [ring.peek(begin, small), ring.peek(32, SNAP_BYTES)]


def test_without_being_asked_no_bytes_are_looked_at() -> None:
    """An ordinary recording has the indices only."""
    with ring_pages("bytearray") as ring:
        recorder = Recorded(keeps_bytes=False)
        producer = RingProducer(ring.memory, words=recorded(ring.memory, recorder, 7, 0))  # type: ignore[arg-type]
        producer.write(b"x" * 24, 5)

        assert recorder.kept == []


def test_publish_is_recorded_before_it_can_be_read() -> None:
    """A reader that is awake releases at once and records that; the publish has the earlier time."""
    with ring_pages("bytearray") as ring:
        words = ring.memory.words
        seen: list[int] = []

        class Watching(Recorded):
            """A recorder that notes how far a reader could read."""

            def record(self, *what: int) -> None:
                """Note the write index."""
                super().record(*what)
                seen.append(words.load_write())

        recorder = Watching(keeps_bytes=False)
        producer = RingProducer(ring.memory, words=recorded(ring.memory, recorder, 7, 0))  # type: ignore[arg-type]
        producer.write(b"x" * 24, 5)

        assert (seen, words.load_write()) == ([0, 0], 48)


@pytest.mark.parametrize("packets", [1, 32])
def test_batch_is_one_record_at_either_end(packets: int) -> None:
    """Nothing is recorded for a packet: a publish is one record however many packets it is for, and so is a release
    (of up to an eighth of the ring)."""
    with ring_pages("bytearray", data_pages=8) as ring:
        recorder = Recorded(keeps_bytes=False)
        words = recorded(ring.memory, recorder, 7, 0)  # type: ignore[arg-type]
        producer, consumer = RingProducer(ring.memory, words=words), RingConsumer(ring.memory, words=words)
        del recorder.records[:]
        end = packets * (16 + 8 + 8)
        producer.write_many([bytes(8)] * packets)
        assert len(consumer.read_many()) == packets

        assert recorder.records == [(E_RING_PUBLISH, 7, 0, end, end), (E_RING_RELEASE, 7, 0, end, end)]


# -- batches that write their record themselves ---------------------------------------------------

HEAD_OF_FIRST = 4096
"""Where the trace segment has the count of the first actor's records."""


@contextmanager
def trace_segment(count: int = 0) -> Iterator[Segment]:
    """A trace segment of nobody's machine, whose first actor has `count` records behind it."""
    fd = os.memfd_create("trace")
    os.ftruncate(fd, TRACE_BYTES)
    with closing(Segment("trace", fd, TRACE_BYTES)) as segment:
        segment.view.store_u64(HEAD_OF_FIRST, count)
        yield segment


def records_of(segment: Segment, since: int = 0) -> list[tuple[int, ...]]:
    """What the first actor recorded after its first `since` records: all but the times, which must go up."""
    drain = Drain(segment)
    records = list(RECORD.iter_unpack(drain.take(0)))[-(segment.view.load_u64(HEAD_OF_FIRST) - since) :]
    assert [record[0] for record in records] == sorted(record[0] for record in records)
    return [record[1:] for record in records]


Step = tuple[str, int, int]
"""What a writer does: how, so many packets, of so many bytes."""
STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["batch", "ids", "views", "other kind", "none", "one", "one of another kind", "header", "event", "room"]
        ),
        st.sampled_from([1, 6, 7, 20]),
        st.sampled_from([0, 8, 64, 300]),
    ),
    max_size=30,
)


def follow(pages: RingPages, producer: RingProducer, recorder: Recorder, steps: list[Step]) -> list[object]:
    """Do these steps; what each returned."""
    reader = RingConsumer(pages.attach())
    done: list[object] = []
    for number, (how, count, length) in enumerate(steps):
        payloads: list[Payload] = [bytes([number]) * length for _ in range(count)]
        match how:
            case "batch":
                done.append(producer.write_many(payloads))
            case "ids":
                done.append(producer.write_many(payloads, 7))
            case "views":
                done.append(producer.write_many([*payloads[:-1], memoryview(payloads[-1])]))
            case "other kind":
                done.append(producer.write_many(payloads, 0, 1, VM_PKT_COMP))
            case "none":
                done.append(producer.write_many([]))
            case "one" if producer.free_bytes > 400:
                done.append(producer.write(payloads[0]))
            case "one of another kind" if producer.free_bytes > 400:
                done.append(producer.write(payloads[0], 0, 0, VM_PKT_COMP))
            case "header" if producer.free_bytes > 400:
                done.append(producer.write_with_header(bytes(8), payloads[0], VM_PKT_DATA_USING_GPA_DIRECT))
            case "event":
                recorder.record(E_EOM, number)
            case _:
                done.append(len(reader.read_many()))
        done.append((producer.bytes, producer.batch_bytes))
    return done


@settings(max_examples=60, deadline=None)
@given(STEPS, st.sampled_from(KINDS), st.sampled_from([0, CAPACITY - 5, (1 << 32) - 5]))
@example([("batch", 6, 8)] * 6, "contiguous", CAPACITY - 5)
@example([("batch", 6, 8)] * 6, "contiguous", (1 << 32) - 5)
@example([("none", 6, 8)] * 2, "contiguous", 0)
@example([*[("batch", 6, 8)] * 3, ("header", 6, 8), ("batch", 6, 8)], "contiguous", 0)
@example([*[("batch", 6, 8)] * 3, ("one of another kind", 6, 8), ("batch", 6, 8)], "contiguous", 0)
@example([*[("batch", 20, 64)] * 10, ("room", 6, 0), ("batch", 1, 64)], "contiguous", 0)
def test_batch_records_itself_as_its_store_would(steps: list[Step], kind: str, count: int) -> None:
    """Batches of any kind between single packets and other events: the records, the bytes and the answers are those of
    a writer whose store of the index records; also over the end of the recorder's ring and of its sequence."""
    seen = []
    for by_itself in (False, True):
        with trace_segment(count) as segment, ring_pages(kind, data_pages=4) as pages:
            pages.start_at(64)
            recorder = Recorder(segment, 0)
            words = recorded(pages.memory, recorder, 7, 1, sole=True)
            assert words.publishes is not None
            producer = RingProducer(pages.memory, words=words if by_itself else replace(words, publishes=None))
            done = follow(pages, producer, recorder, steps)
            seen.append((done, records_of(segment, count), pages.peek(0, pages.data_size), pages.control_page()))

    assert seen[0] == seen[1]


@pytest.mark.parametrize("kind", KINDS)
def test_record_of_a_batch_is_there_before_its_packets(kind: str) -> None:
    """When write_index is stored the record is there, with what that index will be; each batch has one."""
    with trace_segment() as segment, ring_pages(kind, data_pages=4) as pages:
        pages.start_at(0)
        drain = Drain(segment)
        seen: list[tuple[int, ...]] = []
        store = pages.memory.words.store_write

        def watched(index: int) -> None:
            seen.extend((index, *record[7:9]) for record in RECORD.iter_unpack(drain.take(0)))
            store(index)

        pages.memory.words = replace(pages.memory.words, store_write=watched)
        words = recorded(pages.memory, Recorder(segment, 0), 7, 1, sole=True)
        drain.take(0)
        producer = RingProducer(pages.memory, words=words)
        for _ in range(3):
            producer.write_many([bytes(8)] * 10, 0, 0, VM_PKT_DATA_INBAND)

        assert seen == [(320, 320, 320), (640, 640, 320), (960, 960, 320)]


def test_only_a_lone_writer_in_one_context_records_batches_itself() -> None:
    """Who shares the ring, records masks, or keeps the bytes has a store that records, and so has a ring without any
    recording none."""
    with trace_segment() as segment, ring_pages("bytearray") as pages:
        recorder = Recorder(segment, 0)
        alone = [
            recorded(pages.memory, recorder, 7, 1, sole=True),
            recorded(pages.memory, recorder, 7, 1),
            recorded(pages.memory, recorder, 7, 1, sole=True, masks=True),
            recorded(pages.memory, BytesRecorder(segment, 1), 7, 1, sole=True),
            recorded(pages.memory, Recorded(keeps_bytes=False), 7, 1, sole=True),  # type: ignore[arg-type]
            pages.memory.words,
        ]

        assert [words.publishes is not None for words in alone] == [True, False, False, False, False, False]
