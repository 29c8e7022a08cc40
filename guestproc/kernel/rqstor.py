"""Request ids of a channel, the kernel's `vmbus_requestor`: a number for the host instead of an address.

`size` u64 slots, a bit for each, and the head of a free list that runs through the slots, so ids come back
last in, first out. What the host sends back is checked before use: id 0, an id beyond the array and an id
that is not out give VMBUS_RQST_ERROR.

    +0 lock u32   +4 size u32   +8 next_request_id u64   +16 slots u64[size]   then the bitmap, u64[]
"""

from __future__ import annotations

from typing import Final

from guestproc.kernel.actors import Actor
from guestproc.kernel.locks import Rank, Spinlock
from guestproc.kernel.records import Ram

VMBUS_NO_RQSTOR: Final = (1 << 64) - 1
VMBUS_RQST_ADDR_ANY: Final = (1 << 64) - 1
VMBUS_RQST_ERROR: Final = (1 << 64) - 2
VMBUS_RQST_ID_NO_RESPONSE: Final = (1 << 64) - 3
VMBUS_RQST_INIT: Final = (1 << 64) - 3
VMBUS_RQST_RESET: Final = (1 << 64) - 4

_LAST: Final = (1 << 64) - 1
_HEADER: Final = 16


class Requestor:
    """The ids of one channel, in guest RAM at `gpa`; everything behind the lock word is covered by it."""

    def __init__(self, ram: Ram, gpa: int, size: int, name: str = "requestor") -> None:
        assert size > 0 and gpa % 8 == 0
        self.name: Final = name
        self.size: Final = size
        self._lock: Final = Spinlock(ram, gpa, f"{name}.req_lock", Rank.REQUESTOR)
        self._size: Final = ram.words32(gpa + 4, 1)
        self._next: Final = ram.words64(gpa + 8, 1)
        self._slots: Final = ram.words64(gpa + _HEADER, size)
        self._bitmap: Final = ram.words64(gpa + _HEADER + 8 * size, _bitmap_words(size))

    @staticmethod
    def footprint(size: int) -> int:
        """Bytes that a requestor of `size` ids takes."""
        return _HEADER + 8 * size + 8 * _bitmap_words(size)

    def init(self) -> None:
        """`vmbus_alloc_requestor`, on zeroed memory: slot i is followed by i + 1, the last one by none."""
        for slot in range(self.size - 1):
            self._slots[slot] = slot + 1
        self._slots[self.size - 1] = _LAST
        self._next[0] = 0
        self._size[0] = self.size

    def next_request_id(self, actor: Actor, address: int) -> int:
        """`vmbus_next_request_id`: an id (from 1) for `address`, VMBUS_RQST_ERROR when all are out."""
        with self._lock.hold(actor):
            slot: int = self._next[0]
            if slot >= self.size:
                return VMBUS_RQST_ERROR
            self._next[0] = self._slots[slot]
            self._slots[slot] = address
            self._bitmap[slot >> 6] |= 1 << (slot & 63)
            return slot + 1

    def request_addr(self, actor: Actor, trans_id: int) -> int:
        """`vmbus_request_addr`: take the id back and return its address."""
        return self.request_addr_match(actor, trans_id, VMBUS_RQST_ADDR_ANY)

    def request_addr_match(self, actor: Actor, trans_id: int, address: int) -> int:
        """`vmbus_request_addr_match`: the id's address; taken back only if that is `address` (or ANY).

        VMBUS_RQST_ERROR for an id that is not out.
        """
        slot = trans_id - 1
        if not 0 <= slot < self.size:
            return VMBUS_RQST_ERROR
        with self._lock.hold(actor):
            word, bit = slot >> 6, 1 << (slot & 63)
            if not self._bitmap[word] & bit:
                return VMBUS_RQST_ERROR
            found: int = self._slots[slot]
            if address in (VMBUS_RQST_ADDR_ANY, found):
                self._slots[slot] = self._next[0]
                self._next[0] = slot
                self._bitmap[word] &= ~bit
            return found

    def out(self) -> dict[int, int]:
        """Every id that is out, and its address (for reports: without the lock, so it may just have come back)."""
        words = enumerate(self._bitmap.tolist())
        slots = [64 * number + bit for number, word in words if word for bit in range(64) if word >> bit & 1]
        return {slot + 1: self._slots[slot] for slot in slots if slot < self.size}

    def free_ids(self) -> int:
        """How many ids the free list leads through; -1 for a list that leads out of the slots, or in a circle."""
        slot: int = self._next[0]
        for count in range(self.size + 1):
            if slot == _LAST:
                return count
            if slot >= self.size:
                break
            slot = self._slots[slot]
        return -1

    def outstanding(self) -> int:
        """How many ids are out (a hint without the lock)."""
        return sum(word.bit_count() for word in self._bitmap.tolist())


def _bitmap_words(size: int) -> int:
    return -(-size // 64)
