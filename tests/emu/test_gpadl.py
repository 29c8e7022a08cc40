"""GPADLs: which bytes their ranges describe, and the rings that lie in their pages."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from emu.errors import OutOfMemory, ProtocolViolation
from emu.gpadl import Gpadl, MapBudget, map_ring
from emu.memory import PAGE_SIZE, GuestMemory
from emu.ring import RingConsumer, RingMemory, RingProducer
from emu.wire.gpa_range import GpaRange

RAM_PAGES = 64


@pytest.fixture
def ram() -> Iterator[GuestMemory]:
    """64 pages of shared memory."""
    fd = os.memfd_create("ram")
    os.ftruncate(fd, RAM_PAGES * PAGE_SIZE)
    memory = GuestMemory.map(fd, RAM_PAGES * PAGE_SIZE)
    yield memory
    memory.close()
    os.close(fd)


def test_one_range_of_whole_pages() -> None:
    """What Linux sends: every page described from its first byte to its last."""
    gpadl = Gpadl.of_pages([0x10, 0x11, 0x20])

    assert gpadl.ranges == (GpaRange(3 * PAGE_SIZE, 0, (0x10, 0x11, 0x20)),)
    assert gpadl.runs() == [(0x10000, 2 * PAGE_SIZE), (0x20000, PAGE_SIZE)]
    assert gpadl.byte_count == 3 * PAGE_SIZE
    assert gpadl.page_pfns() == (0x10, 0x11, 0x20)


def test_range_may_begin_and_end_inside_pages() -> None:
    """byte_offset cuts the first page, byte_count the last."""
    gpadl = Gpadl((GpaRange(PAGE_SIZE + 100, 4000, (1, 2, 7)),))

    assert gpadl.runs() == [(PAGE_SIZE + 4000, 96 + PAGE_SIZE), (7 * PAGE_SIZE, 4)]


def test_ranges_follow_each_other() -> None:
    """Several ranges are one sequence of bytes; pieces that touch in memory are joined across ranges."""
    gpadl = Gpadl((GpaRange(96, 4000, (1,)), GpaRange(8, 0, (2,)), GpaRange(8, 16, (2,))))

    assert gpadl.runs() == [(PAGE_SIZE + 4000, 104), (2 * PAGE_SIZE + 16, 8)]
    assert gpadl.byte_count == 112


def test_pages_beyond_ram_are_refused(ram: GuestMemory) -> None:
    """A GPADL is checked against RAM before anybody touches what it describes."""
    Gpadl.of_pages([RAM_PAGES - 1]).check(ram)

    with pytest.raises(ProtocolViolation) as caught:
        Gpadl.of_pages([0, RAM_PAGES]).check(ram)
    assert caught.value.rule == "gpa-outside-ram"


@pytest.mark.parametrize("cut", [GpaRange(PAGE_SIZE, 8, (1, 2)), GpaRange(100, 0, (1,))])
def test_ring_in_a_cut_range_is_refused(ram: GuestMemory, cut: GpaRange) -> None:
    """A ring lies in whole pages."""
    with pytest.raises(ProtocolViolation) as caught:
        Gpadl((GpaRange(4 * PAGE_SIZE, 0, (3, 4, 5, 6)), cut)).map_ring(ram, 0, 2)

    assert caught.value.rule == "gpadl-not-pages"


@pytest.mark.parametrize("budget", [None, MapBudget(100), MapBudget(0)])
def test_both_rings_of_a_channel_lie_in_one_gpadl(ram: GuestMemory, budget: MapBudget | None) -> None:
    """The upstream ring from page 0, the downstream ring from its page offset, scattered as the guest likes."""
    gpadl = Gpadl.of_pages([9, 8, 7, 30, 31, 12])
    upstream, downstream = gpadl.map_ring(ram, 0, 3, budget), gpadl.map_ring(ram, 3, 3, budget)
    for ring, text in ((upstream, b"up"), (downstream, b"down")):
        ring.init()
        RingProducer(ring).write(text)

    assert ram.read(8 * PAGE_SIZE + 16, 2) == b"up"
    assert ram.read(31 * PAGE_SIZE + 16, 4) == b"down"
    assert [next(RingConsumer(ring).drain())[3] for ring in (upstream, downstream)] == [
        b"up".ljust(8, b"\0"),
        b"down".ljust(8, b"\0"),
    ]
    upstream.close()
    downstream.close()


def test_budget_is_taken_for_each_run_and_given_back(ram: GuestMemory) -> None:
    """Two mappings a run, because the data is there twice; closing the ring gives them back, once."""
    budget = MapBudget(10)
    ring = map_ring(ram, [5, 7, 9], 0, 3, budget)

    assert budget.left == 4
    ring.close()
    ring.close()
    assert budget.left == 10


def test_ring_beyond_the_budget_works_page_by_page(ram: GuestMemory) -> None:
    """A guest whose pages are all apart cannot use up the host's mappings: its ring is slower, not refused."""
    budget = MapBudget(5)
    before = mapped_runs(ram)
    ring = map_ring(ram, [5, 7, 9], 0, 3, budget)
    ring.init()
    RingProducer(ring).write(b"payload!")

    assert mapped_runs(ram) == before
    assert budget.left == 5
    assert ram.read(7 * PAGE_SIZE + 16, 8) == b"payload!"
    ring.close()


def test_process_without_mappings_left_works_page_by_page(ram: GuestMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOMEM from the system, at its own limit, is answered as the budget is."""

    def refuse(*_arguments: object) -> RingMemory:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    budget = MapBudget(10)
    monkeypatch.setattr(RingMemory, "map", refuse)
    ring = map_ring(ram, [5, 7, 9], 0, 3, budget)
    ring.init()
    RingProducer(ring).write(b"payload!")

    assert budget.left == 10
    assert ram.read(7 * PAGE_SIZE + 16, 8) == b"payload!"
    ring.close()


@pytest.mark.parametrize(
    ("pfns", "first_page", "page_count", "rule"),
    [
        ([1, 2, 3], 0, 4, "ring-pages"),
        ([1, 2, 3], 3, 1, "ring-pages"),
        ([1, 2, 3], 2, 2, "ring-pages"),
        ([1, 2, 3], -1, 2, "ring-pages"),
        ([1, 2, 3], 0, 0, "ring-pages"),
        ([1, 2, 3], 0, 1, "ring-size"),
        ([1, RAM_PAGES], 0, 2, "gpa-outside-ram"),
        ([1, 1 << 52], 0, 2, "gpa-outside-ram"),
    ],
)
@pytest.mark.parametrize("runs", [0, 100])
def test_ring_that_cannot_be_is_refused(
    ram: GuestMemory, pfns: list[int], first_page: int, page_count: int, rule: str, runs: int
) -> None:
    """Pages that are not in the GPADL or not in RAM, or no room for data: refused, and nothing is held."""
    budget = MapBudget(runs)

    with pytest.raises(ProtocolViolation) as caught:
        map_ring(ram, pfns, first_page, page_count, budget)

    assert caught.value.rule == rule
    assert budget.left == runs


def test_ring_in_pages_that_do_not_exist_is_refused(ram: GuestMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ring's pages are reserved before they are touched: a full tmpfs is a refusal, not a SIGBUS."""

    def full(_fd: int, _offset: int, _length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    budget = MapBudget(10)

    with pytest.raises(OutOfMemory):
        map_ring(ram, [1, 2], 0, 2, budget)
    assert budget.left == 10


def test_system_budget_leaves_half_of_the_mappings() -> None:
    """The budget of a process follows the system's own limit."""
    with Path("/proc/sys/vm/max_map_count").open(encoding="ascii") as file:
        limit = int(file.read())

    assert MapBudget.of_system().left == limit // 2


def mapped_runs(ram: GuestMemory) -> int:
    """How many mappings of this shared memory the process has; those that a test before left go when they are found."""
    assert ram.fd is not None
    inode = str(os.fstat(ram.fd).st_ino)
    with Path("/proc/self/maps").open(encoding="ascii") as file:
        return sum("memfd:ram" in line and line.split()[4] == inode for line in file)
