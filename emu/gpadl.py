"""A GPADL: guest memory that the guest described to the host, in ranges, each with its list of PFNs.

It says *which* bytes; `GuestMemory` says whether they exist. A ring inside a GPADL is mapped run by run where
the process can afford the mappings, and is accessed page by page where it cannot (`vm.max_map_count`).
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from emu.errors import ProtocolViolation
from emu.memory import PAGE_SHIFT, PAGE_SIZE, GuestMemory, coalesce
from emu.ring_memory import RingMemory
from emu.values import valueclass
from emu.wire.gpa_range import GpaRange


@valueclass()
class Gpadl:
    """The ranges of one GPADL handle, complete, each consistent in itself (`parse_gpa_ranges`)."""

    ranges: tuple[GpaRange, ...]

    @classmethod
    def of_pages(cls, pfns: Sequence[int]) -> Gpadl:
        """One range of these whole pages, as Linux always sends."""
        return cls((GpaRange(len(pfns) << PAGE_SHIFT, 0, tuple(pfns)),))

    @property
    def byte_count(self) -> int:
        """Bytes in all ranges."""
        return sum(one.byte_count for one in self.ranges)

    def runs(self) -> list[tuple[int, int]]:
        """The described bytes as (gpa, length), in order; pieces that follow each other in memory are one."""
        runs: list[tuple[int, int]] = []
        for one in self.ranges:
            first = one.pfns[0]
            if not runs and one.pfns == tuple(range(first, first + len(one.pfns))):
                runs.append(((first << PAGE_SHIFT) + one.byte_offset, one.byte_count))
                continue
            begin, left = one.byte_offset, one.byte_count
            for pfn in one.pfns:
                gpa, length = (pfn << PAGE_SHIFT) + begin, min(left, PAGE_SIZE - begin)
                if runs and sum(runs[-1]) == gpa:
                    runs[-1] = runs[-1][0], runs[-1][1] + length
                else:
                    runs.append((gpa, length))
                begin, left = 0, left - length
        return runs

    def check(self, memory: GuestMemory) -> None:
        """Refuse ranges that are not RAM: ProtocolViolation, rule `gpa-outside-ram`."""
        for gpa, length in self.runs():
            memory.check(gpa, length)

    def page_pfns(self) -> tuple[int, ...]:
        """The PFNs of a GPADL of whole pages; ProtocolViolation (`gpadl-not-pages`) when a range is cut."""
        for one in self.ranges:
            if one.byte_offset or one.byte_count % PAGE_SIZE:
                raise ProtocolViolation(
                    f"a ring in a range of {one.byte_count} bytes at byte {one.byte_offset} of its page",
                    rule="gpadl-not-pages",
                    field="byte_count",
                    value=one.byte_count,
                )
        if len(self.ranges) == 1:
            return tuple(self.ranges[0].pfns)
        return tuple(pfn for one in self.ranges for pfn in one.pfns)

    def map_ring(
        self, memory: GuestMemory, first_page: int, page_count: int, budget: MapBudget | None = None
    ) -> RingMemory:
        """The ring in these pages of the GPADL; see the function `map_ring`."""
        return map_ring(memory, self.page_pfns(), first_page, page_count, budget)


@lru_cache(maxsize=1)
def _max_map_count() -> int:
    """Read once, also for the processes that are forked from this one."""
    return int(Path("/proc/sys/vm/max_map_count").read_text(encoding="ascii"))


class MapBudget:
    """How many mapped runs this process may still hold for rings; beyond it they are accessed page by page."""

    def __init__(self, runs: int) -> None:
        self.left = runs

    @classmethod
    def of_system(cls) -> MapBudget:
        """Half of `vm.max_map_count`: the rest is for everything else that maps."""
        return cls(_max_map_count() // 2)

    def take(self, runs: int) -> bool:
        """Take so many if they are left."""
        if runs > self.left:
            return False
        self.left -= runs
        return True

    def give(self, runs: int) -> None:
        """Give back what `take` took."""
        self.left += runs


def map_ring(
    memory: GuestMemory,
    pfns: Sequence[int],
    first_page: int,
    page_count: int,
    budget: MapBudget | None = None,
    *,
    reserved: bool = False,
) -> RingMemory:
    """The ring in `page_count` of these pages from `first_page` on, control page first.

    It is mapped if `budget` and the system allow, else accessed page by page, as is RAM without an fd. The
    pages are checked and reserved first, so that no later touch of the ring can fail, unless the caller has done
    that (`reserved`). Raises
    ProtocolViolation (`ring-pages`, `ring-size`, `gpa-outside-ram`) and OutOfMemory; then nothing is held.
    """
    if not 0 <= first_page < first_page + page_count <= len(pfns):
        raise ProtocolViolation(
            f"a ring in pages {first_page} to {first_page + page_count} of a GPADL of {len(pfns)}",
            rule="ring-pages",
            field="downstream_ringbuffer_pageoffset",
            value=first_page,
        )
    gpas = [pfn << PAGE_SHIFT for pfn in pfns[first_page : first_page + page_count]]
    runs = coalesce(gpas)
    if not reserved:
        for gpa, length in runs:
            memory.reserve(gpa, length)
    if memory.fd is None:
        return RingMemory.of_pages(memory, gpas)
    mappings = 2 * len(runs)  # the data area is there twice
    if budget is None:
        budget = MapBudget(mappings)
    if not budget.take(mappings):
        return RingMemory.of_pages(memory, gpas)
    try:
        return RingMemory.map(memory.fd, runs, lambda: budget.give(mappings))
    except ProtocolViolation:
        budget.give(mappings)
        raise
    except OSError as error:
        budget.give(mappings)
        if error.errno != errno.ENOMEM:
            raise
        return RingMemory.of_pages(memory, gpas)
