"""The writing end of a ring: one packet by `write`, many by `write_many`, or in place by `reserve`.

Everything that depends on a packet's kind and size alone is worked out once (`emu.ring_packets`); packets of one
length that follow each other are stored together. What orders the words is said in `emu.ring`.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby, islice, repeat
from operator import ne
from types import FunctionType, TracebackType
from typing import Final, NamedTuple, Protocol

from emu.errors import RingFull
from emu.ring_memory import PackAlike, Payload, RingMemory, RingWords, Seal, checked_index, impossible_index
from emu.ring_packets import LONGEST_JOINED, PackedRun, PacketTooLong, Shapes
from emu.shared_variables import sharing
from emu.tracing import RECORD_BYTES
from emu.wire.packets import VM_PKT_DATA_INBAND, ring_bytes
from emu.wire.ring_layout import ALIGNMENT, FEAT_PENDING_SEND_SZ

SHORTEST_RUN: Final = 6
"""Packets alike that are worth storing together."""
_LOOKED_AT: Final = 4


class Write(Protocol):
    """Write and publish one packet; return whether the reader must be signalled.

    Raises RingFull, then nothing is written (see `RingProducer.want_room`); PacketTooLong; ProtocolViolation.
    """

    def __call__(
        self, payload: Payload, trans_id: int = 0, flags: int = 0, packet_type: int = VM_PKT_DATA_INBAND
    ) -> bool: ...


class WriteMany(Protocol):
    """Write as many packets as fit, publishing an eighth of the ring at a time.

    The transaction ids are 0, or count up from `first_trans_id`, or are taken from that iterable. Returns how many
    fitted and whether the reader must be signalled; `batch_bytes` says how many bytes of payload they had. Raises
    PacketTooLong when the first packet never fits; ProtocolViolation.
    """

    def __call__(
        self,
        payloads: Sequence[Payload],
        first_trans_id: int | Iterable[int] = 0,
        flags: int = 0,
        packet_type: int = VM_PKT_DATA_INBAND,
    ) -> tuple[int, bool]: ...


class _Writer(NamedTuple):
    """The functions of one producer, over variables that they share."""

    write: Write
    write_many: WriteMany
    write_all: Callable[[Shapes, Sequence[Payload], Sequence[int] | None], tuple[int, bool]]
    publish: Callable[[int], bool]
    get: Callable[[], int]
    set: Callable[[int], None]
    batch_bytes: Callable[[], int]


class RingProducer:
    """The writing end. Attaching reads both indices from the ring, so it may be done while the ring is in
    use.

    `sole`: no other producer object writes this ring, so write_index is kept here and never loaded again (who
    overwrites the word misleads only the reader). With `sole=False` each write loads it, and callers hold a
    lock. Raises ProtocolViolation (`ring-index`) when the indices in the ring cannot be.
    """

    __slots__ = (
        "_base",
        "_batch_bytes",
        "_data_size",
        "_full_at",
        "_get",
        "_kinds",
        "_publish",
        "_set",
        "_sole",
        "_write_all",
        "memory",
        "out_full_first",
        "out_full_total",
        "words",
        "write",
        "write_many",
    )

    write: Write
    write_many: WriteMany

    def __init__(self, memory: RingMemory, *, sole: bool = True, words: RingWords | None = None) -> None:
        self.memory = memory
        self.words = words or memory.words
        self._data_size = memory.data_size
        self._sole = sole
        self._kinds: dict[tuple[int, int, int], Shapes] = {}
        self.out_full_total = 0  # writes that found no room
        self.out_full_first = 0  # of them, those right after a write that found some
        self._full_at = -1
        writer = _writer(self, self.words)
        self.write, self.write_many, self._get, self._set = writer.write, writer.write_many, writer.get, writer.set
        self._write_all, self._publish, self._batch_bytes = writer.write_all, writer.publish, writer.batch_bytes
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
        return self._room(checked_index(write, self._data_size, "write_index"))

    def check_read_index(self) -> None:
        """Raise ProtocolViolation (`ring-index`) when the reader's index cannot be."""
        read = self.words.load_read()
        if read >= self._data_size or read % ALIGNMENT:
            raise impossible_index(read, self._data_size, "read_index")

    @property
    def bytes_to_read(self) -> int:
        """Bytes published that the reader has not released."""
        return self.capacity - self.free_bytes

    @property
    def bytes(self) -> int:
        """Bytes of ring that the packets written here took, with descriptors and trailers."""
        return self._base + self._get()

    @property
    def batch_bytes(self) -> int:
        """Bytes of payload that the last `write_many` wrote."""
        return self._batch_bytes()

    def reserve(
        self, length: int, trans_id: int = 0, flags: int = 0, packet_type: int = VM_PKT_DATA_INBAND
    ) -> Reservation:
        """Make room for a packet of `length` bytes of payload, which is then written in place and committed.

        Nothing else may be written to the ring in between, and only one is reserved at a time. Raises as `write`.
        """
        shapes = self._shapes(packet_type, flags)
        _pack, word, size = shapes.table.get(length) or shapes.add(length)
        begin, end, _stop = self._make_room(self._get(), size)
        payload, seal = self.memory.reserve(begin, length, size - ring_bytes(0) - length, word)
        return Reservation(self, payload, seal, begin, end, trans_id)

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
        write = checked_index(self.words.load_write(), self._data_size, "write_index")
        self._room(write)
        self._base = -write
        self._set(write)

    def _room(self, write: int) -> int:
        """The free bytes. Acquire: the reader's copies are done before its bytes are overwritten."""
        read = checked_index(self.words.load_read(), self._data_size, "read_index")
        return (read - write - 8) % self._data_size

    def _make_room(self, write: int, size: int) -> tuple[int, int, int]:
        """Look at the indices again, for a packet of `size` bytes.

        Returns write_index, where it will be behind the packet, and the barrier: no packet that ends there or
        beyond it, counted without wrapping, may be written before the next look. Raises RingFull,
        PacketTooLong, ProtocolViolation.
        """
        if not self._sole and (own := self.words.load_write()) != write:
            # What other producers wrote does not count as ours.
            self._base += write - checked_index(own, self._data_size, "write_index")
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

    def publish_reserved(self, begin: int, end: int) -> bool:
        """The end of a `Reservation`: make its packet the reader's."""
        assert self._get() == begin, "something was written while room was reserved"
        return self._publish(end)

    def cancel_reserved(self, begin: int, end: int) -> None:
        """The other end of a `Reservation`: its bytes do not count, nor does the wrap behind them."""
        if end < begin:
            self._base -= self._data_size


def _writer(ring: RingProducer, words: RingWords) -> _Writer:
    """Make what writes, publishes, and gets and sets write_index (setting forgets what room was known of).

    They are functions over variables of their own because that is a fifth quicker than methods over attributes, and
    one call a packet, or a few lines a batch, is all the time there is. Everything rare they leave to the producer.
    """
    buffer, sole = ring.memory.buffer, ring._sole
    store_write, load_write = words.store_write, words.load_write
    load_mask, load_read = words.load_mask, words.load_read
    make_room = ring._make_room
    kind_type, kind_flags = VM_PKT_DATA_INBAND, 0
    shapes = ring._shapes(kind_type, kind_flags)
    table = shapes.table
    data_size = ring._data_size
    chunk = data_size >> 3
    write_index = barrier = 0
    pack, word, size = shapes.add(0)
    last_length = alike_length = -1
    alike_size = most_alike = 0
    batch_count = batch_length = 0  # so many payloads of so many bytes, or a single one, are what the last batch had
    pack_alike: PackAlike

    def write(payload: Payload, trans_id: int = 0, flags: int = 0, packet_type: int = VM_PKT_DATA_INBAND) -> bool:
        nonlocal alike_length, barrier, kind_flags, kind_type, last_length, pack, shapes, size, table, word, write_index
        if packet_type != kind_type or flags != kind_flags:
            shapes = ring._shapes(packet_type, flags)
            table, kind_type, kind_flags, last_length, alike_length = shapes.table, packet_type, flags, -1, -1
        length = len(payload)
        if length != last_length:
            try:
                pack, word, size = table[length]
            except KeyError:
                pack, word, size = shapes.add(length)
            last_length = length
        begin = write_index
        end = begin + size
        # One comparison for the end of the room known of, the end of the data, and other producers.
        if end >= barrier and (
            # Of other producers none has written, nearly always, and there is room without wrapping: `_make_room` by
            # three loads. Acquire: the reader's copies are done before its bytes are overwritten.
            sole
            or end >= data_size
            or load_write() != begin
            or (read := load_read()) >= data_size
            or read % ALIGNMENT
            or size > (read - begin - 8) % data_size
        ):
            begin, end, beyond = make_room(begin, size)
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

    def write_many(
        payloads: Sequence[Payload],
        first_trans_id: int | Iterable[int] = 0,
        flags: int = 0,
        packet_type: int = VM_PKT_DATA_INBAND,
    ) -> tuple[int, bool]:
        nonlocal alike_length, alike_size, batch_count, batch_length, kind_flags, kind_type, last_length, most_alike
        nonlocal pack_alike, shapes, table, write_index
        if packet_type != kind_type or flags != kind_flags:
            shapes = ring._shapes(packet_type, flags)
            table, kind_type, kind_flags, last_length, alike_length = shapes.table, packet_type, flags, -1, -1
        count = len(payloads)
        trans_ids: Sequence[int] | None = None
        if first_trans_id != 0:
            if isinstance(first_trans_id, int):
                trans_ids = range(first_trans_id, first_trans_id + count)
            else:
                trans_ids = first_trans_id if isinstance(first_trans_id, list) else list(islice(first_trans_id, count))
                if len(trans_ids) != count:
                    count = min(count, len(trans_ids))
                    payloads, trans_ids = payloads[:count], trans_ids[:count]
        if count < SHORTEST_RUN:
            done, nbytes, signal = write_each(shapes, payloads, trans_ids, 0, count)
            batch_count, batch_length = 1, nbytes
            return done, signal
        # Most batches are of one length, often that of the one before, and there is room before the data wraps.
        length = len(payloads[0])
        if length != alike_length:
            run = shapes.runs.get(length)
            if run is None:
                return write_all(shapes, payloads, trans_ids)
            _pack_run, pack_alike, alike_size = run
            alike_length, most_alike = length, (chunk - 1) // alike_size + 1
        begin = write_index
        end = begin + count * alike_size
        if count > most_alike or (end >= barrier and not room_until(end)):
            return write_all(shapes, payloads, trans_ids)
        if not pack_alike(payloads, trans_ids, count, begin, end):
            return write_all(shapes, payloads, trans_ids)
        batch_count, batch_length, write_index = count, length, end
        store_write(end)  # as in `write`
        if load_mask():
            return count, False
        return count, load_read() == begin

    def room_until(end: int) -> bool:
        """Look at the indices again: whether packets up to `end` fit, before the end of the data."""
        nonlocal barrier
        if not sole and load_write() != write_index:
            return False
        beyond = min(write_index + ring._room(write_index) + 1, data_size)
        if sole:
            barrier = beyond
        return end < beyond

    def write_all(shapes: Shapes, payloads: Sequence[Payload], trans_ids: Sequence[int] | None) -> tuple[int, bool]:
        """Any batch: in stretches, of packets alike that are stored together, or of others one by one."""
        nonlocal batch_count, batch_length
        done = nbytes = 0
        signal = False
        for length, left in _stretches(payloads):
            run = shapes.run(length) if left >= SHORTEST_RUN else None
            try:
                if run is None:
                    written, of_them, must_signal = write_each(shapes, payloads, trans_ids, done, left)
                else:
                    written, must_signal = write_run(run, payloads, trans_ids, done, left)
                    of_them = written * length
            except PacketTooLong:
                if not done:
                    raise
                break
            signal |= must_signal
            done += written
            nbytes += of_them
            if written < left:
                break
        batch_count, batch_length = 1, nbytes
        return done, signal

    def write_run(
        run: PackedRun, payloads: Sequence[Payload], trans_ids: Sequence[int] | None, first: int, count: int
    ) -> tuple[int, bool]:
        """Packets alike, as many as fit: how many, and whether the reader must be signalled."""
        nonlocal barrier
        pack_run, _pack_alike, size = run
        done, last = first, first + count
        room_end, signal = barrier, False
        while done < last:
            begin = write_index
            end = begin + size
            if end >= room_end:
                try:
                    begin, end, room_end = make_room(begin, size)
                except RingFull:
                    break
            # One that goes beyond the end of the data is the last before the next look.
            fitting = 1 + min(room_end - 1 - end, chunk - 1) // size if end > begin else 1
            after = min(last, done + fitting)
            pack_run(begin, payloads[done:after], None if trans_ids is None else trans_ids[done:after])
            signal |= publish(end + (after - done - 1) * size)
            done = after
            if not sole:
                room_end = 0  # another producer may have written since
        barrier = room_end
        return done - first, signal

    def write_each(
        shapes: Shapes, payloads: Sequence[Payload], trans_ids: Sequence[int] | None, first: int, count: int
    ) -> tuple[int, int, bool]:
        """Packets of any length, as many as fit: how many, their bytes, and whether the reader must be signalled.

        At `due` something is to be seen to: to publish, to look for room, or to wrap.
        """
        nonlocal barrier
        table = shapes.table
        room_end = barrier
        ids = repeat(0) if trans_ids is None else islice(trans_ids, first, None)
        begin = published = write_index
        due = done = nbytes = 0
        signal = False
        try:
            for payload, trans_id in zip(islice(payloads, first, first + count), ids, strict=False):
                length = len(payload)
                try:
                    pack, word, size = table[length]
                except KeyError:
                    pack, word, size = shapes.add(length)
                end = begin + size
                if end >= due:
                    if begin != published:
                        signal |= publish(begin)
                        published = begin
                    if end >= room_end:
                        begin, end, room_end = make_room(begin, size)
                        published = begin
                    due = min(room_end, end + chunk)
                try:
                    pack(buffer, begin, word, trans_id, payload, begin)
                except struct.error:  # as in `write`
                    pack(buffer, begin, word, trans_id, bytes(payload), begin)
                begin = end
                nbytes += length
                done += 1
        except RingFull:
            pass
        except PacketTooLong:
            if not done:
                raise
        if begin != published:
            signal |= publish(begin)
        barrier = room_end if sole else 0
        return done, nbytes, signal

    def publish(end: int) -> bool:
        """Make the packets up to `end` the reader's; return whether it must be signalled, as in `write`.

        What room was known of is forgotten, since `end` may lie behind a wrap.
        """
        nonlocal barrier, write_index
        begin, write_index, barrier = write_index, end, 0
        store_write(end)
        if load_mask():
            return False
        return load_read() == begin

    def get() -> int:
        return write_index

    def set_(index: int) -> None:
        nonlocal barrier, write_index
        write_index, barrier = index, 0

    def batch_bytes() -> int:
        return batch_count * batch_length

    publishes = words.publishes
    # Compiled functions have no variables that could be shared with the recorder: there `store_write` records.
    if publishes is None or not isinstance(write, FunctionType):
        return _Writer(write, write_many, write_all, publish, get, set_, batch_bytes)
    # A recorded ring. The call of `store_write` is a third of what the record of a batch costs, so a batch like the one
    # before writes its record itself; `at`, `before` and `records` are the recorder's. Of such a batch all sizes are
    # known, `batch_bytes` as well, so that it need not be measured.
    at = before = records = 0
    like_count, like_bytes = -1, 0  # payloads of the last batch and their bytes in the ring; -1: they were not alike
    like_written = 0, False  # what is returned for as many
    step = RECORD_BYTES
    _publish, record_memory, first_at, end_at, pack_record, same, show_record, shared = publishes
    store_index, now = ring.memory.words.store_write, time.monotonic_ns

    def write_many_recorded(
        payloads: Sequence[Payload],
        first_trans_id: int | Iterable[int] = 0,
        flags: int = 0,
        packet_type: int = VM_PKT_DATA_INBAND,
    ) -> tuple[int, bool]:
        nonlocal at, before, records, write_index
        count = len(payloads)
        if (
            count != like_count
            or len(payloads[0]) != alike_length
            or first_trans_id != 0
            or packet_type != kind_type
            or flags != kind_flags
        ):
            return write_another(payloads, first_trans_id, flags, packet_type)
        begin = write_index
        end = begin + like_bytes
        if end >= barrier and not room_until(end):
            return write_another(payloads, first_trans_id, flags, packet_type)
        if not pack_alike(payloads, None, count, begin, end):
            return write_another(payloads, first_trans_id, flags, packet_type)
        try:
            pack_record(record_memory, at, now(), records, same, end, like_bytes)
        except struct.error:
            pack_record(record_memory, at, now(), records & 0xFFFFFFFF, same, end, like_bytes)
        records += 1
        at += step
        if at == end_at:
            at = first_at
        show_record(records)
        before = write_index = end
        # Before this the record is there, since no effect may precede its cause. As in `write`.
        store_index(end)
        if load_mask():
            return like_written
        return count, load_read() == begin

    def write_another(
        payloads: Sequence[Payload], first_trans_id: int | Iterable[int], flags: int, packet_type: int
    ) -> tuple[int, bool]:
        """Any batch, and what the next one needs if it is like this one."""
        nonlocal like_bytes, like_count, like_written
        like_count = -1
        written = write_many(payloads, first_trans_id, flags, packet_type)
        if batch_count >= SHORTEST_RUN:
            like_count, like_bytes, like_written = batch_count, batch_count * alike_size, (batch_count, False)
        return written

    def write_all_recorded(
        shapes: Shapes, payloads: Sequence[Payload], trans_ids: Sequence[int] | None
    ) -> tuple[int, bool]:
        nonlocal like_count
        like_count = -1
        return write_all(shapes, payloads, trans_ids)

    recorded = sharing(
        write_many_recorded, {"at": shared["at"], "before": shared["before"], "records": shared["count"]}
    )
    return _Writer(write, recorded, write_all_recorded, publish, get, set_, batch_bytes)


def _stretches(payloads: Sequence[Payload]) -> Iterable[tuple[int, int]]:
    """Cut a batch into (length, count): payloads alike, or -1 for those that are best written one by one.

    A look at the first ones tells whether a closer look may pay: most batches are of one length or of many.
    """
    total = len(payloads)
    if total < SHORTEST_RUN or len(payloads[0]) > LONGEST_JOINED or len({*map(len, payloads[:_LOOKED_AT])}) > 1:
        return ((-1, total),)
    lengths = list(map(len, payloads))
    first = lengths[0]
    if lengths.count(first) == total:
        return ((first, total),)
    if sum(map(ne, lengths, islice(lengths, 1, None))) * SHORTEST_RUN > total:
        return ((-1, total),)
    return [(length, len(list(alike))) for length, alike in groupby(lengths)]


class Reservation:
    """Room for one packet: `payload` is where it lies in the ring (its length in bytes, writable).

    `commit` publishes it, `cancel` gives the room back. As a context manager it commits unless an exception leaves
    the block, and `signal` then says whether the reader must be signalled. `payload` cannot be used afterwards.
    """

    __slots__ = ("_begin", "_end", "_producer", "_seal", "_trans_id", "payload", "signal")

    def __init__(
        self, producer: RingProducer, payload: memoryview, seal: Seal, begin: int, end: int, trans_id: int
    ) -> None:
        self.payload = payload
        self.signal = False
        self._producer: RingProducer | None = producer
        self._seal = seal
        self._begin = begin
        self._end = end
        self._trans_id = trans_id

    def commit(self) -> bool:
        """Publish the packet; return whether the reader must be signalled."""
        producer = self._producer
        assert producer is not None, "this reservation was given back or committed"
        self._producer = None
        self.payload.release()
        self._seal(self._trans_id, self._begin)
        self.signal = producer.publish_reserved(self._begin, self._end)
        return self.signal

    def cancel(self) -> None:
        """Write nothing after all."""
        if self._producer is not None:
            self._producer.cancel_reserved(self._begin, self._end)
            self._producer = None
        self.payload.release()

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._producer is None:
            return
        if kind is None:
            self.commit()
        else:
            self.cancel()
