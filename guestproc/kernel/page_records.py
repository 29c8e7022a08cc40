"""What the page allocator keeps and hands out: its own record in guest RAM, and a run of pages. See `pages`.

Apart from that module, as a compiled build cannot compile classes that make their own fields.
"""

from __future__ import annotations

from typing import Final

from emu.values import valueclass
from guestproc.kernel.locks import Rank, spinlock
from guestproc.kernel.records import Record, Word, Words64

PAGE_SHIFT: Final = 12
MAX_ORDER: Final = 18


class Zone(Record, permanent=True):
    """The allocator's own record: everything in it is covered by its lock."""

    lock = spinlock(Rank.PAGES)
    first = Word(4, "set at boot: the first page that may be handed out")
    end = Word(4, "set at boot: one behind the last page of RAM")
    high = Word(4, "lock: one behind the highest page ever handed out")
    last_generation = Word(4, "lock: generation of the last allocation")
    free_pages = Word(8, "lock")
    refusals = Word(8, "lock")
    heads = Words64(MAX_ORDER + 1, "lock: first free block of each order (page number, 0: none)")


@valueclass()
class PageRun:
    """Pages `pfn` to `pfn + count - 1`, as handed out once: the generation tells this time from the next."""

    pfn: int
    count: int
    generation: int

    @property
    def gpa(self) -> int:
        """Guest physical address of the first byte."""
        return self.pfn << PAGE_SHIFT

    @property
    def size(self) -> int:
        """Bytes."""
        return self.count << PAGE_SHIFT

    @property
    def pfns(self) -> range:
        """Every page number, in order."""
        return range(self.pfn, self.pfn + self.count)
