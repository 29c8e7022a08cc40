"""The writing end of a ring: one packet by `write`, many by `write_many`, or in place by `reserve`.

Everything that depends on a packet's kind and size alone is worked out once (`emu.ring_packets`); packets of one
length that follow each other are stored together. What orders the words is said in `emu.ring`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby, islice, repeat
from operator import ne
from types import TracebackType
from typing import Final, Protocol

from emu.errors import RingFull
from emu.ring_memory import Payload, RingMemory, RingWords, Seal, checked_index, impossible_index
from emu.ring_packets import RUN_BYTES, PacketTooLong, Shapes
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
        "batch_bytes",
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
        self._buffer = memory.buffer
        self._data_size = memory.data_size
        self._sole = sole
        self._kinds: dict[tuple[int, int, int], Shapes] = {}
        self.batch_bytes = 0  # of payload, in the last batch
        self.out_full_total = 0  # writes that found no room
        self.out_full_first = 0  # of them, those right after a write that found some
        self._full_at = -1
        self.write, self.write_many, self._get, self._set = _writer(self, self.words)
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

    def _write_all(
        self, shapes: Shapes, payloads: Sequence[Payload], trans_ids: Sequence[int] | None
    ) -> tuple[int, bool]:
        """The body of all batches; at `stop` something is due: to publish, to look for room, or to wrap.

        Payloads come in stretches: alike and stored together, or one by one. `done` of them are written,
        `published` of them are the reader's.
        """
        buffer, table, chunk = self._buffer, shapes.table, self._data_size >> 3
        write = self._get()
        stop = done = published = nbytes = 0
        signal = False
        try:
            for length, left in _stretches(payloads):
                pack_run = shapes.run(length) if left >= SHORTEST_RUN else None
                if pack_run is None:
                    ids = repeat(0) if trans_ids is None else trans_ids[done:]
                    for payload, trans_id in zip(islice(payloads, done, done + left), ids, strict=False):
                        length = len(payload)
                        try:
                            pack, word, size = table[length]
                        except KeyError:
                            pack, word, size = shapes.add(length)
                        end = write + size
                        if end >= stop:
                            if done != published:
                                signal |= self._publish(write)
                                published = done
                            write, end, stop = self._make_room(write, size)
                            stop = min(stop, end + chunk)
                        try:
                            pack(buffer, write, word, trans_id, payload, write)
                        except struct.error:  # as in `write`
                            pack(buffer, write, word, trans_id, bytes(payload), write)
                        write = end
                        nbytes += length
                        done += 1
                    continue
                pack, word, size = table[length]
                most = max(1, RUN_BYTES // size)
                while left:
                    end = write + size
                    if end >= stop:
                        if done != published:
                            signal |= self._publish(write)
                            published = done
                        write, end, stop = self._make_room(write, size)
                        stop = min(stop, end + chunk)
                    # One that goes beyond the end of the data is the last before the next look.
                    fitting = 1 + (stop - 1 - end) // size if end > write else 1
                    fitting = min(fitting, left, most)
                    after = done + fitting
                    pack_run(write, payloads[done:after], None if trans_ids is None else trans_ids[done:after])
                    write = end + (fitting - 1) * size
                    left -= fitting
                    nbytes += fitting * length
                    done = after
        except RingFull:
            pass
        except PacketTooLong:
            if not done:
                raise
        if done != published:
            signal |= self._publish(write)
        self.batch_bytes = nbytes
        return done, signal

    def publish_reserved(self, begin: int, end: int) -> bool:
        """The end of a `Reservation`: make its packet the reader's."""
        assert self._get() == begin, "something was written while room was reserved"
        return self._publish(end)

    def cancel_reserved(self, begin: int, end: int) -> None:
        """The other end of a `Reservation`: its bytes do not count, nor does the wrap behind them."""
        if end < begin:
            self._base -= self._data_size

    def _publish(self, end: int) -> bool:
        """Make the packets up to `end` the reader's; return whether it must be signalled, as in `write`."""
        write = self._get()
        self._set(end)
        self.words.store_write(end)
        if self.words.load_mask():
            return False
        return self.words.load_read() == write


def _writer(ring: RingProducer, words: RingWords) -> tuple[Write, WriteMany, Callable[[], int], Callable[[int], None]]:
    """Make `write` and `write_many`, and what gets and sets its write_index (setting forgets what room was known of).

    `write` is a function over variables of its own because that is a fifth quicker than a method over
    attributes, and one call a packet is all the time there is. Everything rare it leaves to the producer.
    """
    buffer, sole = ring.memory.buffer, ring._sole
    store_write, load_mask, load_read = words.store_write, words.load_mask, words.load_read
    load_write = words.load_write
    kind_type, kind_flags = VM_PKT_DATA_INBAND, 0
    shapes = ring._shapes(kind_type, kind_flags)
    table = shapes.table
    first_shapes, runs_get = shapes, shapes.runs.get
    data_size = ring._data_size
    most = min(RUN_BYTES, data_size >> 3)
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

    def write_many(
        payloads: Sequence[Payload],
        first_trans_id: int | Iterable[int] = 0,
        flags: int = 0,
        packet_type: int = VM_PKT_DATA_INBAND,
    ) -> tuple[int, bool]:
        nonlocal barrier, kind_flags, kind_type, shapes, table, write_index
        if packet_type != kind_type or flags != kind_flags:
            shapes = ring._shapes(packet_type, flags)
            table, kind_type, kind_flags = shapes.table, packet_type, flags
        count = len(payloads)
        trans_ids: Sequence[int] | None = None
        if first_trans_id.__class__ is not int:
            assert not isinstance(first_trans_id, int)
            trans_ids = first_trans_id if isinstance(first_trans_id, list) else list(islice(first_trans_id, count))
            if len(trans_ids) != count:
                count = min(count, len(trans_ids))
                payloads, trans_ids = payloads[:count], trans_ids[:count]
        elif first_trans_id:
            trans_ids = range(first_trans_id, first_trans_id + count)
        if not sole or count < SHORTEST_RUN:
            return ring._write_all(shapes, payloads, trans_ids)
        # Most batches are of one length, and there is room for all of it before the data wraps.
        length = len(payloads[0])
        pack_run = runs_get(length) if shapes is first_shapes else shapes.run(length)
        if pack_run is None:
            pack_run = shapes.run(length)
            if pack_run is None:
                return ring._write_all(shapes, payloads, trans_ids)
        nbytes = count * table[length][2]
        begin = write_index
        end = begin + nbytes
        if end >= barrier:
            if end >= data_size or nbytes > most:
                return ring._write_all(shapes, payloads, trans_ids)
            barrier = min(begin + ring._room(begin) + 1, data_size)
            if end >= barrier:
                return ring._write_all(shapes, payloads, trans_ids)
        elif nbytes > most:
            return ring._write_all(shapes, payloads, trans_ids)
        if list(map(len, payloads)).count(length) != count:
            return ring._write_all(shapes, payloads, trans_ids)
        pack_run(begin, payloads, trans_ids)
        write_index = end
        ring.batch_bytes = count * length
        store_write(end)  # as in `write`
        if load_mask():
            return count, False
        return count, load_read() == begin

    def get() -> int:
        return write_index

    def set_(index: int) -> None:
        nonlocal barrier, write_index
        write_index, barrier = index, 0

    return write, write_many, get, set_


def _stretches(payloads: Sequence[Payload]) -> Iterable[tuple[int, int]]:
    """Cut a batch into (length, count): payloads alike, or -1 for those that are best written one by one.

    A look at the first ones tells whether a closer look may pay: most batches are of one length or of many.
    """
    total = len(payloads)
    if total < SHORTEST_RUN or len({*map(len, payloads[:_LOOKED_AT])}) > 1:
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
