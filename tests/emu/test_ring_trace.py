"""A recorded ring: what is recorded of a publish, and which bytes of it are kept."""

from __future__ import annotations

import pytest

from emu.ring import RingConsumer, RingProducer
from emu.ring_trace import SNAP_BYTES, recorded
from emu.tracing import E_RING_ATTACH, E_RING_PUBLISH, E_RING_RELEASE, OneByOne
from tests.emu.ring_pages import KINDS, ring_pages


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
