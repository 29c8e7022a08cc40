"""The VMBus ring buffer: one writer, one reader, a page of indices and a data area.

The ring is handed its memory and signals nobody: `write` and `take_signal` say whether the other end must be
interrupted, and the caller sees to it. Nothing that the peer can write is trusted: indices are copied out and
then checked, the lengths of a packet are fetched once, and what is wrong is a `ProtocolViolation`.

Two rules decide every signal (`hv_signal_on_write`, `hv_pkt_iter_close`):

- *data arrived*: only if the reader asks for interrupts, and had read all there was before this publish;
- *room again*: only if the writer said how much it waits for, and this release is the one that made it
  enough.

Each word has one writer. The producer stores write_index after the packet's bytes, and only then looks at
interrupt_mask, then read_index. The consumer stores read_index after its copies, and only then looks at
pending_send_sz, then write_index. Each store needs a full barrier behind it, or both sides could miss each
other; all stores here are sequentially consistent, and so have one.

Work on a ring goes on in one place at a time: producers in several processes share a lock, and a drain is
closed before the next begins. Instrumented rings are the same classes over other `RingWords`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Generator, Iterable, Sequence
from itertools import count, islice, repeat
from typing import Any, Protocol, TypeVar

from emu.errors import ProtocolViolation, RingFull
from emu.ring_memory import Payload, RingMemory, RingWords
from emu.ring_packets import PacketTooLong, Plans, Shapes
from emu.wire.packets import TRAILER_SIZE, VM_PKT_DATA_INBAND, ring_bytes
from emu.wire.ring_layout import ALIGNMENT, FEAT_PENDING_SEND_SZ

__all__ = ["Packet", "PacketTooLong", "RingConsumer", "RingMemory", "RingProducer", "RingWords"]

T = TypeVar("T")

Packet = tuple[int, int, int, bytes]
"""Packet type, flags, trans_id, payload (whose padding the wire cannot tell from its bytes)."""


def _checked(index: int, data_size: int, field: str) -> int:
    """Return an index of the peer's if it can be one."""
    if index >= data_size or index % ALIGNMENT:
        raise _impossible(index, data_size, field)
    return index


def _impossible(index: int, data_size: int, field: str) -> ProtocolViolation:
    return ProtocolViolation(
        f"{field} {index:#x} in a ring of {data_size:#x} bytes", rule="ring-index", field=field, value=index
    )


class Write(Protocol):
    """Write and publish one packet; return whether the reader must be signalled.

    Raises RingFull, then nothing is written (see `RingProducer.want_room`); PacketTooLong; ProtocolViolation.
    """

    def __call__(
        self, payload: Payload, trans_id: int = 0, flags: int = 0, packet_type: int = VM_PKT_DATA_INBAND
    ) -> bool: ...


class RingProducer:
    """The writing end. Attaching reads both indices from the ring, so it may be done while the ring is in
    use.

    `sole`: no other producer object writes this ring, so write_index is kept here and never loaded again (who
    overwrites the word misleads only the reader). With `sole=False` each write loads it, and callers hold a
    lock. Raises ProtocolViolation (`ring-index`) when the indices in the ring cannot be.
    """

    __slots__ = (
        "_base",
        "_buffer",
        "_data_size",
        "_full_at",
        "_get",
        "_kinds",
        "_set",
        "_sole",
        "memory",
        "out_full_first",
        "out_full_total",
        "words",
        "write",
    )

    write: Write

    def __init__(self, memory: RingMemory, *, sole: bool = True, words: RingWords | None = None) -> None:
        self.memory = memory
        self.words = words or memory.words
        self._buffer = memory.buffer
        self._data_size = memory.data_size
        self._sole = sole
        self._kinds: dict[tuple[int, int, int], Shapes] = {}
        self.out_full_total = 0  # writes that found no room
        self.out_full_first = 0  # of them, those right after a write that found some
        self._full_at = -1
        self.write, self._get, self._set = _writer(self, self.words)
        self._attach()

    def init(self) -> None:
        """Zero the control page, set the feature bit, begin at 0: the guest's part, before OPENCHANNEL."""
        self.memory.init()
        self._attach()

    def announce(self) -> None:
        """Promise to publish what it waits for, and wait for nothing: a host's part, when it opens the ring."""
        self.words.store_features(FEAT_PENDING_SEND_SZ)
        self.words.store_pending(0)

    @property
    def capacity(self) -> int:
        """The most bytes that are ever free: equal indices mean empty, so the last 8 are never used."""
        return self._data_size - 8

    @property
    def free_bytes(self) -> int:
        """Bytes free now, for packets with their trailers; ProtocolViolation when read_index cannot be."""
        write = self._get() if self._sole else self.words.load_write()
        return self._room(_checked(write, self._data_size, "write_index"))

    def check_read_index(self) -> None:
        """Raise ProtocolViolation (`ring-index`) when the reader's index cannot be."""
        read = self.words.load_read()
        if read >= self._data_size or read % ALIGNMENT:
            raise _impossible(read, self._data_size, "read_index")

    @property
    def bytes_to_read(self) -> int:
        """Bytes published that the reader has not released."""
        return self.capacity - self.free_bytes

    @property
    def bytes(self) -> int:
        """Bytes of ring that the packets written here took, with descriptors and trailers."""
        return self._base + self._get()

    def write_many(
        self,
        payloads: Sequence[Payload],
        first_trans_id: int | Iterable[int] = 0,
        flags: int = 0,
        packet_type: int = VM_PKT_DATA_INBAND,
    ) -> tuple[int, bool]:
        """Write as many packets as fit, publishing an eighth of the ring at a time.

        The transaction ids are 0, or count up from `first_trans_id`, or are taken from that iterable. Returns
        how many fitted and whether the reader must be signalled. Raises PacketTooLong when the first packet
        never fits; ProtocolViolation.
        """
        if isinstance(first_trans_id, int):
            first_trans_id = count(first_trans_id) if first_trans_id else repeat(0)
        return self._write_all(self._shapes(packet_type, flags), payloads, first_trans_id)

    def write_with_header(
        self, header: Payload, payload: Payload, packet_type: int, trans_id: int = 0, flags: int = 0
    ) -> bool:
        """Write a packet with a type-specific header (GPA-direct, transfer pages); as `write` otherwise.

        `header`, without the descriptor, must be a multiple of 8 bytes: the payload begins right behind it.
        """
        body = b"".join((header, payload))
        shapes = self._shapes(packet_type, flags, len(header))
        written, signal = self._write_all(shapes, (body,), (trans_id,))
        if not written:
            raise RingFull(ring_bytes(len(body)), self.free_bytes)
        return signal

    def want_room(self, size: int) -> bool:
        """Ask for a signal when `size` bytes are free (`RingFull.needed`); True: they are, and none will
        come.

        False: wait for the signal, try again, and `cancel_room` once that succeeded. Raises PacketTooLong for
        a wish that can never be met.
        """
        if size > self.capacity:
            raise PacketTooLong(size, self.capacity)
        # Full barrier: a reader that released everything just before this store saw no wish, so read_index
        # is loaded again behind it.
        self.words.store_pending(size)
        if self.free_bytes < size:
            return False
        self.words.store_pending(0)
        return True

    def cancel_room(self) -> None:
        """Take the wish back: this end waits no longer."""
        self.words.store_pending(0)

    def _attach(self) -> None:
        write = _checked(self.words.load_write(), self._data_size, "write_index")
        self._room(write)
        self._base = -write
        self._set(write)

    def _room(self, write: int) -> int:
        """The free bytes. Acquire: the reader's copies are done before its bytes are overwritten."""
        read = _checked(self.words.load_read(), self._data_size, "read_index")
        return (read - write - 8) % self._data_size

    def _make_room(self, write: int, size: int) -> tuple[int, int, int]:
        """Look at the indices again, for a packet of `size` bytes.

        Returns write_index, where it will be behind the packet, and the barrier: no packet that ends there or
        beyond it, counted without wrapping, may be written before the next look. Raises RingFull,
        PacketTooLong, ProtocolViolation.
        """
        if not self._sole and (own := self.words.load_write()) != write:
            # What other producers wrote does not count as ours.
            self._base += write - _checked(own, self._data_size, "write_index")
            write = own
            self._set(write)
        room = self._room(write)
        if size > room:
            if size > self.capacity:
                raise PacketTooLong(size, self.capacity)
            self.out_full_total += 1
            if self.bytes != self._full_at:
                self._full_at = self.bytes
                self.out_full_first += 1
            raise RingFull(size, room)
        end = write + size
        if end >= self._data_size:
            end -= self._data_size
            self._base += self._data_size
        return write, end, min(end + room - size + 1, self._data_size)

    def _shapes(self, packet_type: int, flags: int, header_length: int = 0) -> Shapes:
        key = packet_type, flags, header_length
        shapes = self._kinds.get(key)
        if shapes is None:
            shapes = self._kinds[key] = Shapes(self.memory, *key)
        return shapes

    def _write_all(self, shapes: Shapes, payloads: Sequence[Payload], trans_ids: Iterable[int]) -> tuple[int, bool]:
        """The body of all batches; at `stop` something is due: to publish, to look for room, or to wrap."""
        buffer, table, chunk = self._buffer, shapes.table, self._data_size >> 3
        write = self._get()
        stop = written = published = 0
        signal = False
        try:
            for payload, trans_id in zip(payloads, trans_ids, strict=False):
                try:
                    pack, word, size = table[len(payload)]
                except KeyError:
                    pack, word, size = shapes.add(len(payload))
                end = write + size
                if end >= stop:
                    if written != published:
                        signal |= self._publish(write)
                        published = written
                    write, end, stop = self._make_room(write, size)
                    stop = min(stop, end + chunk)
                try:
                    pack(buffer, write, word, trans_id, payload, write)
                except struct.error:  # as in `write`
                    pack(buffer, write, word, trans_id, bytes(payload), write)
                write = end
                written += 1
        except RingFull:
            pass
        except PacketTooLong:
            if not written:
                raise
        if written != published:
            signal |= self._publish(write)
        return written, signal

    def _publish(self, end: int) -> bool:
        """Make the packets up to `end` the reader's; return whether it must be signalled, as in `write`."""
        write = self._get()
        self._set(end)
        self.words.store_write(end)
        if self.words.load_mask():
            return False
        return self.words.load_read() == write


def _writer(ring: RingProducer, words: RingWords) -> tuple[Write, Callable[[], int], Callable[[int], None]]:
    """Make `write`, and what gets and sets its write_index (setting forgets what room was known of).

    `write` is a function over variables of its own because that is a fifth quicker than a method over
    attributes, and one call a packet is all the time there is. Everything rare it leaves to the producer.
    """
    buffer, sole = ring.memory.buffer, ring._sole
    store_write, load_mask, load_read = words.store_write, words.load_mask, words.load_read
    kind_type, kind_flags = VM_PKT_DATA_INBAND, 0
    shapes = ring._shapes(kind_type, kind_flags)
    table = shapes.table
    write_index = barrier = 0

    def write(payload: Payload, trans_id: int = 0, flags: int = 0, packet_type: int = VM_PKT_DATA_INBAND) -> bool:
        nonlocal barrier, kind_flags, kind_type, shapes, table, write_index
        if packet_type != kind_type or flags != kind_flags:
            shapes = ring._shapes(packet_type, flags)
            table, kind_type, kind_flags = shapes.table, packet_type, flags
        try:
            pack, word, size = table[len(payload)]
        except KeyError:
            pack, word, size = shapes.add(len(payload))
        begin = write_index
        end = begin + size
        # One comparison for the end of the room known of, the end of the data, and other producers.
        if end >= barrier:
            begin, end, beyond = ring._make_room(begin, size)
            barrier = beyond if sole else 0
        try:
            pack(buffer, begin, word, trans_id, payload, begin)
        except struct.error:  # `struct` packs bytes and bytearrays only; anything wrong fails again
            pack(buffer, begin, word, trans_id, bytes(payload), begin)
        write_index = end
        # Release for the packet's bytes, full barrier for the two loads below. The mask is loaded first: the
        # reader unmasks and then looks again, so that one of the two always sees the other.
        store_write(end)
        if load_mask():
            return False
        return load_read() == begin

    def get() -> int:
        return write_index

    def set_(index: int) -> None:
        nonlocal barrier, write_index
        write_index, barrier = index, 0

    return write, get, set_


class RingConsumer:
    """The reading end. Attaching reads both indices from the ring, so it may be done while the ring is in
    use.

    `sole`: no other consumer object reads this ring, so read_index is kept here and never loaded again. With
    `sole=False` each drain begins by loading it, and callers see to it that one drain ends before the next
    begins. Raises ProtocolViolation (`ring-index`) when the indices in the ring cannot be.
    """

    __slots__ = (
        "_bad_wish",
        "_draining",
        "_plans",
        "_plans_with_header",
        "_read",
        "_signal",
        "_sole",
        "bytes",
        "intr_in_full",
        "memory",
        "packets",
        "releases",
        "words",
    )

    def __init__(self, memory: RingMemory, *, sole: bool = True, words: RingWords | None = None) -> None:
        self.memory = memory
        self.words = words or memory.words
        self._plans = Plans(memory)
        self._plans_with_header = Plans(memory, with_header=True)
        self._sole = sole
        self._signal = False
        self._draining = False
        self._bad_wish = 0
        self.packets = 0  # copied out and released
        self.bytes = 0  # of ring that they took, with descriptors and trailers
        self.releases = 0  # stores of read_index
        self.intr_in_full = 0  # room-again signals owed so far
        self._load_own()
        _checked(self.words.load_write(), memory.data_size, "write_index")

    @property
    def bytes_to_read(self) -> int:
        """Bytes published that were not released here; ProtocolViolation when write_index cannot be."""
        data_size = self.memory.data_size
        return (_checked(self.words.load_write(), data_size, "write_index") - self._read) % data_size

    def drain(self, limit: int | None = None) -> Generator[Packet, None, None]:
        """Take packets, `limit` at most, until the ring is empty at a second look.

        read_index is released after each eighth of the ring and at the end, also when the iterator is closed
        early, so a packet that was handed out is never read twice. Close it (a `for` over it does) before the
        next drain, then ask `take_signal`.

        Raises ProtocolViolation once everything before the fault was handed out and released: `ring-index`,
        the `packet-…` rules of `check_descriptor`, and, when all was read, `pending-send-size` if the
        producer waits for more than the ring can ever have free.
        """
        packets = self._drain(self._plans)
        return packets if limit is None else _take(packets, limit)

    def drain_with_headers(
        self, limit: int | None = None
    ) -> Generator[tuple[int, int, int, tuple[bytes, bytes]], None, None]:
        """As `drain`, for packets with type-specific headers: the last item is (header, payload)."""
        packets = self._drain(self._plans_with_header)
        return packets if limit is None else _take(packets, limit)

    def read(self) -> Packet | None:
        """Take one packet and release it; None when there is none. Raises as `drain` does."""
        for packet in self._drain(self._plans):
            return packet  # the iterator is closed here, and so releases
        return None

    def begin_read(self) -> None:
        """Mask: no data-arrived signals, since this end reads anyway (`hv_begin_read`)."""
        self.words.store_mask(1)

    def end_read(self) -> int:
        """Unmask, then look again; return the bytes to read (`hv_end_read`).

        If there are any, no signal will come for them: mask and drain once more.
        """
        self.words.store_mask(0)  # full barrier before write_index is loaded again
        return self.bytes_to_read

    def take_signal(self) -> bool:
        """Return whether the producer is owed a signal that there is room again, and forget it."""
        signal, self._signal = self._signal, False
        return signal

    def _load_own(self) -> None:
        self._read = _checked(self.words.load_read(), self.memory.data_size, "read_index")

    def _drain(self, plans: Plans) -> Generator[tuple[int, int, int, Any], None, None]:
        """The body of all drains.

        Offsets run on into the second view of the data, so that nothing wraps between two releases. `start`
        is what was released, `at` what was handed out, `last` what is published.
        """
        assert not self._draining, "a drain of this ring was not closed"
        self._draining = True
        memory, load_write = self.memory, self.words.load_write
        buffer, headers, table = memory.buffer, memory.headers, plans.table
        data_size, chunk = memory.data_size, memory.data_size >> 3
        packets = 0
        last_plan = None
        try:
            if not self._sole:
                self._load_own()
            start = at = self._read
        except ProtocolViolation:
            self._draining = False
            raise
        try:
            while True:
                # Acquire: the packets' bytes are loaded after the index that covers them.
                write = _checked(load_write(), data_size, "write_index")
                last = start + (write - self._read) % data_size
                if last <= at:
                    if last < at:
                        raise _impossible(write, data_size, "write_index")  # what was handed out is published
                    break
                stop = min(last, start + chunk)
                while at < stop:
                    word = headers[at >> 3]
                    try:
                        plan = table[word]
                    except KeyError:
                        plan = plans.add(word)
                    if plan is not last_plan:
                        last_plan = plan
                        packet_type, flags, size, unpack, unpack_run, longest_run = plan
                    elif longest_run and stop - at >= 2 * size:
                        # Two alike, and more to come: copy several at once, and go on while they are alike.
                        for copied, trans_id, payload in unpack_run(buffer, at, min((stop - at) // size, longest_run)):
                            if copied != word:
                                last_plan = None
                                break
                            at += size
                            packets += 1
                            yield packet_type, flags, trans_id, payload
                        continue
                    end = at + size
                    if end > last:
                        raise _beyond(size, last - at)
                    trans_id, payload = unpack(buffer, at)
                    at = end
                    packets += 1
                    yield packet_type, flags, trans_id, payload
                if at >= start + chunk:
                    self._release(at - start, packets)
                    start = at = self._read
                    packets = 0
        finally:
            self._draining = False
            if at != start and not memory.closed:
                self._release(at - start, packets)
        if self._bad_wish:
            raise ProtocolViolation(
                f"the producer waits for {self._bad_wish} free bytes in a ring of {data_size}",
                rule="pending-send-size",
                field="pending_send_sz",
                value=self._bad_wish,
            )

    def _release(self, freed: int, packets: int) -> None:
        """Give `freed` bytes back to the producer, then apply the room-again rule (`hv_pkt_iter_close`)."""
        words, data_size = self.words, self.memory.data_size
        self._read = read = (self._read + freed) % data_size
        self.packets += packets
        self.bytes += freed
        self.releases += 1
        self._bad_wish = 0
        # Release for the copies, full barrier before pending_send_sz is loaded.
        words.store_read(read)
        if not words.load_features() & FEAT_PENDING_SEND_SZ:
            return
        wish = words.load_pending() & -ALIGNMENT
        if not wish:
            return
        if wish > data_size - 8:
            self._bad_wish = wish
            return
        # write_index after pending_send_sz. One that cannot be gives a wrong answer to whoever wrote it, and
        # is refused at the next look for packets.
        room = (read - words.load_write() - 8) % data_size
        if room - freed < wish <= room:
            self.intr_in_full += 1
            self._signal = True


def _take(packets: Generator[T, None, None], limit: int) -> Generator[T, None, None]:
    """Hand on at most `limit` packets, then close."""
    try:
        yield from islice(packets, limit)
    finally:
        packets.close()


def _beyond(size: int, published: int) -> ProtocolViolation:
    """Say that a packet's length, with its trailer, goes beyond write_index."""
    return ProtocolViolation(
        f"packet of {size} bytes with its trailer, {published} published",
        rule="packet-length",
        field="len8",
        value=(size - TRAILER_SIZE) // 8,
    )
