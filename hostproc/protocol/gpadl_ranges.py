"""A GPADL while its messages come in: u64 words, until as many are there as its header announced.

The unit is the u64: half a word at the end of a message is nothing, and what comes behind the last word is
padding (firmware posts 240 bytes whatever it has to say). What a guest says of its ranges is judged once they
are whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from emu.errors import ProtocolViolation
from emu.host_tables import PageRuns
from emu.wire.gpa_range import PAGE_SIZE, GpaRange, parse_gpa_ranges
from hostproc.protocol.states import GpadlState

WORD: Final = 8


@dataclass(slots=True, eq=False)
class GpadlRecord:
    """The server's record of one GPADL.

    `words` and `range_count` are what the header announced. Of the ranges only this is kept: `ring_pages`, the number
    of pages if it is one range of whole pages, else 0 (OPENCHANNEL asks about it); and `page_runs`, which pages they
    are, for whoever looks. `answer`: the guest waits for TORNDOWN.
    """

    handle: int
    words: int
    range_count: int
    state: GpadlState = GpadlState.IN_PROGRESS
    data: bytearray = field(default_factory=bytearray)
    ring_pages: int = 0
    page_runs: PageRuns = ()
    answer: bool = False

    @property
    def most_pages(self) -> int:
        """How many pages its words can name."""
        return self.words - self.range_count

    def append(self, data: bytes) -> bool:
        """Take the next whole words of the announced ones; return whether all are there."""
        missing = self.words * WORD - len(self.data)
        self.data += data[: min(missing, len(data) & -WORD)]
        return len(self.data) == self.words * WORD

    def take_ranges(self, ram_pages: int) -> tuple[GpaRange, ...]:
        """Read the ranges of a whole GPADL and forget the words.

        ProtocolViolation: `gpadl-words-left`, `gpadl-page-outside-ram`, and those of `parse_gpa_ranges`.
        """
        data, self.data = bytes(self.data), bytearray()
        ranges, end = parse_gpa_ranges(data, self.range_count)
        if end != len(data):
            left = (len(data) - end) // WORD
            raise _fault("gpadl-words-left", "range_buflen", left, f"{left} words behind the last range")
        highest = max(max(one.pfns) for one in ranges)
        if highest >= ram_pages:
            raise _fault(
                "gpadl-page-outside-ram", "pfn_array", highest, f"page {highest:#x}, and RAM has {ram_pages:#x}"
            )
        first = ranges[0]
        whole = len(ranges) == 1 and first.byte_offset == 0 and first.byte_count % PAGE_SIZE == 0
        self.ring_pages = len(first.pfns) if whole else 0
        self.page_runs = _runs(ranges)
        return ranges


def _runs(ranges: tuple[GpaRange, ...]) -> PageRuns:
    """The pages in their order, neighbours as one; an honest guest's are mostly all neighbours."""
    runs: list[tuple[int, int]] = []
    for one in ranges:
        first, count = one.pfns[0], len(one.pfns)
        if one.pfns == tuple(range(first, first + count)):
            runs.append((first, count))
            continue
        count = 0
        for pfn in one.pfns:
            if pfn != first + count:
                runs.append((first, count))
                first, count = pfn, 0
            count += 1
        runs.append((first, count))
    return tuple(runs)


def _fault(rule: str, field_name: str, value: int, text: str) -> ProtocolViolation:
    return ProtocolViolation(f"GPADL: {text}", rule=rule, field=field_name, value=value)
