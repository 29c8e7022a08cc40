"""What depends on a packet's kind and size alone, worked out once: shapes to write, plans to read.

A ring packet costs two calls into C and one dict look-up each way, because everything else about it is in
these tables, keyed by the payload's length and by the packet's *descriptor word* (its first eight bytes:
type, offset8, len8, flags). A plan is also where a descriptor of the peer's is checked: once for each
distinct word, on the one copy of it that was fetched. The tables are bounded, since the peer chooses the
keys.
"""

from __future__ import annotations

from typing import Final

from emu.errors import VmbusError
from emu.ring_memory import Pack, RingMemory, Unpack, UnpackRun
from emu.wire.packets import DESCRIPTOR_SIZE, MAX_PACKET_SIZE, TRAILER_SIZE, check_descriptor, ring_bytes

_MOST_ENTRIES: Final = 4096
# Copying more than this for packets that then turn out to be different would cost more than it saves.
_RUN_BYTES: Final = 8192

Shape = tuple[Pack, int, int]
"""What stores the packet, its descriptor word, the bytes it takes in the ring."""

Plan = tuple[int, int, int, Unpack, UnpackRun, int]
"""Packet type, flags, bytes in the ring; what copies one out, what copies several alike, how many at most."""


class PacketTooLong(VmbusError):
    """No reader will ever make room for this: it is longer than the ring, or than a packet can be.

    `needed` is its size in the ring, `most` what an empty ring has free (or what len8 can say).
    """

    def __init__(self, needed: int, most: int) -> None:
        super().__init__(f"packet needs {needed} bytes of a ring that never has more than {most} free")
        self.needed = needed
        self.most = most


class Shapes:
    """The shapes of one kind of packet, by length of payload; `add` fills `table`, a plain dict for speed."""

    __slots__ = ("_kind", "_memory", "header_length", "table")

    def __init__(self, memory: RingMemory, packet_type: int, flags: int, header_length: int = 0) -> None:
        assert header_length % 8 == 0, header_length
        self._memory = memory
        self._kind = packet_type | (DESCRIPTOR_SIZE + header_length) // 8 << 16 | flags << 48
        self.header_length = header_length
        self.table: dict[int, Shape] = {}

    def add(self, length: int) -> Shape:
        """The shape for `length` bytes of payload, type-specific header included; or PacketTooLong."""
        size = ring_bytes(length)
        packet = size - TRAILER_SIZE
        if packet > MAX_PACKET_SIZE:
            raise PacketTooLong(size, MAX_PACKET_SIZE + TRAILER_SIZE)
        if len(self.table) >= _MOST_ENTRIES:
            self.table.clear()
        pack = self._memory.packer(length, packet - DESCRIPTOR_SIZE - length)
        shape = self.table[length] = pack, self._kind | packet // 8 << 32, size
        return shape


class Plans:
    """The plans of one ring, by descriptor word; `add` checks and fills `table`, a plain dict for speed.

    `with_header`: the payload is copied out as (type-specific header, payload).
    """

    __slots__ = ("_memory", "_with_header", "table")

    def __init__(self, memory: RingMemory, *, with_header: bool = False) -> None:
        self._memory = memory
        self._with_header = with_header
        self.table: dict[int, Plan] = {}

    def add(self, word: int) -> Plan:
        """Check a descriptor word and plan for it; ProtocolViolation as `check_descriptor` raises it."""
        packet_type, offset8, len8, flags = (
            word & 0xFFFF,
            word >> 16 & 0xFFFF,
            word >> 32 & 0xFFFF,
            word >> 48,
        )
        packet = 8 * len8
        # Whether so much has been published is no matter of the word: the drain looks, each time.
        check_descriptor(packet_type, offset8, len8, flags, packet + TRAILER_SIZE)
        start, size = 8 * offset8, packet + TRAILER_SIZE
        longest_run = _RUN_BYTES // size
        unpack_run = self._memory.run_unpacker(start, packet - start)
        if self._with_header:
            whole = self._memory.unpacker(DESCRIPTOR_SIZE, packet - DESCRIPTOR_SIZE)
            unpack, longest_run = _splitting(whole, start - DESCRIPTOR_SIZE), 0
        else:
            unpack = self._memory.unpacker(start, packet - start)
        if len(self.table) >= _MOST_ENTRIES:
            self.table.clear()
        plan = self.table[word] = packet_type, flags, size, unpack, unpack_run, longest_run
        return plan


def _splitting(whole: Unpack, header_length: int) -> Unpack:
    """An unpack that hands out (type-specific header, payload), from one copy of both."""

    def unpack(buffer: object, offset: int) -> tuple[int, tuple[bytes, bytes]]:
        trans_id, body = whole(buffer, offset)
        return trans_id, (body[:header_length], body[header_length:])

    return unpack
