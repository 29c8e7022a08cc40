"""The rings of a channel that is open and has not been used yet: their control pages only, seen in RAM.

Mapping two rings costs 150 us, most of a channel's opening, and many channels stay idle for long: so they are
mapped at the first packet. Until then attaching, waiting and looking use the words in guest RAM itself.
"""

from __future__ import annotations

from collections.abc import Callable

from emu.errors import ProtocolViolation
from emu.gpadl import MapBudget, map_ring
from emu.memory import PAGE_SHIFT, PAGE_SIZE, GuestMemory
from emu.ring import RingConsumer, RingProducer
from emu.ring_memory import RingMemory, RingWords
from emu.wire.ring_layout import (
    FEAT_PENDING_SEND_SZ,
    FEATURE_BITS,
    INTERRUPT_MASK,
    PENDING_SEND_SZ,
    READ_INDEX,
    WRITE_INDEX,
)

Instrument = Callable[[str, RingMemory], RingWords]
"""Gives the words of a ring ("incoming" or "outgoing", its memory) that record what they do."""


class UnmappedRings:
    """Both rings of a channel by their pages, all of them checked and reserved.

    `split` is the page at which the host-to-guest ring begins. Raises ProtocolViolation (`ring-index`) when
    the guest left an index that cannot be in one of the control pages.
    """

    __slots__ = ("_budget", "_incoming", "_instrument", "_memory", "_outgoing", "_pfns", "_split")

    def __init__(
        self,
        memory: GuestMemory,
        pfns: tuple[int, ...],
        split: int,
        budget: MapBudget | None,
        instrument: Instrument | None = None,
    ) -> None:
        self._memory = memory
        self._pfns = pfns
        self._split = split
        self._budget = budget
        self._instrument = instrument
        self._incoming = pfns[0] << PAGE_SHIFT
        self._outgoing = pfns[split] << PAGE_SHIFT
        for gpa, size in ((self._incoming, self.incoming_bytes), (self._outgoing, self.outgoing_bytes)):
            for offset, field in ((WRITE_INDEX, "write_index"), (READ_INDEX, "read_index")):
                index = memory.atomics.load_u32(gpa + offset)
                if index >= size or index & 7:
                    text = f"{field} {index:#x} in a ring of {size:#x} bytes"
                    raise ProtocolViolation(text, rule="ring-index", field=field, value=index)

    @property
    def incoming_bytes(self) -> int:
        """Bytes of data in the guest-to-host ring."""
        return (self._split - 1) * PAGE_SIZE

    @property
    def outgoing_bytes(self) -> int:
        """Bytes of data in the host-to-guest ring."""
        return (len(self._pfns) - self._split - 1) * PAGE_SIZE

    def words(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """write_index, read_index and interrupt_mask as they are now: of the guest's ring, of the host's."""
        load = self._memory.atomics.load_u32
        incoming, outgoing = self._incoming, self._outgoing
        return (
            (load(incoming + WRITE_INDEX), load(incoming + READ_INDEX), load(incoming + INTERRUPT_MASK)),
            (load(outgoing + WRITE_INDEX), load(outgoing + READ_INDEX), load(outgoing + INTERRUPT_MASK)),
        )

    def attach(self) -> None:
        """Mask the guest's ring, promise to honour pending_send_sz in ours (reference 4.1)."""
        words = self._memory.atomics
        words.store_u32(self._incoming + INTERRUPT_MASK, 1)
        words.store_u32(self._outgoing + FEATURE_BITS, FEAT_PENDING_SEND_SZ)
        words.store_u32(self._outgoing + PENDING_SEND_SZ, 0)

    def empty(self) -> bool:
        """Whether the guest has written nothing yet."""
        words = self._memory.atomics
        return words.load_u32(self._incoming + WRITE_INDEX) == words.load_u32(self._incoming + READ_INDEX)

    def unmask(self) -> bool:
        """Ask for interrupts, then look again; True when something is there and none will come for it."""
        # A full barrier before the index is loaded: the guest writes its index, then looks at the mask.
        self._memory.atomics.store_u32(self._incoming + INTERRUPT_MASK, 0)
        return not self.empty()

    def mask(self) -> None:
        """No interrupts while the device looks anyway."""
        self._memory.atomics.store_u32(self._incoming + INTERRUPT_MASK, 1)

    def map(self) -> tuple[RingConsumer, RingProducer]:
        """Map both rings; what attaching did stays done. Raises ProtocolViolation for an index that cannot be."""
        incoming = map_ring(self._memory, self._pfns, 0, self._split, self._budget, reserved=True)
        count = len(self._pfns) - self._split
        outgoing = map_ring(self._memory, self._pfns, self._split, count, self._budget, reserved=True)
        instrument = self._instrument
        try:
            return (
                RingConsumer(incoming, words=instrument and instrument("incoming", incoming)),
                RingProducer(outgoing, words=instrument and instrument("outgoing", outgoing)),
            )
        except ProtocolViolation:
            incoming.close()
            outgoing.close()
            raise
