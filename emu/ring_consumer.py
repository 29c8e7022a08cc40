"""The reading end of a ring: packets one by one (`drain`), many at once (`read_many`, `read_runs`), or in place
(`hold`).

Packets come out in *runs*: packets of one type and flags that follow each other, as columns of transaction ids and
payloads. That is what is cheap to copy, since packets of one length are copied together, and what `write_many`
takes. Everything is copied before it is handed out, except by `hold`. What orders the words is said in `emu.ring`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from itertools import repeat
from types import TracebackType
from typing import Any, Final, Protocol

from emu.errors import ProtocolViolation
from emu.ring_drain import drain
from emu.ring_memory import RingMemory, RingWords, Unpack, UnpackRun, checked_index
from emu.ring_packets import (
    ALIKE,
    LONGEST_RUN,
    ROUND_COUNTS,
    SHORTEST_READ,
    Kind,
    Plan,
    Plans,
    PlansOfViews,
    PlansWithHeader,
    beyond,
)
from emu.wire.ring_layout import ALIGNMENT, FEAT_PENDING_SEND_SZ

Packet = tuple[int, int, int, bytes]
"""Packet type, flags, trans_id, payload (whose padding the wire cannot tell from its bytes)."""

Run = tuple[int, int, list[int], list[bytes]]
"""Packet type, flags; then the trans_ids and the payloads of packets that followed each other.

A run ends where one of the two changes, and where the ring was released in between."""

_Taken = tuple[Kind, list[int], list[Any]]
"""Packets that were taken out of the ring and not yet handed out."""

_NO_LIMIT: Final = 1 << 29


class ReadRuns(Protocol):
    """Take what there is, as runs: `limit` packets at most, and none that begins `most_bytes` of ring later.

    None: there is nothing; some: there may be more, and what comes meanwhile is for the next call. read_index
    is released after each eighth of the ring and at the end; ask `take_signal` then. What comes before a fault
    is returned; the fault is in `fault` then, and the next call raises it, even if the peer has set it right
    meanwhile: ProtocolViolation as `drain` says.
    """

    def __call__(self, limit: int | None = None, most_bytes: int | None = None) -> list[Run]: ...


class RingConsumer:
    """The reading end. Attaching reads both indices from the ring, so it may be done while the ring is in
    use.

    `sole`: no other consumer object reads this ring, so read_index is kept here and never loaded again. With
    `sole=False` each reading begins by loading it, and callers see to it that one ends before the next begins.
    Raises ProtocolViolation (`ring-index`) when the indices in the ring cannot be.
    """

    __slots__ = (
        "_alike",
        "_at_most",
        "_data_size",
        "_load_write",
        "_bad_wish",
        "_last_word",
        "_plans",
        "_plans_of_views",
        "_plans_with_header",
        "_read",
        "_reading",
        "_shown_plan",
        "_sole",
        "begin_read",
        "bytes",
        "emptied",
        "end_read",
        "fault",
        "intr_in_full",
        "memory",
        "packets",
        "read_lone",
        "read_runs",
        "releases",
        "signal_owed",
        "words",
    )

    begin_read: Callable[[], None]
    """Mask: no data-arrived signals, since this end reads anyway (`hv_begin_read`)."""
    end_read: Callable[[], int]
    """Unmask, then look again; return the bytes to read (`hv_end_read`).

    If there are any, no signal will come for them: mask and drain once more. ProtocolViolation as `bytes_to_read`.
    """
    emptied: Callable[[], bool]
    """Whether a look finds nothing: no packet published, nothing wrong that the next `read_…` would raise."""
    read_lone: Callable[[], Packet | None]
    """Take the packet, if there is exactly one, of a kind seen before: a round trip's. None: see `read_many`."""
    read_runs: ReadRuns

    def __init__(self, memory: RingMemory, *, sole: bool = True, words: RingWords | None = None) -> None:
        self.memory = memory
        self.words = words or memory.words
        self._load_write = self.words.load_write
        self._data_size = memory.data_size
        self._plans = Plans(memory)
        self._plans_with_header = PlansWithHeader(memory)
        self._plans_of_views = PlansOfViews(memory)
        self._sole = sole
        self.signal_owed = False  # see `take_signal`
        self._reading = False
        self._bad_wish = 0
        self._last_word = -1  # descriptor of the packet before, if that may be the next one's
        self._shown_plan: Plan | None = None
        self._alike = 0  # packets alike, up to the last one
        self._at_most = SHORTEST_READ  # of them are looked at together next time
        self.fault: ProtocolViolation | None = None  # behind what was read; the next `read_…` raises it
        self.packets = 0  # copied out and released
        self.bytes = 0  # of ring that they took, with descriptors and trailers
        self.releases = 0  # stores of read_index
        self.intr_in_full = 0  # room-again signals owed so far
        self._load_own()
        checked_index(self.words.load_write(), memory.data_size, "write_index")
        self.begin_read = partial(self.words.store_mask, 1)
        self.end_read, self.emptied, self.read_lone = _short_ways(self, self.words)
        self.read_runs = _run_reader(self)

    @property
    def bytes_to_read(self) -> int:
        """Bytes published that were not released here; ProtocolViolation when write_index cannot be."""
        write, read, data_size = self._load_write(), self._read, self._data_size
        # Our own index is checked already, and so is what equals it.
        return 0 if write == read else (checked_index(write, data_size, "write_index") - read) % data_size

    def read_many(self, limit: int | None = None, most_bytes: int | None = None) -> list[Packet]:
        """As `read_runs`, packet by packet."""
        packets: list[Packet] = []
        for packet_type, flags, trans_ids, payloads in self.read_runs(limit, most_bytes):
            packets += zip(repeat(packet_type), repeat(flags), trans_ids, payloads)
        return packets

    def drain(self, limit: int | None = None) -> Generator[Packet, None, None]:
        """Take packets, `limit` at most, until the ring is empty at a second look.

        read_index is released after each eighth of the ring and at the end, also when the iterator is closed
        early, so a packet that was handed out is never read twice, and one that was not stays in the ring. Close
        it (a `for` over it does) before the next reading, then ask `take_signal`.

        Raises ProtocolViolation once everything before the fault was handed out and released: `ring-index`,
        the `packet-…` rules of `check_descriptor`, and, when all was read, `pending-send-size` if the
        producer waits for more than the ring can ever have free.
        """
        return drain(self, self._plans, limit)

    def drain_with_headers(
        self, limit: int | None = None
    ) -> Generator[tuple[int, int, int, tuple[bytes, bytes]], None, None]:
        """As `drain`, for packets with type-specific headers: the last item is (header, payload)."""
        return drain(self, self._plans_with_header, limit)

    def read(self) -> Packet | None:
        """Take one packet and release it; None when there is none. Raises as `drain` does."""
        for (packet_type, flags, _overhead), trans_ids, payloads in self._take(self._plans, 1, None):
            return packet_type, flags, trans_ids[0], payloads[0]
        return None

    def hold(self, limit: int | None = None, most_bytes: int | None = None) -> HeldPackets:
        """Show what there is without copying it, as much as `read_runs` would take; it stays until released.

        Nothing else is read meanwhile. What comes before a fault is shown, and the next reading raises it.
        """
        self._begin()
        try:
            # Acquire: as in `_take`.
            published = self.bytes_to_read
            shown = self._show_alike(published, limit, most_bytes) or self._show(published, limit, most_bytes)
        except BaseException:
            self._reading = False
            raise
        return HeldPackets(self, *shown)

    def _show_alike(
        self, published: int, limit: int | None, most_bytes: int | None
    ) -> tuple[list[tuple[int, int, int, memoryview]], int] | None:
        """As `_show`, packets like the last one that was shown; None when the first is another."""
        plan = self._shown_plan
        if plan is None or self.fault is not None:
            return None
        (packet_type, flags, _overhead), size, show, _unpack_run, _longest_run, its_word = plan
        buffer, headers, start = self.memory.buffer, self.memory.headers, self._read
        if most_bytes is not None and most_bytes + size <= published:
            published = most_bytes + size - 1  # the last one begins before `most_bytes`
        count = published // size
        if limit is not None and limit < count:
            count = limit
        end = start + count * size
        packets = []
        for at in range(start, end, size):
            # The one fetch of a descriptor word.
            if headers[at >> 3] != its_word:
                end = at
                break
            trans_id, payload = show(buffer, at)
            packets.append((packet_type, flags, trans_id, payload))
        return (packets, end - start) if packets else None

    def _show(
        self, published: int, limit: int | None, most_bytes: int | None
    ) -> tuple[list[tuple[int, int, int, memoryview]], int]:
        """The body of `hold`: packets as they lie, and the bytes that they take."""
        start = self._read
        stop = start + min(published, self._data_size if most_bytes is None else most_bytes)
        taken: list[_Taken] = []
        at, fault = self._copy_out(
            self._plans_of_views, start, stop, start + published, _NO_LIMIT if limit is None else limit, taken
        )
        self._shown_plan, self._last_word = self._plans_of_views.table.get(self._last_word), -1
        if fault is not None:
            if not taken:
                raise fault
            self.fault = fault.with_traceback(None)
        packets = [
            (packet_type, flags, trans_id, payload)
            for (packet_type, flags, _overhead), trans_ids, payloads in taken
            for trans_id, payload in zip(trans_ids, payloads, strict=True)
        ]
        return packets, at - start

    def take_signal(self) -> bool:
        """Return whether the producer is owed a signal that there is room again, and forget it."""
        signal, self.signal_owed = self.signal_owed, False
        return signal

    def release_held(self, nbytes: int, packets: int) -> None:
        """The end of `HeldPackets`: their bytes are the producer's again."""
        self._reading = False
        if nbytes and not self.memory.closed:
            self._release(nbytes, packets)

    def _load_own(self) -> None:
        self._read = checked_index(self.words.load_read(), self.memory.data_size, "read_index")

    def _begin(self) -> None:
        """Begin to read."""
        assert not self._reading, "a drain of this ring was not closed, or packets are still held"
        if not self._sole:
            self._load_own()
        self._reading = True

    def _take(self, plans: Plans, limit: int | None, most_bytes: int | None) -> list[_Taken]:
        """The body of `read_runs`; a chunk is copied, then released."""
        data_size = self._data_size
        chunk = data_size >> 3
        left = _NO_LIMIT if limit is None else limit
        taken: list[_Taken] = []
        fault, self.fault = self.fault, None
        if fault is not None:
            raise fault
        assert not self._reading, "a drain of this ring was not closed, or packets are still held"
        if not self._sole:
            self._load_own()
        start = at = self._read
        # Acquire: the packets' bytes are loaded after the index that covers them.
        last = start + (checked_index(self._load_write(), data_size, "write_index") - start) % data_size
        if last == start and self._bad_wish:
            raise self._never_enough()
        end = last if most_bytes is None else min(last, start + most_bytes)
        while at < end and left > 0 and fault is None:
            runs = len(taken)
            # Offsets run on into the second view of the data.
            at, fault = self._copy_out(plans, start, min(end, start + chunk), last, left, taken)
            packets = sum([len(one[1]) for one in taken[runs:]])
            left -= packets
            if at != start:
                self._release(at - start, packets)
                start = at
        if fault is None and self._bad_wish and at == last:
            fault = self._never_enough()
        if fault is not None:
            if not taken:
                raise fault
            self.fault = fault.with_traceback(None)
        return taken

    def _copy_out(
        self, plans: Plans, at: int, stop: int, last: int, limit: int, taken: list[_Taken]
    ) -> tuple[int, ProtocolViolation | None]:
        """Take packets that begin in [at, stop), `limit` at most; none may go beyond `last`.

        Adds to `taken`; returns where it stopped, and the fault that it stopped at.
        """
        memory = self.memory
        buffer, headers, table = memory.buffer, memory.headers, plans.table
        last_word, alike = self._last_word, self._alike
        kind: Kind | None = None
        trans_ids: list[int] = []
        payloads: list[Any] = []
        before = 0  # packets of the runs before this one
        fault = None
        while at < stop and fault is None and (left := limit - before - len(trans_ids)) > 0:
            for _ in repeat(None, left):
                # The one fetch of a descriptor word.
                word = headers[at >> 3]
                fresh = word != last_word
                if fresh or kind is None:
                    try:
                        plan = table[word]
                    except KeyError:
                        try:
                            plan = plans.add(word)
                        except ProtocolViolation as violation:
                            fault = violation
                            break
                    its_kind, size, unpack, unpack_run, longest_run, _word = plan
                    if its_kind != kind:
                        before += len(trans_ids)
                        kind, trans_ids, payloads = its_kind, [], []
                        taken.append((kind, trans_ids, payloads))
                if fresh:
                    last_word, alike = word, 0
                elif alike < ALIKE:
                    alike += 1
                elif longest_run:
                    most = min((stop - at) // size, limit - before - len(trans_ids), longest_run, self._at_most)
                    count = ROUND_COUNTS[most]
                    if count >= SHORTEST_READ:
                        # It fetches the words once more, and what it takes is what it found them to be.
                        run = unpack_run(at, count)
                        if run is not None:
                            trans_ids += run[0]
                            payloads += run[1]
                            at += count * size
                            if count == self._at_most:
                                self._at_most = min(2 * count, LONGEST_RUN)
                            break
                        alike, self._at_most = 0, SHORTEST_READ
                end = at + size
                if end > last:
                    fault = beyond(size, last - at)
                    break
                trans_id, payload = unpack(buffer, at)
                trans_ids.append(trans_id)
                payloads.append(payload)
                at = end
                if at >= stop:
                    break
        if taken and not taken[-1][1]:
            taken.pop()  # a fault came before its first packet
        self._last_word, self._alike = last_word, alike
        return at, fault

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
        if words.load_features() & FEAT_PENDING_SEND_SZ and (wish := words.load_pending() & -ALIGNMENT):
            self._look_at_wish(wish, freed)

    def _look_at_wish(self, wish: int, freed: int) -> None:
        """Behind a release of `freed` bytes: whether it made the room that the producer waits for."""
        read, data_size = self._read, self._data_size
        if wish > data_size - 8:
            self._bad_wish = wish
            return
        # write_index after pending_send_sz. One that cannot be gives a wrong answer to whoever wrote it, and
        # is refused at the next look for packets.
        room = (read - self._load_write() - 8) % data_size
        if room - freed < wish <= room:
            self.intr_in_full += 1
            self.signal_owed = True

    def _never_enough(self) -> ProtocolViolation:
        """Say that the producer waits for more than there can be."""
        return ProtocolViolation(
            f"the producer waits for {self._bad_wish} free bytes in a ring of {self.memory.data_size}",
            rule="pending-send-size",
            field="pending_send_sz",
            value=self._bad_wish,
        )


def _short_ways(
    ring: RingConsumer, words: RingWords
) -> tuple[Callable[[], int], Callable[[], bool], Callable[[], Packet | None]]:
    """Make `end_read`, `emptied` and `read_lone`, functions over variables of their own, quicker than methods.

    The last holds to the rules of `RingConsumer._take`: what is not exactly one whole packet, between indices that
    can be, it leaves where it is, for those who can say what is wrong with it.
    """
    memory, sole = ring.memory, ring._sole
    buffer, headers, data_size = memory.buffer, memory.headers, memory.data_size
    load_read, load_write = words.load_read, words.load_write
    # A plan was checked when it was made.
    plan_of = ring._plans.table.get
    store_mask, store_read = words.store_mask, words.store_read
    load_features, load_pending = words.load_features, words.load_pending

    def end_read() -> int:
        store_mask(0)  # full barrier before write_index is loaded again
        return 0 if load_write() == ring._read else ring.bytes_to_read

    def emptied() -> bool:
        return load_write() == ring._read and not ring._bad_wish and ring.fault is None

    def read_lone() -> Packet | None:
        read = ring._read if sole else load_read()
        # Acquire: the packet's bytes are loaded after the index that covers them.
        write = load_write()
        if read == write or read >= data_size or write >= data_size or read % ALIGNMENT:
            return None
        if ring._reading or ring.fault is not None:
            return None
        # The one fetch of the descriptor word.
        plan = plan_of(headers[read >> 3])
        # One that goes beyond what is published is refused here, too, as is a write_index that is no multiple of 8.
        if plan is None or (write - read) % data_size != plan[1]:
            return None
        (packet_type, flags, _overhead), size, unpack, _unpack_run, _longest_run, _word = plan
        trans_id, payload = unpack(buffer, read)
        # As `_release`.
        ring._read = read = (read + size) % data_size
        ring.packets += 1
        ring.bytes += size
        ring.releases += 1
        ring._bad_wish = 0
        store_read(read)
        if load_features() & FEAT_PENDING_SEND_SZ and (wish := load_pending() & -ALIGNMENT):
            ring._look_at_wish(wish, size)
            if ring._bad_wish:
                ring.fault = ring._never_enough()
        return packet_type, flags, trans_id, payload

    return end_read, emptied, read_lone


def _run_reader(ring: RingConsumer) -> ReadRuns:
    """Make `read_runs`: packets like those before, as long as that is what there is, up to an eighth of the ring.

    It releases once then. When there is anything else to see to, nothing is taken here, and `_take` does it. A function
    over variables of its own because its lines, not the copies, are most of what a small read costs.
    """
    words, memory = ring.words, ring.memory
    buffer, headers, data_size = memory.buffer, memory.headers, memory.data_size
    load_write, store_read = words.load_write, words.store_read
    load_features, load_pending = words.load_features, words.load_pending
    sole, chunk = ring._sole, data_size >> 3
    plans = ring._plans
    its_word = -1  # whose plan the next ones are of
    packet_type = flags = size = longest_run = 0
    unpack: Unpack
    unpack_run: UnpackRun

    def read_runs(limit: int | None = None, most_bytes: int | None = None) -> list[Run]:
        nonlocal flags, its_word, longest_run, packet_type, size, unpack, unpack_run
        word = ring._last_word
        if ring._alike < ALIKE or word < 0 or ring._reading or ring.fault is not None:
            return read_any(limit, most_bytes)
        if word != its_word:
            plan = plans.table.get(word)
            if plan is None:
                return read_any(limit, most_bytes)
            (packet_type, flags, _overhead), size, unpack, unpack_run, longest_run, its_word = plan
        if not sole:
            ring._load_own()
        start = at = ring._read
        # Acquire: the packets' bytes are loaded after the index that covers them.
        write = load_write()
        if write >= data_size or write & 7:
            return read_any(limit, most_bytes)
        published = write - at
        if published <= 0:
            if not published:
                return read_any(limit, most_bytes) if ring._bad_wish else []
            published += data_size
        most = (chunk if most_bytes is None or most_bytes > chunk else most_bytes) + size - 1
        left = (published if published < most else most) // size
        if limit is not None and limit < left:
            left = limit
        trans_ids: list[int] = []
        payloads: list[Any] = []
        while left >= SHORTEST_READ and longest_run >= SHORTEST_READ:
            count = ROUND_COUNTS[left] if left < longest_run else longest_run
            run = unpack_run(at, count)
            if run is None:
                left = 0
                break
            trans_ids += run[0]
            payloads += run[1]
            at += count * size
            left -= count
        while left > 0:
            # The one fetch of a descriptor word.
            if headers[at >> 3] != word:
                break
            trans_id, payload = unpack(buffer, at)
            trans_ids.append(trans_id)
            payloads.append(payload)
            at += size
            left -= 1
        if at == start:
            return read_any(limit, most_bytes)
        # As `_release`, which would cost a small read a sixth more.
        ring._read = read = at if at < data_size else at - data_size
        ring.packets += len(payloads)
        ring.bytes += at - start
        ring.releases += 1
        ring._bad_wish = 0
        # Release for the copies, full barrier before pending_send_sz is loaded.
        store_read(read)
        if load_features() & FEAT_PENDING_SEND_SZ and (wish := load_pending() & -ALIGNMENT):
            ring._look_at_wish(wish, at - start)
        return [(packet_type, flags, trans_ids, payloads)]

    def read_any(limit: int | None, most_bytes: int | None) -> list[Run]:
        runs = ring._take(plans, limit, most_bytes)
        return [(kind[0], kind[1], trans_ids, payloads) for kind, trans_ids, payloads in runs]

    return read_runs


class HeldPackets:
    """Packets as they lie in the ring: (type, flags, trans_id, payload), the payload a read-only memoryview.

    Their descriptors and ids were fetched once and checked, and the views lie within the ring. The *bytes* under a
    view are the peer's still: it may change them at any moment, also between two looks at the same byte. So a
    view is for moving bytes on (into a file, a socket, another ring), or for a peer that is trusted; whoever
    decides anything by what he sees copies it out first and looks at the copy.

    `release`, or the end of a `with` block, gives the room back to the producer; ask `take_signal` of the consumer
    then. The views cannot be used afterwards; slices taken from them must have been released before.
    """

    __slots__ = ("_consumer", "_nbytes", "packets")

    def __init__(self, consumer: RingConsumer, packets: list[tuple[int, int, int, memoryview]], nbytes: int) -> None:
        self.packets = packets
        self._nbytes = nbytes
        self._consumer: RingConsumer | None = consumer

    def release(self) -> None:
        """Give the room back; may be called twice."""
        consumer, self._consumer = self._consumer, None
        if consumer is None:
            return
        count = len(self.packets)
        for packet in self.packets:
            packet[3].release()
        consumer.release_held(self._nbytes, count)

    def __enter__(self) -> HeldPackets:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
