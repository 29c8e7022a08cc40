"""The memory of one ring: a control page with the shared words, and a data area behind it.

Mapped from shared memory, the data area appears twice in a row (as in Linux, `hv_ringbuffer_init`), so that a
packet that wraps is still one piece; over a `bytearray`, or page by page, packets are cut and joined instead.
Producer and consumer see no difference: for each shape of packet they ask here, once, for the function that
packs or unpacks it. Where the words lie: `emu.wire.ring_layout`.
"""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import countOf, itemgetter
from struct import Struct
from struct import error as struct_error
from typing import TYPE_CHECKING, Any, Final, Protocol

from emu.errors import ProtocolViolation
from emu.ipc.atomics import AtomicView
from emu.memory import PAGE_SHIFT, PAGE_SIZE, GuestMemory, stitch
from emu.wire.packets import DESCRIPTOR_SIZE, TRAILER_SIZE
from emu.wire.ring_layout import (
    ALIGNMENT,
    FEAT_PENDING_SEND_SZ,
    FEATURE_BITS,
    INTERRUPT_MASK,
    PENDING_SEND_SZ,
    READ_INDEX,
    WRITE_INDEX,
)

if TYPE_CHECKING:
    from emu.tracing import Publishes

# Above this a slice assignment is cheaper than `pack_into`, which first clears the bytes it will write.
_LARGE_PAYLOAD: Final = 4096
# Offsets stay below 2**30, where Python's integers are quickest.
_MOST_PAGES: Final = 1 << 17

_DESCRIPTOR: Final = Struct("<8sQ")
_MOST_COUNTS: Final = 1024
# What `struct` calls a Pascal string has its length in the byte before, which is 255 for whatever is longer.
_LONGEST_PASCAL: Final = 254
# Of more, measuring first is no great part; and what a number of them needs, up to 4 KB, is kept.
_MOST_ALIKE: Final = 64
_every_start = memoryview(array("I"))

Payload = bytes | bytearray | memoryview
Load = Callable[[], int]
Store = Callable[[int], None]
Pack = Callable[..., None]
Unpack = Callable[..., tuple[int, Any]]
PackRun = Callable[[int, Sequence[Payload], Sequence[int] | None], None]
PackAlike = Callable[[Sequence[Payload], Sequence[int] | None, int, int, int], bool]
UnpackRun = Callable[[int, int], tuple[list[int], Sequence[bytes]] | None]
Seal = Callable[[int, int], None]


class Headers(Protocol):
    """The data as little-endian u64 words: `headers[offset >> 3]` is *the* fetch of a descriptor word."""

    def __getitem__(self, index: int, /) -> int: ...


@dataclass(slots=True)
class RingWords:
    """The shared words as bound operations, each one atomic instruction, sequentially consistent.

    Less would do for some of them, and cost the same on x86-64; where an order matters, the line that uses
    the word says which.

    This is also where a ring is instrumented: replace fields by functions that do the same and something
    more (record, reach a sync point), and hand that to `RingProducer` or `RingConsumer`. There is one
    `store_write` a publish, one `store_read` a release, one `store_mask` for each mask and unmask, one
    `store_pending` for each wish, so that a plain ring pays nothing for the possibility.
    """

    load_write: Load
    store_write: Store
    load_read: Load
    store_read: Store
    load_mask: Load
    store_mask: Store
    load_pending: Load
    store_pending: Store
    load_features: Load
    store_features: Store
    publishes: Publishes | None = None
    """What the only producer of a ring whose `store_write` records needs to record its batches by itself."""

    @classmethod
    def on(cls, view: AtomicView, base: int) -> RingWords:
        """Bind the words of the control page at byte `base` of the viewed buffer."""
        write = view.cell_u32(base + WRITE_INDEX)
        read = view.cell_u32(base + READ_INDEX)
        mask = view.cell_u32(base + INTERRUPT_MASK)
        pending = view.cell_u32(base + PENDING_SEND_SZ)
        features = view.cell_u32(base + FEATURE_BITS)
        return cls(
            load_write=write.load,
            store_write=write.store,
            load_read=read.load,
            store_read=read.store,
            load_mask=mask.load,
            store_mask=mask.store,
            load_pending=pending.load,
            store_pending=pending.store,
            load_features=features.load,
            store_features=features.store,
        )


def checked_index(index: int, data_size: int, field: str) -> int:
    """Return an index of the peer's if it can be one; ProtocolViolation (`ring-index`) if not."""
    if index >= data_size or index % ALIGNMENT:
        raise impossible_index(index, data_size, field)
    return index


def impossible_index(index: int, data_size: int, field: str) -> ProtocolViolation:
    """Say that an index cannot be."""
    return ProtocolViolation(
        f"{field} {index:#x} in a ring of {data_size:#x} bytes", rule="ring-index", field=field, value=index
    )


class RingMemory(ABC):
    """A ring's pages in this process. Every process that works on the ring has its own, over the same pages.

    `data_size` is in bytes. `buffer` and `headers` are for use with the functions that `packer` and
    `unpacker` return; an index of the ring is an offset into them, and goes on past the end of the data by as
    much again, where the same bytes are seen a second time. After `close` whoever still uses the ring gets a
    ValueError or TypeError, and touches nothing.
    """

    buffer: object
    headers: Headers
    words: RingWords
    data_size: int
    closed: bool

    @staticmethod
    def map(fd: int, runs: Sequence[tuple[int, int]], on_close: Callable[[], None] | None = None) -> RingMemory:
        """Map a ring whose pages, control page first, are these (offset, length) runs of `fd`.

        Raises ProtocolViolation (`ring-size`), OSError (ENOMEM: the process has no mappings left).
        `on_close` is called once, at the end.
        """
        return _MirroredRing(fd, runs, on_close)

    @staticmethod
    def of_pages(memory: GuestMemory, gpas: Sequence[int]) -> RingMemory:
        """A ring accessed page by page through `memory`; `gpas` are its pages, checked, control page first."""
        return _SplitRing(memory, gpas)

    @staticmethod
    def on(buffer: bytearray) -> RingMemory:
        """A ring in a `bytearray` of whole pages, for tests of logic."""
        return _SplitRing(GuestMemory.on(buffer), range(0, len(buffer), PAGE_SIZE))

    def init(self) -> None:
        """Zero the control page and set the feature bit: the guest's part, before it sends OPENCHANNEL."""
        self.clear_control_page()
        self.words.store_features(FEAT_PENDING_SEND_SZ)

    @abstractmethod
    def packer(self, length: int, padding: int) -> Pack:
        """Return what stores a packet: `(buffer, offset, descriptor word, trans_id, payload, write_index)`.

        The word comes as its eight bytes, which are stored quicker than an integer. `payload` has `length` bytes;
        `padding` zero bytes follow it, then the trailer with write_index.
        """

    @abstractmethod
    def unpacker(self, start: int, length: int) -> Unpack:
        """Return what copies a packet out: `(buffer, offset) -> (trans_id, payload)`.

        The payload is `length` bytes from byte `start` of the packet on.
        """

    @abstractmethod
    def run_packer(self, length: int, padding: int, word: bytes) -> PackRun:
        """Return what stores packets alike, one behind the other: `(offset, payloads, trans_ids or None for 0)`.

        Every payload has `length` bytes and every packet begins before the end of the data.
        """

    def alike_packer(self, length: int, padding: int, word: bytes) -> PackAlike:
        """Return what does the same after a look at the lengths: `(payloads, trans_ids or None, count, offset, end)`.

        `count` is how many, `end` where the last one ends. False: some payload has not `length` bytes; what was
        written between the offsets then is no packet.
        """
        pack_run = self.run_packer(length, padding, word)

        def pack_alike(
            payloads: Sequence[Payload], trans_ids: Sequence[int] | None, count: int, offset: int, end: int
        ) -> bool:
            if countOf(map(len, payloads), length) != count:
                return False
            pack_run(offset, payloads, trans_ids)
            return True

        return pack_alike

    @abstractmethod
    def run_unpacker(self, start: int, length: int, word: int) -> UnpackRun:
        """Return what copies packets alike out: `(offset, count) -> (trans_ids, payloads)`.

        None when one of them has another descriptor word: each word is fetched once, and nothing that is used
        depends on a second look. What a `count` needs is kept: callers have few different ones.
        """

    @abstractmethod
    def viewer(self, start: int, length: int) -> Unpack:
        """Return what shows a packet: `(buffer, offset) -> (trans_id, payload)`, the payload a read-only memoryview.

        Where the data is mapped it is the ring's own bytes, which the peer can still change.
        """

    @abstractmethod
    def reserve(self, offset: int, length: int, padding: int, word: bytes) -> tuple[memoryview, Seal]:
        """Show where a packet's payload of `length` bytes will lie, and return what stores the rest around it.

        That is `(trans_id, write_index)`. Whoever reserves releases the memoryview before it seals.
        """

    @abstractmethod
    def clear_control_page(self) -> None:
        """Fill it with zeros; only for a ring that nobody uses yet."""

    @abstractmethod
    def close(self) -> None:
        """Release every view of the ring, then its mapping. May be called twice."""


class _MirroredRing(RingMemory):
    """Data, data again, control page: a packet is one piece wherever it begins, at the offset of its index."""

    def __init__(self, fd: int, runs: Sequence[tuple[int, int]], on_close: Callable[[], None] | None) -> None:
        self.data_size = _data_size(sum(length for _, length in runs))
        data = _without_first_page(runs)
        self._mapping = stitch(fd, [*data, *data, (runs[0][0], PAGE_SIZE)])
        self.closed = False
        self.buffer = self._mapping
        self._view = AtomicView(self._mapping)
        self.words = RingWords.on(self._view, 2 * self.data_size)
        # A cast holds the mapping by itself: releasing its parent neither releases it nor complains.
        with memoryview(self._mapping) as whole:
            self._words64 = whole.cast("Q")
            # Of each word the upper half: of a packet's last one, the index that its trailer has.
            self._trailers = whole.cast("I")[1::2]
            self._bytes = whole.toreadonly()
        self.headers = self._words64
        self._on_close = on_close

    def packer(self, length: int, padding: int) -> Pack:
        if length <= _LARGE_PAYLOAD:
            # The trailer is a u64, write_index << 32: a zero half ("4x") and the index.
            return Struct(f"<8sQ{length + padding}s4xI").pack_into
        pack_descriptor = _DESCRIPTOR.pack_into
        pack_end = Struct(f"<{padding + 4}xI").pack_into

        def pack(
            buffer: mmap.mmap, offset: int, word: bytes, trans_id: int, payload: Payload, write_index: int
        ) -> None:
            pack_descriptor(buffer, offset, word, trans_id)
            begin = offset + DESCRIPTOR_SIZE
            end = begin + length
            buffer[begin:end] = payload
            pack_end(buffer, end, write_index)

        return pack

    def unpacker(self, start: int, length: int) -> Unpack:
        return Struct(f"<8xQ{start - DESCRIPTOR_SIZE}x{length}s").unpack_from

    def run_packer(self, length: int, padding: int, word: bytes) -> PackRun:
        mapping, words64, trailers = self._mapping, self._words64, self._trailers
        descriptor, tail = _DESCRIPTOR.pack(word, 0), bytes(padding + TRAILER_SIZE)
        between = tail + descriptor
        size = DESCRIPTOR_SIZE + length + len(tail)
        step = size >> 3
        starts = _starts(self.data_size)

        def pack_run(offset: int, payloads: Sequence[Payload], trans_ids: Sequence[int] | None) -> None:
            # A few calls into C for all packets together: what is the same in each goes between the payloads,
            # and what differs is set in one stride, the trailers from a table of what they can be.
            count = len(payloads)
            end = offset + count * size
            body_end = end - len(tail)
            mapping[offset : offset + DESCRIPTOR_SIZE] = descriptor
            mapping[offset + DESCRIPTOR_SIZE : body_end] = between.join(payloads)
            mapping[body_end:end] = tail
            first, last = offset >> 3, end >> 3
            trailers[first + step - 1 : last : step] = starts[first:last:step]
            if trans_ids is not None:
                words64[first + 1 : last : step] = memoryview(_ids(count)(*trans_ids)).cast("Q")

        return pack_run

    def alike_packer(self, length: int, padding: int, word: bytes) -> PackAlike:
        if length > _LONGEST_PASCAL:
            return self._long_packer(length, padding, word)
        pack_measured = super().alike_packer(length, padding, word)
        mapping, words64, trailers = self._mapping, self._words64, self._trailers
        size = DESCRIPTOR_SIZE + length + padding + TRAILER_SIZE
        step, before = size >> 3, DESCRIPTOR_SIZE - 1
        to_trailer = step - 1
        starts = _starts(self.data_size)
        last_count = nwords = 0
        pack: Pack
        lengths = zeros = b""
        words = memoryview(b"")

        def pack_alike(
            payloads: Sequence[Payload], trans_ids: Sequence[int] | None, count: int, offset: int, end: int
        ) -> bool:
            # To measure payloads takes as long as to copy them, so here the copy tells their lengths. Everything else
            # of the packets is zero then, and set in strides as in a run. The lengths are read where the peer could
            # have changed them: it would get other bytes than were meant for it, and nobody else anything.
            nonlocal last_count, lengths, nwords, pack, words, zeros
            if count != last_count:
                if count > _MOST_ALIKE:
                    return pack_measured(payloads, trans_ids, count, offset, end)
                pack, lengths, zeros, words, nwords = _pascals(length, padding, word, count)
                last_count = count
            try:
                pack(mapping, offset, *payloads)
            except struct_error:  # it takes bytes and bytearrays only
                return pack_measured(payloads, trans_ids, count, offset, end)
            at = offset + before
            if mapping[at:end:size] != lengths:
                return False
            first = offset >> 3
            last = first + nwords
            words64[first:last:step] = words
            if trans_ids is None:
                mapping[at:end:size] = zeros
            else:
                words64[first + 1 : last : step] = memoryview(_ids(count)(*trans_ids)).cast("Q")
            trailers[first + to_trailer : last : step] = starts[first:last:step]
            return True

        return pack_alike

    def _long_packer(self, length: int, padding: int, word: bytes) -> PackAlike:
        """`alike_packer` for long payloads: to make an integer of each length takes as long as to copy 500 bytes.

        None is shorter if each has a last byte (a small integer, which is not made); then none is longer if together
        they are as long as they should be.
        """
        pack_run = self.run_packer(length, padding, word)
        last_bytes, look_at_all = itemgetter(length - 1), deque[int](maxlen=0).extend

        def pack_alike(
            payloads: Sequence[Payload], trans_ids: Sequence[int] | None, _count: int, offset: int, _end: int
        ) -> bool:
            try:
                look_at_all(map(last_bytes, payloads))
                pack_run(offset, payloads, trans_ids)
            except IndexError:  # a short payload's, or a mapping's whose slice has another length
                return False
            return True

        return pack_alike

    def run_unpacker(self, start: int, length: int, word: int) -> UnpackRun:
        mapping, words64 = self._mapping, self._words64
        size = start + length + TRAILER_SIZE
        step = size >> 3
        known: dict[int, tuple[Callable[..., tuple[bytes, ...]], memoryview]] = {}

        def unpack_run(offset: int, count: int) -> tuple[list[int], Sequence[bytes]] | None:
            try:
                unpack, alike = known[count]
            except KeyError:
                one = f"{start}x{length}s{TRAILER_SIZE}x"
                alike = memoryview(array("Q", (word,)) * count)
                unpack = Struct("<" + one * count).unpack_from
                known[count] = unpack, alike
            first = offset >> 3
            last = first + count * step
            if words64[first:last:step] != alike:
                return None
            return words64[first + 1 : last : step].tolist(), unpack(mapping, offset)

        return unpack_run

    def viewer(self, start: int, length: int) -> Unpack:
        words64, bytes_ = self._words64, self._bytes

        def view(_buffer: mmap.mmap, offset: int) -> tuple[int, memoryview]:
            begin = offset + start
            return words64[(offset >> 3) + 1], bytes_[begin : begin + length]

        return view

    def reserve(self, offset: int, length: int, padding: int, word: bytes) -> tuple[memoryview, Seal]:
        begin = offset + DESCRIPTOR_SIZE
        mapping = self._mapping

        def seal(trans_id: int, write_index: int) -> None:
            _DESCRIPTOR.pack_into(mapping, offset, word, trans_id)
            Struct(f"<{padding + 4}xI").pack_into(mapping, begin + length, write_index)

        with memoryview(mapping) as whole:
            return whole[begin : begin + length], seal

    def clear_control_page(self) -> None:
        self._mapping[2 * self.data_size :] = bytes(PAGE_SIZE)

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._words64.release()
        self._trailers.release()
        self._bytes.release()
        self._view.close()
        self._mapping.close()
        if self._on_close is not None:
            self._on_close()


class _SplitRing(RingMemory):
    """Pages anywhere in guest memory, copied one by one: several times slower, but no mapping of its own."""

    def __init__(self, memory: GuestMemory, gpas: Sequence[int]) -> None:
        self.data_size = _data_size(len(gpas) * PAGE_SIZE)
        self.closed = False
        self._memory = memory
        self._gpas = gpas
        self._view = AtomicView(memory.buffer)
        self.words = RingWords.on(self._view, gpas[0])
        self.buffer = None
        self.headers = self

    def __getitem__(self, index: int, /) -> int:
        """The u64 word `index` of the data, in one copy: words do not cross pages."""
        return int.from_bytes(self._copy_out(index << 3, 8), "little")

    def packer(self, length: int, padding: int) -> Pack:
        pack_whole = Struct(f"<8sQ{length + padding}s4xI").pack

        def pack(_buffer: None, offset: int, word: bytes, trans_id: int, payload: Payload, write_index: int) -> None:
            self._copy_in(offset, pack_whole(word, trans_id, payload, write_index))

        return pack

    def unpacker(self, start: int, length: int) -> Unpack:
        unpack_whole = Struct(f"<8xQ{start - DESCRIPTOR_SIZE}x{length}s").unpack

        def unpack(_buffer: None, offset: int) -> tuple[Any, ...]:
            return unpack_whole(self._copy_out(offset, start + length))

        return unpack

    def run_packer(self, length: int, padding: int, word: bytes) -> PackRun:
        size = DESCRIPTOR_SIZE + length + padding + TRAILER_SIZE
        pack_whole = Struct(f"<8sQ{length + padding}s4xI").pack

        def pack_run(offset: int, payloads: Sequence[Payload], trans_ids: Sequence[int] | None) -> None:
            starts = range(offset, offset + len(payloads) * size, size)
            # `struct` takes bytes and bytearrays only; bytes are not copied here.
            packets = zip(trans_ids or bytes(len(payloads)), map(bytes, payloads), starts, strict=True)
            self._copy_in(offset, b"".join([pack_whole(word, *packet) for packet in packets]))

        return pack_run

    def run_unpacker(self, start: int, length: int, word: int) -> UnpackRun:
        packet = Struct(f"<QQ{start - DESCRIPTOR_SIZE}x{length}s{TRAILER_SIZE}x")

        def unpack_run(offset: int, count: int) -> tuple[list[int], Sequence[bytes]] | None:
            copied = packet.iter_unpack(self._copy_out(offset, count * packet.size))
            words, trans_ids, payloads = zip(*copied, strict=True)
            return (list(trans_ids), payloads) if words == (word,) * count else None

        return unpack_run

    def viewer(self, start: int, length: int) -> Unpack:
        unpack = self.unpacker(start, length)

        def view(buffer: None, offset: int) -> tuple[int, memoryview]:
            trans_id, payload = unpack(buffer, offset)
            return trans_id, memoryview(payload)

        return view

    def reserve(self, offset: int, length: int, padding: int, word: bytes) -> tuple[memoryview, Seal]:
        payload = bytearray(length)
        pack = self.packer(length, padding)

        def seal(trans_id: int, write_index: int) -> None:
            pack(None, offset, word, trans_id, payload, write_index)

        return memoryview(payload), seal

    def clear_control_page(self) -> None:
        self._memory.write(self._gpas[0], bytes(PAGE_SIZE))

    def close(self) -> None:
        self.closed = True
        self._view.close()

    def _pieces(self, offset: int, length: int) -> list[tuple[int, int]]:
        """The (gpa, length) pieces, none across a page, of `length` bytes from `offset` on, which wrap."""
        if self.closed:
            raise ValueError("operation on a closed ring")
        pieces = []
        while length > 0:
            page, in_page = divmod(offset % self.data_size, PAGE_SIZE)
            step = min(length, PAGE_SIZE - in_page)
            pieces.append((self._gpas[1 + page] + in_page, step))
            offset += step
            length -= step
        return pieces

    def _copy_out(self, offset: int, length: int) -> bytes:
        return b"".join([self._memory.read(gpa, step) for gpa, step in self._pieces(offset, length)])

    def _copy_in(self, offset: int, data: bytes) -> None:
        done = 0
        for gpa, step in self._pieces(offset, len(data)):
            self._memory.write(gpa, data[done : done + step])
            done += step


@lru_cache(maxsize=_MOST_COUNTS)  # for all rings of the process
def _pascals(length: int, padding: int, word: bytes, count: int) -> tuple[Pack, bytes, bytes, memoryview, int]:
    """What stores so many payloads where packets of `length` bytes would have them, and everything else as zeros.

    Their lengths come to lie where the highest bytes of the ids belong; a payload that is longer shows one byte more.
    Then these lengths as they should be, zeros to put there, the descriptor words, the words of all packets.
    """
    one = f"{DESCRIPTOR_SIZE - 1}x{length + 2}p{padding + TRAILER_SIZE - 1}x"
    pack = Struct("<" + one * count).pack_into
    step = (DESCRIPTOR_SIZE + length + padding + TRAILER_SIZE) >> 3
    return pack, bytes((length,)) * count, bytes(count), memoryview(array("Q", word) * count), step * count


@lru_cache(maxsize=_MOST_COUNTS)
def _ids(count: int) -> Callable[..., bytes]:
    """What packs so many transaction ids."""
    return Struct(f"<{count}Q").pack


def _starts(data_size: int) -> memoryview:
    """Every index at which a packet of such a ring can begin, as u32: what its trailer says of it.

    One table for all rings of the process, as long as the largest needs it.
    """
    global _every_start
    if len(_every_start) < data_size >> 3:
        _every_start = memoryview(array("I", range(0, data_size, 8)))
    return _every_start


def _data_size(ring_bytes: int) -> int:
    """The size of the data area of a ring of `ring_bytes`; one that cannot be is the peer's fault."""
    pages, rest = ring_bytes >> PAGE_SHIFT, ring_bytes % PAGE_SIZE
    if rest or not 2 <= pages <= _MOST_PAGES:
        raise ProtocolViolation(
            f"a ring of {ring_bytes} bytes is not a control page and whole pages of data",
            rule="ring-size",
            field="byte_count",
            value=ring_bytes,
        )
    return ring_bytes - PAGE_SIZE


def _without_first_page(runs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The runs of the data area alone: the control page is the first page of the first run."""
    offset, length = runs[0]
    rest = [(offset + PAGE_SIZE, length - PAGE_SIZE)] if length > PAGE_SIZE else []
    return [*rest, *runs[1:]]
