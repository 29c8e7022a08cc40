"""The page allocator: a binary buddy system over every page of guest RAM behind the kernel's tables.

A block of 2^order pages starts at a multiple of its size; a freed block joins its buddy as long as that one
is free too. A page knows its owner and the *generation* of the allocation that handed it out, so a page run
given back twice, or used after it, is noticed. Guest RAM starts as zeros: a page that was never handed out
needs no clearing (and its memory is not touched, so it costs nothing), one that was is cleared when asked
for zeroed.

Kept as columns, a u32 or u8 a page, not as records: there are 262,144 pages in a gigabyte. The free lists'
lock covers all columns but `used`, which belongs to the page's owner. Their memory is reserved by *granules* of 1,024
pages (4 MiB of RAM, 22 KiB of columns), before anything is written there: all 5.5 MiB of a gigabyte at boot would be
twice what the rest of a machine takes. So a granule without memory has no free block's first page and no owner.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from struct import Struct
from typing import Final

from emu.errors import OutOfMemory
from guestproc.kernel.actors import Actor
from guestproc.kernel.page_records import MAX_ORDER, PAGE_SHIFT, PageRun, Zone
from guestproc.kernel.records import Ram

PAGE_SIZE: Final = 4096
ZERO_PAGE: Final = bytes(PAGE_SIZE)
POISON_PAGE: Final = bytes([0x6B]) * PAGE_SIZE
COLUMN_BYTES: Final = (4, 4, 4, 4, 4, 1, 1)
GRANULE_SHIFT: Final = 10
GRANULE: Final = 1 << GRANULE_SHIFT
_U32: Final = Struct("<I")


class PageOwner(IntEnum):
    """What pages are for; `owned_by` adds which one: of RING the channel's record, of DRIVER the device's."""

    KERNEL = 1
    SYNIC = 2
    HYPERCALL = 3
    CONNECTION = 4
    RING = 5
    REQUESTOR = 6
    DRIVER = 7
    TASK = 8


def owned_by(owner: PageOwner, index: int = 0) -> int:
    """The owner word of the `index`-th object of a kind (a channel's ring: its record's index)."""
    assert 0 <= index < 1 << 24
    return index << 8 | owner


Ledger = Callable[[str, PageRun, int], None]
"""Told of every "alloc" and "free", with the run and its owner word (for traces and the page ledger)."""


class PageAllocator:
    """Logic over the zone record and the columns at `gpa`, for the pages of RAM.

    A free block's first page holds its order + 1 in `order` and its neighbours on the free list in `next` and
    `previous` (page numbers; 0 ends the list, since page 0 is never handed out). The first page of a run that
    is handed out holds the number of its pages in `count`.
    """

    def __init__(self, ram: Ram, zone: Zone, gpa: int, *, poison_freed: bool = False) -> None:
        pages = ram.size >> PAGE_SHIFT
        self._ram: Final = ram
        self._zone: Final = zone
        self._lock: Final = zone.lock
        self._heads: Final = zone.heads
        self._poison_freed: Final = poison_freed
        self.ledger: Ledger | None = None
        self._pages: Final = pages
        self._columns: Final[list[tuple[int, int]]] = []
        """Where each column lies, and its width."""
        # What this process has reserved; another one may have, too, and then there is nothing left to do.
        self._reserved: Final = bytearray((pages >> GRANULE_SHIFT) + 1)
        columns = []
        for width in COLUMN_BYTES:
            self._columns.append((gpa, width))
            columns.append(ram.octets[gpa : gpa + width * pages])
            gpa += -(-width * pages // 64) * 64
        self._owner_bytes: Final = columns[0]
        self._generation_bytes: Final = columns[1]
        self._owner: Final = columns[0].cast("I")
        self._generation: Final = columns[1].cast("I")
        self._next: Final = columns[2].cast("I")
        self._previous: Final = columns[3].cast("I")
        self._count: Final = columns[4].cast("I")
        self._order: Final = columns[5]
        self._used: Final = columns[6]

    @staticmethod
    def footprint(pages: int) -> int:
        """Bytes of the columns for `pages` pages of RAM."""
        return sum(-(-width * pages // 64) * 64 for width in COLUMN_BYTES)

    def format(self, first: int, end: int) -> None:
        """At boot, before anybody else looks: pages `first` to `end` - 1 are free. OutOfMemory: the tmpfs is full."""
        assert 0 < first <= end
        for pfn, _order in _blocks(first, end - first):
            self._reserve(pfn)
        self._zone.first = first
        self._zone.end = end
        self._zone.free_pages = end - first
        self._give(first, end - first)

    @property
    def free_pages(self) -> int:
        """Pages that are free now."""
        return self._zone.free_pages

    @property
    def pages_in_use(self) -> int:
        """Pages that are handed out now."""
        return self._zone.end - self._zone.first - self._zone.free_pages

    def alloc_pages(self, actor: Actor, order: int, owner: int, *, zeroed: bool = True) -> PageRun:
        """2^order contiguous pages, aligned to their size; raises OutOfMemory."""
        return self.alloc_pages_exact(actor, 1 << order, owner, zeroed=zeroed)

    def alloc_pages_exact(self, actor: Actor, count: int, owner: int, *, zeroed: bool = True) -> PageRun:
        """`count` contiguous pages, aligned as the next power of two would be; raises OutOfMemory."""
        assert count > 0 and owner, f"{count} pages for owner {owner}"
        with self._lock.hold(actor):
            order = (count - 1).bit_length()
            pfn = self._take(order)
            if pfn:
                run = self._hand_out(pfn, count, owner)
                if count < 1 << order:
                    self._give(pfn + count, (1 << order) - count)
            else:
                self._zone.refusals += 1
        if not pfn:
            raise OutOfMemory(f"no {count} contiguous pages of guest RAM for {owner_text(owner)}, {self._state()}")
        self._prepare(actor, [run], owner, zeroed)
        return run

    def alloc_scattered(self, actor: Actor, count: int, owner: int, seed: int, *, zeroed: bool = True) -> list[PageRun]:
        """`count` single pages of which no two are neighbours in RAM; raises OutOfMemory.

        For tests of what must not depend on contiguity: every other page of a block, shuffled by `seed`.
        """
        order = (2 * count - 1).bit_length()
        with self._lock.hold(actor):
            pfn = self._take(order)
            runs = [self._hand_out(pfn + 2 * i, 1, owner) for i in range(count)] if pfn else []
            for run in runs:
                self._give(run.pfn + 1, 1)
            if pfn:
                self._give(pfn + 2 * count, (1 << order) - 2 * count)
            else:
                self._zone.refusals += 1
        if not runs:
            raise OutOfMemory(f"no {count} scattered pages of guest RAM for {owner_text(owner)}, {self._state()}")
        self._prepare(actor, runs, owner, zeroed)
        random.Random(seed).shuffle(runs)
        return runs

    def free(self, actor: Actor, run: PageRun) -> None:
        """Give a run back; a second time, or with a stale generation, is an assertion."""
        owner = self._owner[run.pfn]
        self.assert_live(run)
        if self._poison_freed:
            for pfn in run.pfns:
                self._ram.octets[pfn << PAGE_SHIFT : (pfn + 1) << PAGE_SHIFT] = POISON_PAGE
        self._give_back(actor, run)
        if self.ledger is not None:
            self.ledger("free", run, owner)

    def _give_back(self, actor: Actor, run: PageRun) -> None:
        """The run's pages are free again."""
        with self._lock.hold(actor):
            self.assert_live(run)
            start, end = 4 * run.pfn, 4 * (run.pfn + run.count)
            self._owner_bytes[start:end] = bytes(4 * run.count)
            self._count[run.pfn] = 0
            self._zone.free_pages += run.count
            self._give(run.pfn, run.count)

    def assert_live(self, run: PageRun) -> None:
        """The run is still the one that was handed out."""
        pfn = run.pfn
        assert self._owner[pfn] and self._generation[pfn] == run.generation and self._count[pfn] == run.count, (
            f"pages[{pfn}]: stale, {run.count} pages of generation {run.generation} were used but "
            f"{self._count[pfn]} of generation {self._generation[pfn]} are there: "
            f"{owner_text(self._owner[pfn])}"
        )

    def is_live(self, pfn: int, generation: int) -> bool:
        """Whether a page belongs to the allocation of this generation still."""
        return bool(self._owner[pfn]) and self._generation[pfn] == generation

    def owner_of(self, pfn: int) -> int:
        """Owner word of one page, 0 if it is free; of any page, as the number may be the host's."""
        owner: int = self._owner[pfn] if self._has_memory(pfn) else 0
        return owner

    def run_at(self, pfn: int) -> PageRun:
        """The run whose first page is `pfn` (for a record that keeps only the address)."""
        count, generation = self._count[pfn], self._generation[pfn]
        assert count, f"pages[{pfn}]: no run starts here"
        return PageRun(pfn, count, generation)

    def in_use_by_owner(self) -> dict[str, int]:
        """Pages in use, by what they are for: the leak report. Empty when everything was given back."""
        found: dict[str, int] = {}
        first, high = self._zone.first, self._zone.high
        for start in range(first & -GRANULE, high, GRANULE):
            if not self._has_memory(start):
                continue
            for owner in self._owner[max(first, start) : min(high, start + GRANULE)].tolist():
                if owner:
                    name = owner_text(owner)
                    found[name] = found.get(name, 0) + 1
        return found

    def _state(self) -> str:
        return f"{self._zone.free_pages} of {self._zone.end - self._zone.first} pages are free"

    def _hand_out(self, pfn: int, count: int, owner: int) -> PageRun:
        """Under the lock: write down that these pages are taken."""
        zone = self._zone
        generation = zone.last_generation + 1 & 0xFFFFFFFF
        zone.last_generation = generation
        zone.free_pages -= count
        if zone.high < pfn + count:
            zone.high = pfn + count
        start, end = 4 * pfn, 4 * (pfn + count)
        self._owner_bytes[start:end] = _U32.pack(owner) * count
        self._generation_bytes[start:end] = _U32.pack(generation) * count
        self._count[pfn] = count
        return PageRun(pfn, count, generation)

    def _prepare(self, actor: Actor, runs: Sequence[PageRun], owner: int, zeroed: bool) -> None:
        """Without the lock, the pages are ours: clear those that somebody had before.

        Who had a page need not have touched it, so there may be no memory behind it: then all go back, and
        OutOfMemory is raised.
        """
        if zeroed:
            try:
                for run in runs:
                    self._clear(run)
            except OutOfMemory:
                for run in runs:
                    self._give_back(actor, run)
                raise
        for run in runs:
            self._used[run.pfn : run.pfn + run.count] = b"\1" * run.count
            if self.ledger is not None:
                self.ledger("alloc", run, owner)

    def _clear(self, run: PageRun) -> None:
        """Zero what was used before."""
        used = bytes(self._used[run.pfn : run.pfn + run.count])
        position = used.find(1)
        while position >= 0:
            gpa = run.pfn + position << PAGE_SHIFT
            self._ram.reserve(gpa, PAGE_SIZE)
            self._ram.octets[gpa : gpa + PAGE_SIZE] = ZERO_PAGE
            position = used.find(1, position + 1)

    def _take(self, order: int) -> int:
        """Under the lock: a block of this order off the free lists, split if need be; 0: there is none.

        OutOfMemory where there is no memory for what is to be written down; then nothing was.
        """
        heads = self._heads
        for have in range(order, MAX_ORDER + 1):
            if heads[have]:
                break
        else:
            return 0
        pfn: int = heads[have]
        self._reserve(pfn, 1 << order)
        for half in range(order, have):
            self._reserve(pfn + (1 << half))
        self._unlink(pfn, have)
        while have > order:
            have -= 1
            self._link(pfn + (1 << have), have)
        return pfn

    def _give(self, pfn: int, count: int) -> None:
        """Under the lock: free `count` pages as the largest aligned blocks that they make."""
        for first, order in _blocks(pfn, count):
            self._give_block(first, order)

    def _give_block(self, pfn: int, order: int) -> None:
        end = self._zone.end
        while order < MAX_ORDER:
            buddy = pfn ^ 1 << order
            if buddy >= end or not self._has_memory(buddy) or self._order[buddy] != order + 1:
                break
            self._unlink(buddy, order)
            pfn &= ~(1 << order)
            order += 1
        self._link(pfn, order)

    def _reserve(self, pfn: int, count: int = 1) -> None:
        """Make sure that the columns of `count` pages have memory; OutOfMemory."""
        for granule in range(pfn >> GRANULE_SHIFT, (pfn + count - 1 >> GRANULE_SHIFT) + 1):
            if not self._reserved[granule]:
                first = granule << GRANULE_SHIFT
                for gpa, width in self._columns:
                    self._ram.reserve(gpa + width * first, width * min(GRANULE, self._pages - first))
                self._reserved[granule] = 1

    def _has_memory(self, pfn: int) -> bool:
        """Whether the columns of a page have memory; where they can have none, nobody ever wrote."""
        try:
            self._reserve(pfn)
        except OutOfMemory:
            return False
        return True

    def _link(self, pfn: int, order: int) -> None:
        following: int = self._heads[order]
        self._next[pfn] = following
        self._previous[pfn] = 0
        if following:
            self._previous[following] = pfn
        self._heads[order] = pfn
        self._order[pfn] = order + 1

    def _unlink(self, pfn: int, order: int) -> None:
        following, previous = self._next[pfn], self._previous[pfn]
        if following:
            self._previous[following] = previous
        if previous:
            self._next[previous] = following
        else:
            self._heads[order] = following
        self._order[pfn] = 0


def _blocks(pfn: int, count: int) -> Iterator[tuple[int, int]]:
    """The largest aligned blocks that `count` pages make: first page and order of each."""
    while count:
        order = min((pfn & -pfn).bit_length(), count.bit_length(), MAX_ORDER + 1) - 1
        yield pfn, order
        pfn += 1 << order
        count -= 1 << order


def owner_text(owner: int) -> str:
    """An owner word for people: "RING[12]"."""
    if not owner:
        return "free"
    kind = owner & 0xFF
    name = PageOwner(kind).name if kind in PageOwner._value2member_map_ else f"owner {kind}"
    return f"{name}[{owner >> 8}]"
