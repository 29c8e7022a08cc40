"""A channel's two rings as one process sees them; mapped at first use, keyed by the life of their pages.

The record in guest RAM says which pages; producer and consumer objects belong to this process. A channel
that was closed and opened again has pages of a new generation, so an old mapping is never used for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from emu.errors import OutOfMemory, ProtocolViolation
from emu.gpadl import MapBudget, map_ring
from emu.memory import PAGE_SHIFT, PAGE_SIZE, GuestMemory
from emu.ring import RingConsumer, RingMemory, RingProducer, RingWords
from emu.ring_trace import recorded
from emu.tracing import Recorder
from emu.wire.ring_layout import FEAT_PENDING_SEND_SZ, FEATURE_BITS
from guestproc.kernel.layout import Channel
from guestproc.kernel.records import Record, position_of
from guestproc.protocol.opening import ring_pages

FRESH_CONTROL_PAGE: Final = (
    bytes(FEATURE_BITS) + FEAT_PENDING_SEND_SZ.to_bytes(4, "little") + bytes(4096 - FEATURE_BITS - 4)
)
Reader = Callable[[RingMemory, RingWords], RingConsumer]
Writer = Callable[[RingMemory, RingWords], RingProducer]
_RING_GENERATION: Final = position_of(Channel, "ring_generation")
OUTBOUND: Final = 0
INBOUND: Final = 1


class ChannelRings:
    """`outbound` (guest to host) and `inbound` (host to guest) of one opened channel."""

    __slots__ = ("channel_generation", "generation", "inbound", "memories", "outbound")

    def __init__(
        self,
        key: tuple[int, int],
        memories: tuple[RingMemory, RingMemory],
        words: list[RingWords],
        reader: Reader | None = None,
        writer: Writer | None = None,
    ) -> None:
        """`key`: the generations of the channel's record and of the rings' pages; `reader` and `writer` make ends."""
        self.channel_generation, self.generation = key
        self.memories = memories
        # Several processes may send and, after a retarget, receive: indices are read afresh each time.
        if writer is None:
            self.outbound = RingProducer(memories[OUTBOUND], sole=False, words=words[OUTBOUND])
        else:
            self.outbound = writer(memories[OUTBOUND], words[OUTBOUND])
        if reader is None:
            self.inbound = RingConsumer(memories[INBOUND], sole=False, words=words[INBOUND])
        else:
            self.inbound = reader(memories[INBOUND], words[INBOUND])

    def close(self) -> None:
        """Unmap both rings."""
        for memory in self.memories:
            memory.close()


class RingCache:
    """The rings that this process has mapped, by channel record."""

    def __init__(self, memory: GuestMemory, recorder: Callable[[], Recorder | None]) -> None:
        self._memory = memory
        self._budget = MapBudget.of_system()
        self._rings: dict[int, ChannelRings] = {}
        self._recorder = recorder
        self.reader: Callable[[Channel], Reader] | None = None
        """What makes the consumer of a channel, where that is none of the usual ones."""
        self.writer: Callable[[Channel], Writer] | None = None
        """What makes the producer of a channel, where that is none of the usual ones."""

    def of(self, channel: Channel) -> ChannelRings:
        """The rings of an opened channel; maps them if this process has not yet (about 30 us).

        ProtocolViolation when the indices in them cannot be.
        """
        record: Record = channel
        rings, words = self._rings.get(record.index), record.words
        # The channel is alive if the rings are of this life of its record; whose name is stale has none.
        if (
            rings is None
            or rings.generation != words[_RING_GENERATION]
            or not rings.channel_generation == words[0] == record.generation
        ):
            rings = self._map_anew(channel)
        return rings

    def _map_anew(self, channel: Channel) -> ChannelRings:
        self.drop(channel)
        rings = self._rings[channel.index] = self._map(channel, (channel.generation, channel.ring_generation))
        return rings

    def drop(self, channel: Channel) -> None:
        """Forget a channel's rings in this process."""
        rings = self._rings.pop(channel.index, None)
        if rings is not None:
            rings.close()

    def init(self, channel: Channel) -> None:
        """`hv_ringbuffer_init` for outbound, then inbound: zero control pages, feature bit, indices 0.

        Straight into RAM: whoever opens a channel need not map its rings, which takes 150 us. ProtocolViolation
        for a ring that has no page for data, OutOfMemory when the tmpfs behind RAM is full.
        """
        gpa, listing, send, receive = ring_pages(channel)
        if send < 2 or receive < 2:
            raise ProtocolViolation(
                f"rings of {send} and {receive} pages", rule="ring-size", field="pages", value=min(send, receive)
            )
        pfns = self._pages(gpa, listing, send, receive)
        for first in (0, send):
            gpa = pfns[first] << PAGE_SHIFT
            self._memory.reserve(gpa, PAGE_SIZE)
            self._memory.write(gpa, FRESH_CONTROL_PAGE)

    def _map(self, channel: Channel, key: tuple[int, int]) -> ChannelRings:
        memories = self._map_memories(channel, reserved=True)
        try:
            recorder = self._recorder()
            words = [memory.words for memory in memories]
            if recorder is not None:
                words = [recorded(one, recorder, channel.relid, side) for side, one in enumerate(memories)]
            reader = None if self.reader is None else self.reader(channel)
            writer = None if self.writer is None else self.writer(channel)
            return ChannelRings(key, memories, words, reader, writer)
        except ProtocolViolation:
            for memory in memories:
                memory.close()
            raise

    def _map_memories(self, channel: Channel, *, reserved: bool) -> tuple[RingMemory, RingMemory]:
        """Both rings; `reserved`: their pages were made when they were initialised."""
        pfns = self.pfns(channel)
        send, receive = channel.ring_send_pages, channel.ring_recv_pages
        outbound = map_ring(self._memory, pfns, 0, send, self._budget, reserved=reserved)
        try:
            return outbound, map_ring(self._memory, pfns, send, receive, self._budget, reserved=reserved)
        except (ProtocolViolation, OutOfMemory):
            outbound.close()
            raise

    def pfns(self, channel: Channel) -> Sequence[int]:
        """Every page of both rings in order, send first."""
        return self._pages(*ring_pages(channel))

    def _pages(self, gpa: int, listing: int, send: int, receive: int) -> Sequence[int]:
        count = send + receive
        if listing:
            raw = self._memory.read(listing, 8 * count)
            return list(memoryview(raw).cast("Q"))
        first = gpa >> PAGE_SHIFT
        return range(first, first + count)

    def close(self) -> None:
        """Unmap everything."""
        while self._rings:
            self._rings.popitem()[1].close()
