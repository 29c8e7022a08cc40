"""GPA ranges: so many bytes at an offset into a list of pages (`gpa_range` and the PFNs behind it).

GPADLs and GPA-direct packets carry the same thing: [byte_count u32, byte_offset u32, PFN u64 ...], one
after the other. A range has just as many PFNs as its bytes touch. The bytes are the guest's, so each
range is checked.
"""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct, unpack_from
from typing import Final

from emu.errors import ProtocolViolation
from emu.values import valueclass

GPA_RANGE: Final = Struct("<II")
"""`gpa_range` without its PFNs: byte_count, byte_offset."""

PAGE_SIZE: Final = 4096


@valueclass()
class GpaRange:
    """`byte_count` bytes, the first of them `byte_offset` bytes into the page `pfns[0]`."""

    byte_count: int
    byte_offset: int
    pfns: tuple[int, ...]

    def pack(self) -> bytes:
        """Write the 8 bytes of the range and its PFNs."""
        return GPA_RANGE.pack(self.byte_count, self.byte_offset) + Struct(f"<{len(self.pfns)}Q").pack(*self.pfns)


def pfn_count(byte_count: int, byte_offset: int) -> int:
    """How many pages so many bytes at that offset touch."""
    return (byte_offset + byte_count + PAGE_SIZE - 1) >> 12


def pack_gpa_ranges(ranges: Iterable[GpaRange]) -> bytes:
    """Write ranges one after the other."""
    return b"".join([one.pack() for one in ranges])


def parse_gpa_ranges(data: bytes, count: int, start: int = 0) -> tuple[tuple[GpaRange, ...], int]:
    """Read `count` ranges at `start`; returns them and the offset behind the last.

    Raises ProtocolViolation with the rule `gpa-range-truncated`, `gpa-range-empty` or `gpa-range-offset`.
    """
    ranges = []
    at = start
    for index in range(count):
        if at + GPA_RANGE.size > len(data):
            raise ProtocolViolation(
                f"range {index} of {count} begins at byte {at} of {len(data)}",
                rule="gpa-range-truncated",
                field="range_cnt",
                value=count,
            )
        byte_count, byte_offset = GPA_RANGE.unpack_from(data, at)
        at += GPA_RANGE.size
        if byte_count == 0:
            raise ProtocolViolation(f"range {index} has no bytes", rule="gpa-range-empty", field="byte_count", value=0)
        if byte_offset >= PAGE_SIZE:
            raise ProtocolViolation(
                f"range {index} begins at byte {byte_offset} of its first page",
                rule="gpa-range-offset",
                field="byte_offset",
                value=byte_offset,
            )
        pfns = pfn_count(byte_count, byte_offset)
        if at + 8 * pfns > len(data):
            raise ProtocolViolation(
                f"range {index} has {pfns} pages, and room for {(len(data) - at) // 8}",
                rule="gpa-range-truncated",
                field="byte_count",
                value=byte_count,
            )
        ranges.append(GpaRange(byte_count, byte_offset, unpack_from(f"<{pfns}Q", data, at)))
        at += 8 * pfns
    return tuple(ranges), at
