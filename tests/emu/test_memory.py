"""Guest memory: copies by GPA inside RAM, refusals outside, and mappings stitched from scattered pages."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import emu.memory
from emu.errors import OutOfMemory, ProtocolViolation
from emu.memory import PAGE_SIZE, GuestMemory, coalesce, stitch

RAM_BYTES = 8 * PAGE_SIZE


@pytest.fixture
def fd() -> Iterator[int]:
    """Eight pages of shared memory; the first byte of page n is n."""
    number = os.memfd_create("ram")
    os.ftruncate(number, RAM_BYTES)
    for page in range(RAM_BYTES // PAGE_SIZE):
        os.pwrite(number, bytes([page]), page * PAGE_SIZE)
    yield number
    os.close(number)


def test_bytes_written_are_read_back(fd: int) -> None:
    """A copy in is what a copy out returns, across a page and in the file itself."""
    memory = GuestMemory.map(fd, RAM_BYTES)
    memory.write(PAGE_SIZE - 2, b"abcd")

    assert memory.read(PAGE_SIZE - 2, 4) == b"abcd"
    assert os.pread(fd, 4, PAGE_SIZE - 2) == b"abcd"
    memory.close()


@pytest.mark.parametrize(
    ("gpa", "length"), [(RAM_BYTES, 1), (RAM_BYTES - 1, 2), (-1, 1), (0, RAM_BYTES + 1), (0, -1), (1 << 63, 8)]
)
def test_addresses_outside_ram_are_refused(gpa: int, length: int) -> None:
    """Not a byte outside RAM is touched, whatever a peer writes into an address."""
    memory = GuestMemory.on(bytearray(RAM_BYTES))

    for touch in (memory.check, memory.read, memory.reserve):
        with pytest.raises(ProtocolViolation) as caught:
            touch(gpa, length)
        assert (caught.value.rule, caught.value.field, caught.value.value) == ("gpa-outside-ram", "gpa", gpa)


def test_write_outside_ram_changes_nothing() -> None:
    """A copy that does not all fall in RAM is refused whole."""
    memory = GuestMemory.on(bytearray(RAM_BYTES))

    with pytest.raises(ProtocolViolation):
        memory.write(RAM_BYTES - 2, b"abcd")

    assert memory.read(RAM_BYTES - 2, 2) == bytes(2)


def test_last_byte_of_ram_is_ram() -> None:
    """The end of RAM is not refused by one byte."""
    memory = GuestMemory.on(bytearray(RAM_BYTES))
    memory.write(RAM_BYTES - 1, b"z")

    assert memory.read(RAM_BYTES - 1, 1) == b"z"
    assert memory.read(RAM_BYTES, 0) == b""


def test_reserved_pages_exist_and_keep_their_bytes() -> None:
    """Reserving gives sparse pages memory, and leaves what others hold."""
    fd = os.memfd_create("ram")
    os.ftruncate(fd, RAM_BYTES)
    memory = GuestMemory.map(fd, RAM_BYTES)
    memory.write(0, b"kept")
    memory.reserve(0, 3 * PAGE_SIZE)

    assert os.fstat(fd).st_blocks * 512 >= 3 * PAGE_SIZE
    assert memory.read(0, 4) == b"kept"
    memory.close()
    os.close(fd)


@pytest.mark.parametrize(("blocks", "room"), [(1000, 7 * PAGE_SIZE), (0, RAM_BYTES)], ids=["limited", "no-limit"])
def test_room_is_what_the_tmpfs_has_left(fd: int, monkeypatch: pytest.MonkeyPatch, blocks: int, room: int) -> None:
    """Free blocks of the file system behind RAM; what has no limit has all that RAM needs, as a `bytearray` does."""
    monkeypatch.setattr(os, "fstatvfs", lambda _fd: SimpleNamespace(f_blocks=blocks, f_bavail=7, f_frsize=PAGE_SIZE))
    memory = GuestMemory.map(fd, RAM_BYTES)

    assert memory.room() == room
    assert GuestMemory.on(bytearray(RAM_BYTES)).room() == RAM_BYTES
    memory.close()


def test_full_tmpfs_is_a_refusal(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC while reserving is OutOfMemory; any other error is ours and goes up as it is."""
    memory = GuestMemory.map(fd, RAM_BYTES)
    error = errno.ENOSPC

    def refuse(_fd: int, _offset: int, _length: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OutOfMemory, match="GPA 0x1000"):
        memory.reserve(PAGE_SIZE, PAGE_SIZE)

    error = errno.EBADF
    with pytest.raises(OSError, match="Bad file descriptor"):
        memory.reserve(PAGE_SIZE, PAGE_SIZE)
    memory.close()


def test_atomics_lie_at_their_gpa(fd: int) -> None:
    """An atomic word's offset is its GPA; closing ends the view, twice does no harm."""
    memory = GuestMemory.map(fd, RAM_BYTES)
    view = memory.atomics
    view.store_u32(PAGE_SIZE + 8, 0x01020304)

    assert memory.read(PAGE_SIZE + 8, 4) == bytes.fromhex("04030201")
    assert memory.atomics is view
    memory.close()
    memory.close()
    with pytest.raises(ValueError, match="closed"):
        view.load_u32(0)


def test_memory_that_was_handed_over_stays_open() -> None:
    """Only a mapping that `map` made is closed: what the caller brought is the caller's."""
    buffer = bytearray(PAGE_SIZE)
    memory = GuestMemory.on(buffer)
    memory.atomics.store_u8(0, 7)
    memory.close()
    buffer.extend(b"x")

    assert buffer[0] == 7


def test_pages_are_stitched_in_the_order_given(fd: int) -> None:
    """Scattered runs become one piece, a page may appear twice, and all of it is the file's own memory."""
    mapping = stitch(fd, [(3 * PAGE_SIZE, PAGE_SIZE), (0, 2 * PAGE_SIZE), (3 * PAGE_SIZE, PAGE_SIZE)])

    assert mapping[::PAGE_SIZE] == bytes([3, 0, 1, 3])
    mapping[1:3] = b"ab"
    assert mapping[3 * PAGE_SIZE + 1 : 3 * PAGE_SIZE + 3] == b"ab"
    assert os.pread(fd, 2, 3 * PAGE_SIZE + 1) == b"ab"
    mapping.close()


def test_stitch_that_fails_leaves_nothing_mapped() -> None:
    """A descriptor that cannot be mapped is an OSError, and the reserved addresses are given back."""
    before = mappings()

    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        stitch(-1, [(0, 64 * PAGE_SIZE)])

    assert caught.value.errno == errno.EBADF
    assert mappings() == before


@pytest.mark.parametrize(
    ("pages", "runs"),
    [
        ([], []),
        ([5], [(5, 1)]),
        ([5, 6, 7], [(5, 3)]),
        ([5, 4, 3], [(5, 1), (4, 1), (3, 1)]),
        ([0, 1, 3, 4, 4], [(0, 2), (3, 2), (4, 1)]),
    ],
)
def test_neighbouring_pages_are_one_run(pages: list[int], runs: list[tuple[int, int]]) -> None:
    """Pages that follow each other become one run, anything else begins a new one."""
    expected = [(first * PAGE_SIZE, count * PAGE_SIZE) for first, count in runs]

    assert coalesce([page * PAGE_SIZE for page in pages]) == expected


def mappings() -> int:
    """How many mappings of at least 64 pages without a file this process has."""
    with Path("/proc/self/maps").open(encoding="ascii") as file:
        lines = [line.split() for line in file]
    spans = [[int(end, 16) for end in line[0].split("-")] for line in lines if len(line) == 5]
    return sum(end - begin == 64 * PAGE_SIZE for begin, end in spans)


def test_what_has_had_memory_since_the_launch_is_not_reserved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages in there cost no system call; a byte beyond it does."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(emu.memory, "reserve_ram", lambda _fd, gpa, length: asked.append((gpa, length)))
    memory = GuestMemory(0, bytearray(16 * PAGE_SIZE), there=(4 * PAGE_SIZE, 8 * PAGE_SIZE))

    memory.reserve(4 * PAGE_SIZE, 8 * PAGE_SIZE)
    assert asked == [] and memory.is_there(11 * PAGE_SIZE, PAGE_SIZE)

    memory.reserve(11 * PAGE_SIZE, PAGE_SIZE + 1)
    memory.reserve(3 * PAGE_SIZE, 1)
    assert asked == [(11 * PAGE_SIZE, PAGE_SIZE + 1), (3 * PAGE_SIZE, 1)]
