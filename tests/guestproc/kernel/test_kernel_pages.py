"""The page allocator: nothing is handed out twice, nothing is lost, and what is zeroed is zero."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
from collections.abc import Callable
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu.errors import OutOfMemory
from guestproc.kernel.actors import Actor
from guestproc.kernel.page_records import PageRun, Zone
from guestproc.kernel.pages import PAGE_SIZE, PageAllocator, PageOwner, owned_by, owner_text
from guestproc.kernel.records import Ram, Table
from guestproc.kernel.waiters import Waiter
from tests.guestproc.kernel.fakes import WAITERS_GPA, Crowd, Lone

ZONE_GPA = 0x8000
COLUMNS_GPA = 0x9000
FIRST = 16
RING = owned_by(PageOwner.RING, 12)


def allocator(ram: Ram, *, poison_freed: bool = False) -> PageAllocator:
    """Another process's view of the pages of `ram`."""
    zones = Table(ram, "zones", Zone, ZONE_GPA, 1)
    return PageAllocator(ram, zones.at(0), COLUMNS_GPA, poison_freed=poison_freed)


def formatted(ram: Ram, end: int | None = None, *, poison_freed: bool = False) -> PageAllocator:
    """All of RAM from page 16 on is free."""
    assert Table(ram, "zones", Zone, ZONE_GPA, 1).alloc() is not None
    pages = allocator(ram, poison_freed=poison_freed)
    pages.format(FIRST, ram.size // PAGE_SIZE if end is None else end)
    return pages


class World:
    """`pages` pages of RAM behind the first 16, which hold the columns."""

    def __init__(self, pages: int = 112, *, poison_freed: bool = False) -> None:
        self.lone = Lone((FIRST + pages) * PAGE_SIZE)
        self.actor = self.lone.actor
        self.pages = formatted(self.lone.ram, poison_freed=poison_freed)

    def alloc(self, count: int, owner: int = RING, *, zeroed: bool = True) -> PageRun:
        return self.pages.alloc_pages_exact(self.actor, count, owner, zeroed=zeroed)


@pytest.mark.parametrize("order", range(6))
def test_a_block_is_aligned_to_its_size(order: int) -> None:
    """2^order pages start at a multiple of 2^order."""
    world = World()
    run = world.pages.alloc_pages(world.actor, order, RING)

    assert run.count == 1 << order
    assert run.pfn % run.count == 0
    assert (run.gpa, run.size) == (run.pfn * PAGE_SIZE, PAGE_SIZE << order)


def test_an_exact_allocation_gives_the_rest_back() -> None:
    """33 pages take 33, not 64."""
    world = World()
    before = world.pages.free_pages

    run = world.alloc(33)

    assert world.pages.free_pages == before - 33
    assert world.pages.in_use_by_owner() == {"RING[12]": 33}
    world.pages.free(world.actor, run)
    assert (world.pages.free_pages, world.pages.in_use_by_owner()) == (before, {})


def test_freed_pages_join_their_buddies() -> None:
    """When everything is free again the largest block can be had again."""
    world = World()
    runs = [world.alloc(1) for _ in range(112)]
    with pytest.raises(OutOfMemory):
        world.alloc(1)
    random.Random(7).shuffle(runs)

    for run in runs:
        world.pages.free(world.actor, run)

    assert world.alloc(64).count == 64
    assert world.alloc(32).count == 32


def test_out_of_memory_says_what_was_asked_and_what_is_left() -> None:
    """The refusal is nobody's fault: an exception with the numbers, and everything as before."""
    world = World()
    world.alloc(64)

    with pytest.raises(
        OutOfMemory, match=r"no 64 contiguous pages of guest RAM for RING\[12\], 48 of 112 pages are free"
    ):
        world.alloc(64)
    assert world.pages.free_pages == 48


def test_a_page_that_was_never_used_is_not_touched() -> None:
    """RAM starts as zeros; clearing it would make a sparse machine's memory real."""
    world = World()
    world.lone.ram.octets[FIRST * PAGE_SIZE :] = b"\xee" * (112 * PAGE_SIZE)

    run = world.alloc(4)

    assert bytes(world.lone.ram.octets[run.gpa : run.gpa + run.size]) == b"\xee" * run.size


def test_a_page_that_was_used_is_cleared() -> None:
    """Zeroed means zero, whoever had the page before; unzeroed pages keep what they hold."""
    world = World(4)
    run = world.alloc(2)
    world.lone.ram.octets[run.gpa : run.gpa + run.size] = b"x" * run.size
    world.pages.free(world.actor, run)

    again = world.alloc(4)
    assert bytes(world.lone.ram.octets[again.gpa : again.gpa + again.size]) == bytes(again.size)

    world.lone.ram.octets[again.gpa] = 1
    world.pages.free(world.actor, again)
    assert world.lone.ram.octets[world.alloc(4, zeroed=False).gpa] == 1


def test_freed_pages_can_be_poisoned() -> None:
    """A ring that is read after it was freed shows the poison, not old packets."""
    world = World(poison_freed=True)
    run = world.alloc(2)

    world.pages.free(world.actor, run)

    assert set(world.lone.ram.octets[run.gpa : run.gpa + run.size]) == {0x6B}


def test_freeing_twice_is_noticed() -> None:
    """Also when the same pages were handed out to somebody else in between."""
    world = World()
    run = world.alloc(2)
    world.pages.free(world.actor, run)
    with pytest.raises(AssertionError, match="stale, 2 pages of generation 1"):
        world.pages.free(world.actor, run)

    again = world.alloc(2)
    assert again.pfn == run.pfn
    with pytest.raises(AssertionError, match=r"but 2 of generation 2 are there: RING\[12\]"):
        world.pages.assert_live(run)


def test_every_page_knows_its_owner() -> None:
    """Not only the first of a run."""
    world = World()
    run = world.alloc(5)

    assert {world.pages.owner_of(pfn) for pfn in run.pfns} == {RING}
    assert world.pages.owner_of(run.pfn + 5) == 0
    assert world.pages.run_at(run.pfn) == run
    assert (owner_text(0), owner_text(RING), owner_text(99)) == ("free", "RING[12]", "owner 99[0]")


def test_the_free_lists_are_changed_under_their_lock() -> None:
    """Whoever allocates or frees while another holds the lock waits for it."""
    world = World()
    lock, other = world.pages._lock, world.lone.new_actor(2)
    world.lone.hooks.on_yield = lambda: lock.release(other)
    run = world.alloc(1)
    steps: tuple[Callable[[], object], ...] = (
        lambda: world.alloc(1),
        lambda: world.pages.alloc_scattered(world.actor, 2, RING, seed=1),
        lambda: world.pages.free(world.actor, run),
    )
    for number, step in enumerate(steps, 1):
        lock.acquire(other)
        step()
        assert world.lone.hooks.yields == number


def test_scattered_pages_are_nowhere_neighbours() -> None:
    """No two pages of a scattered allocation are adjacent in RAM; the seed fixes the order."""
    world, same = World(), World()

    runs = world.pages.alloc_scattered(world.actor, 20, RING, seed=3)

    pfns = sorted(run.pfn for run in runs)
    assert len(pfns) == 20 and all(b - a > 1 for a, b in zip(pfns, pfns[1:], strict=False))
    assert runs == same.pages.alloc_scattered(same.actor, 20, RING, seed=3)
    assert [run.pfn for run in runs] != pfns
    for run in runs:
        world.pages.free(world.actor, run)
    assert world.pages.free_pages == 112
    with pytest.raises(OutOfMemory):
        world.pages.alloc_scattered(world.actor, 60, RING, seed=3)


def test_the_ledger_hears_of_every_page() -> None:
    """Allocations and frees in their order, with owner."""
    world = World()
    heard: list[tuple[str, int, int]] = []
    world.pages.ledger = lambda event, run, owner: heard.append((event, run.count, owner))

    world.pages.free(world.actor, world.alloc(3))

    assert heard == [("alloc", 3, RING), ("free", 3, RING)]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40)), max_size=40), st.integers(20, 112))
def test_the_allocator_matches_a_model(steps: list[tuple[int, int]], size: int) -> None:
    """No page is handed out twice, none is lost, and after everything is freed all blocks have joined."""
    world = World(size)
    live: list[PageRun] = []
    owned: set[int] = set()
    for kind, count in steps:
        try:
            if kind == 0:
                new = [world.alloc(count)]
            elif kind == 1:
                new = world.pages.alloc_scattered(world.actor, count, RING, seed=count)
            else:
                new = []
        except OutOfMemory:
            new = []
        for run in new:
            assert not owned & set(run.pfns)
            assert run.pfn >= FIRST and run.pfn + run.count <= FIRST + size
            owned |= set(run.pfns)
            live.append(run)
        if kind == 2 and live:
            run = live.pop(count % len(live))
            owned -= set(run.pfns)
            world.pages.free(world.actor, run)
        assert world.pages.pages_in_use == len(owned)
    assert sum(world.pages.in_use_by_owner().values()) == len(owned)
    for run in live:
        world.pages.free(world.actor, run)

    assert world.pages.free_pages == size
    assert free_blocks(world.pages) == free_blocks(World(size).pages)


def free_blocks(pages: PageAllocator) -> set[tuple[int, int]]:
    """(page, order) of every free block."""
    return {(pfn, order - 1) for pfn, order in enumerate(pages._order) if order}


def hammer_pages(rounds: int) -> None:
    """Two processes allocate, write their number into every page, and free."""
    crowd = Crowd(2, (FIRST + 112) * PAGE_SIZE)
    formatted(crowd.ram)

    def part(actor: Actor) -> None:
        pages = allocator(crowd.ram)
        chance = random.Random(actor.number)
        mine: list[PageRun] = []
        for _ in range(rounds):
            if len(mine) < 4 and chance.random() < 0.6:
                try:
                    run = pages.alloc_pages_exact(actor, chance.randrange(1, 12), actor.number)
                except OutOfMemory:
                    continue
                for pfn in run.pfns:
                    assert crowd.ram.octets[pfn * PAGE_SIZE + 8] == 0
                    crowd.ram.octets[pfn * PAGE_SIZE + 8] = actor.number & 0xFF
                mine.append(run)
            elif mine:
                run = mine.pop(chance.randrange(len(mine)))
                assert {crowd.ram.octets[pfn * PAGE_SIZE + 8] for pfn in run.pfns} == {actor.number & 0xFF}
                pages.free(actor, run)
        for run in mine:
            pages.free(actor, run)

    crowd.run(part, part)
    pages = allocator(crowd.ram)
    assert (pages.free_pages, pages.in_use_by_owner()) == (112, {})
    assert free_blocks(pages) == free_blocks(World(112).pages)


def test_two_processes_never_have_one_page() -> None:
    """The free lists survive two processes at once."""
    hammer_pages(1_500)


@pytest.mark.soak
def test_two_processes_never_have_one_page_for_long() -> None:
    """The same, long enough for the rare orders."""
    hammer_pages(60_000)


def test_the_columns_take_the_room_they_say() -> None:
    """Seven columns, 22 bytes a page, each on cache lines of its own."""
    assert PageAllocator.footprint(128) == 5 * 512 + 2 * 128
    assert Table.footprint(Waiter, 64) <= ZONE_GPA - WAITERS_GPA


def test_pages_that_nobody_touched_may_have_no_memory_behind_them() -> None:
    """Handed out and given back untouched, then the tmpfs is full: OutOfMemory, and nothing is lost."""
    world = World()
    run = world.alloc(4)
    world.pages.free(world.actor, run)
    free = world.pages.free_pages

    def full(_gpa: int, _length: int) -> None:
        raise OutOfMemory("no pages")

    world.lone.ram.reserve = full
    with pytest.raises(OutOfMemory):
        world.alloc(4)

    assert world.pages.free_pages == free and not world.pages.in_use_by_owner()


class SparseWorld:
    """64 MiB of RAM in a tmpfs file, of which nothing has memory; `reserved` are the ranges that were asked for."""

    BYTES: Final = 64 << 20
    FIRST: Final = 256

    def __init__(self) -> None:
        self.fd = os.memfd_create("ram")
        os.ftruncate(self.fd, self.BYTES)
        self.lone = Lone()
        self.ram = Ram(mmap.mmap(self.fd, self.BYTES))
        self.refuse_at = -1
        self.asked = 0
        self.reserved: list[tuple[int, int]] = []
        self.ram.reserve = self.reserve
        assert Table(self.ram, "zones", Zone, ZONE_GPA, 1).alloc() is not None
        self.pages = allocator(self.ram)
        self.pages.format(self.FIRST, self.BYTES // PAGE_SIZE)

    def reserve(self, gpa: int, length: int) -> None:
        self.asked += 1
        if self.asked == self.refuse_at:
            raise OutOfMemory("no pages")
        self.reserved.append((gpa, length))

    def with_memory(self) -> set[int]:
        """The numbers of the columns' pages that somebody wrote, or only read: either gives them memory."""
        end = COLUMNS_GPA + PageAllocator.footprint(self.BYTES // PAGE_SIZE)
        found, at = set(), COLUMNS_GPA
        with contextlib.suppress(OSError):
            while (at := os.lseek(self.fd, at, os.SEEK_DATA)) < end:
                found.add(at // PAGE_SIZE)
                at = (at // PAGE_SIZE + 1) * PAGE_SIZE
        return found


def test_nothing_of_the_columns_is_touched_before_it_is_reserved() -> None:
    """A first touch of memory that a full tmpfs has not would be SIGBUS: also a look at a buddy, or for leaks."""
    world, chance = SparseWorld(), random.Random(7)
    runs = []
    for _ in range(60):
        count = 1 + (chance.randrange(1500) >> chance.randrange(9))
        runs.append(world.pages.alloc_pages_exact(world.lone.actor, count, RING))
        if chance.random() < 0.3:
            world.pages.free(world.lone.actor, runs.pop(chance.randrange(len(runs))))
    assert sum(world.pages.in_use_by_owner().values()) == sum(run.count for run in runs)
    last = world.BYTES // PAGE_SIZE - 1
    assert world.pages.owner_of(last) == 0

    pages = {page for gpa, length in world.reserved for page in range(gpa >> 12, (gpa + length - 1 >> 12) + 1)}
    touched = world.with_memory()
    assert touched and touched <= pages


def test_allocation_that_finds_no_memory_for_the_columns_changes_nothing() -> None:
    """Whichever of its reservations fails: OutOfMemory, as many pages free as before, and it works again later."""
    for refused in range(1, 40):
        world = SparseWorld()
        before = world.pages.free_pages
        world.refuse_at = world.asked + refused
        try:
            run = world.pages.alloc_pages_exact(world.lone.actor, 1200, RING)
        except OutOfMemory:
            assert (world.pages.free_pages, world.pages.in_use_by_owner()) == (before, {})
            run = world.pages.alloc_pages_exact(world.lone.actor, 1200, RING)
        else:
            assert refused > 7, "nothing was reserved"
        world.refuse_at = -1
        world.pages.free(world.lone.actor, run)
        assert (world.pages.free_pages, world.pages.in_use_by_owner()) == (before, {})
        assert world.pages.alloc_pages(world.lone.actor, 12, RING).count == 4096
