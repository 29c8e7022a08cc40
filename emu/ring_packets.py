"""What depends on a packet's kind and size alone, worked out once: shapes to write, plans to read.

A ring packet costs two calls into C and one dict look-up each way, because everything else about it is in
these tables, keyed by the payload's length and by the packet's *descriptor word* (its first eight bytes:
type, offset8, len8, flags). A plan is also where a descriptor of the peer's is checked: once for each
distinct word, on the one copy of it that was fetched. The tables are bounded, since the peer chooses the
keys.
"""

from __future__ import annotations

from typing import Final

from emu.errors import ProtocolViolation, VmbusError
from emu.ring_memory import Pack, PackAlike, PackRun, RingMemory, Unpack, UnpackRun
from emu.wire.packets import DESCRIPTOR_SIZE, MAX_PACKET_SIZE, TRAILER_SIZE, check_descriptor, ring_bytes

_MOST_SHAPES: Final = 4096
# What a plan keeps for the runs of its packets may be 33 KB.
_MOST_PLANS: Final = 1024
# Packets alike are handled together up to so many bytes, and so many packets; a longer run is several.
RUN_BYTES: Final = 1 << 17
LONGEST_RUN: Final = 128
ALIKE: Final = 4
"""Packets in a row that are alike before a reader looks at several together."""
SHORTEST_READ: Final = 4
"""So many at least."""


def _three_digits(count: int) -> int:
    """The next number down that has no more than three binary digits before its zeros."""
    zeros = max(0, count.bit_length() - 3)
    return count >> zeros << zeros


ROUND_COUNTS: Final = tuple(map(_three_digits, range(LONGEST_RUN + 1)))
"""How many of so many packets alike are read together: round numbers, so that few of them have to be prepared."""

# Copying a long payload costs so much that once more (it is joined with others first) is not made up for.
LONGEST_JOINED: Final = 8192

Shape = tuple[Pack, bytes, int]
"""What stores the packet, its descriptor word, the bytes it takes in the ring."""

PackedRun = tuple[PackRun, PackAlike, int]
"""What stores packets alike; what looks first whether they are; the bytes that each takes in the ring."""

Kind = tuple[int, int, int]
"""Packet type, flags, bytes in the ring besides the payload: what packets handed out together have in common."""

Plan = tuple[Kind, int, Unpack, UnpackRun, int, int]
"""Its kind, bytes in the ring; what copies one out, what copies several alike,
and how many at most; the descriptor word."""


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

    __slots__ = ("_kind", "_memory", "header_length", "runs", "table")

    def __init__(self, memory: RingMemory, packet_type: int, flags: int, header_length: int = 0) -> None:
        assert header_length % 8 == 0, header_length
        self._memory = memory
        self._kind = packet_type | (DESCRIPTOR_SIZE + header_length) // 8 << 16 | flags << 48
        self.header_length = header_length
        self.table: dict[int, Shape] = {}
        self.runs: dict[int, PackedRun] = {}

    def run(self, length: int) -> PackedRun | None:
        """What stores several packets of `length` bytes at once; None where one by one is quicker."""
        run = self.runs.get(length)
        if run is None:
            if not 0 <= length <= LONGEST_JOINED:
                return None
            if len(self.runs) >= _MOST_SHAPES:
                self.runs.clear()
            _pack, word, size = self.table.get(length) or self.add(length)
            padding = size - DESCRIPTOR_SIZE - length - TRAILER_SIZE
            pack_run = self._memory.run_packer(length, padding, word)
            run = self.runs[length] = pack_run, self._memory.alike_packer(length, padding, word), size
        return run

    def add(self, length: int) -> Shape:
        """The shape for `length` bytes of payload, type-specific header included; or PacketTooLong."""
        size = ring_bytes(length)
        packet = size - TRAILER_SIZE
        if packet > MAX_PACKET_SIZE:
            raise PacketTooLong(size, MAX_PACKET_SIZE + TRAILER_SIZE)
        if len(self.table) >= _MOST_SHAPES:
            self.table.clear()
        pack = self._memory.packer(length, packet - DESCRIPTOR_SIZE - length)
        word = self._kind | packet // 8 << 32
        shape = self.table[length] = pack, word.to_bytes(8, "little"), size
        return shape


class Plans:
    """The plans of one ring, by descriptor word; `add` checks and fills `table`, a plain dict for speed.

    What a plan hands out as payload is a copy of the bytes, as here; other plans hand out something else.
    """

    __slots__ = ("_memory", "table")

    def __init__(self, memory: RingMemory) -> None:
        self._memory = memory
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
        # Whether so much has been published is no matter of the word: the reader looks, each time.
        check_descriptor(packet_type, offset8, len8, flags, packet + TRAILER_SIZE)
        start, size = 8 * offset8, packet + TRAILER_SIZE
        if len(self.table) >= _MOST_PLANS:
            self.table.clear()
        kind = packet_type, flags, start + TRAILER_SIZE
        unpack_run = self._memory.run_unpacker(start, packet - start, word)
        plan = kind, size, self._unpacker(start, packet - start), unpack_run, self._longest_run(size), word
        self.table[word] = plan
        return plan

    def _unpacker(self, start: int, length: int) -> Unpack:
        """What copies out a payload of `length` bytes from byte `start` of a packet on."""
        return self._memory.unpacker(start, length)

    def _longest_run(self, size: int) -> int:
        return min(LONGEST_RUN, -(-RUN_BYTES // size))


class PlansWithHeader(Plans):
    """The payload is copied out as (type-specific header, payload)."""

    __slots__ = ()

    def _unpacker(self, start: int, length: int) -> Unpack:
        header_length = start - DESCRIPTOR_SIZE
        whole = self._memory.unpacker(DESCRIPTOR_SIZE, header_length + length)

        def unpack(buffer: object, offset: int) -> tuple[int, tuple[bytes, bytes]]:
            trans_id, body = whole(buffer, offset)
            return trans_id, (body[:header_length], body[header_length:])

        return unpack

    def _longest_run(self, size: int) -> int:
        return 0


class PlansOfViews(Plans):
    """The payload is not copied: a memoryview of the ring's bytes."""

    __slots__ = ()

    def _unpacker(self, start: int, length: int) -> Unpack:
        return self._memory.viewer(start, length)

    def _longest_run(self, size: int) -> int:
        return 0


def beyond(size: int, published: int) -> ProtocolViolation:
    """Say that a packet's length, with its trailer, goes beyond write_index."""
    return ProtocolViolation(
        f"packet of {size} bytes with its trailer, {published} published",
        rule="packet-length",
        field="len8",
        value=(size - TRAILER_SIZE) // 8,
    )
