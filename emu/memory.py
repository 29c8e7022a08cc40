"""Guest physical memory: one file of shared pages, addressed by GPA, of which no byte outside is ever
touched.

A GPA is an offset into the file. Whoever acts on a peer's addresses calls `check` (inside RAM?) and, before
the first touch of pages that the peer chose, `reserve`: a store into a page that a full tmpfs cannot supply
is SIGBUS, and it has to be a refusal. `stitch` makes one contiguous mapping of scattered pages, which is
also how a ring gets its data area a second time behind itself.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Sequence
from typing import Final

from emu.errors import OutOfMemory, ProtocolViolation
from emu.ipc.atomics import AtomicView

PAGE_SIZE: Final = 4096
PAGE_SHIFT: Final = 12

_libc = ctypes.CDLL(None, use_errno=True)
_libc_mmap = _libc.mmap
_libc_mmap.restype = ctypes.c_void_p
_libc_mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_MAP_FIXED: Final = 0x10  # the same on every Linux architecture that Python's mmap knows; not exported there
_READ_WRITE: Final = mmap.PROT_READ | mmap.PROT_WRITE


def stitch(fd: int, runs: Sequence[tuple[int, int]]) -> mmap.mmap:
    """Map these (offset, length) runs of `fd`, in bytes and whole pages, one behind the other as one `mmap`.

    The object owns the whole range and unmaps it on `close`; a child of a fork keeps it. Costs 7 us for one
    run, about 2 us for each further one, and one of the process's `vm.max_map_count` mappings each. Raises
    OSError (ENOMEM when that limit is reached); then nothing stays mapped.
    """
    # The anonymous mapping only reserves addresses: each page of it is replaced below.
    whole = mmap.mmap(
        -1,
        sum(length for _, length in runs),
        flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
        prot=_READ_WRITE,
    )
    with AtomicView(whole) as view:
        address = view.address
    for offset, length in runs:
        if _libc_mmap(address, length, _READ_WRITE, mmap.MAP_SHARED | _MAP_FIXED, fd, offset) != address:
            error = ctypes.get_errno()
            whole.close()
            raise OSError(error, f"mapping {length} bytes at offset {offset:#x}: {os.strerror(error)}")
        address += length
    return whole


def coalesce(gpas: Sequence[int]) -> list[tuple[int, int]]:
    """Join addresses of pages into (gpa, length in bytes) runs: one wherever a page follows the last."""
    runs: list[tuple[int, int]] = []
    start = end = -1
    for gpa in gpas:
        if gpa != end:
            if end >= 0:
                runs.append((start, end - start))
            start = gpa
        end = gpa + PAGE_SIZE
    if end >= 0:
        runs.append((start, end - start))
    return runs


def reserve_ram(fd: int, gpa: int, length: int) -> None:
    """Make sure that bytes of RAM have memory behind them; OutOfMemory when the tmpfs has none left."""
    try:
        os.posix_fallocate(fd, gpa, length)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT):
            raise
        raise OutOfMemory(f"no pages behind {length} bytes of RAM at GPA {gpa:#x}: {error.strerror}") from error


class GuestMemory:
    """The machine's RAM as one process sees it: copies in and out by GPA, each checked against its size.

    `fd` is the shared memory object (None over a `bytearray`), `buffer` the whole of it mapped. Both stay
    the caller's, except a mapping that `map` made.
    """

    __slots__ = ("_atomics", "_owned", "_reserved", "_there", "_there_end", "buffer", "fd", "size")

    def __init__(
        self,
        fd: int | None,
        buffer: mmap.mmap | bytearray,
        size: int | None = None,
        *,
        there: Sequence[int] = (0, 0),
    ) -> None:
        """`there`: GPA and length of what has had memory since the launch, so that nobody need reserve it."""
        self.fd = fd
        self.buffer = buffer
        self.size = len(buffer) if size is None else size
        self._atomics: AtomicView | None = None
        self._owned: mmap.mmap | None = None
        self._reserved: mmap.mmap | None = None
        self._there = there[0]
        self._there_end = there[0] + there[1]
        assert self.size <= len(buffer), (self.size, len(buffer))

    @classmethod
    def map(cls, fd: int, size: int) -> GuestMemory:
        """Map `size` bytes of the shared memory object `fd`, readable and writable."""
        mapping = mmap.mmap(fd, size)
        memory = cls(fd, mapping, size)
        memory._owned = mapping
        return memory

    @classmethod
    def on(cls, buffer: bytearray) -> GuestMemory:
        """RAM in a `bytearray`, for tests of logic."""
        return cls(None, buffer)

    @property
    def atomics(self) -> AtomicView:
        """Atomic words anywhere in RAM; offsets are GPAs, which the caller has checked."""
        if self._atomics is None:
            self._atomics = AtomicView(self.buffer)
        return self._atomics

    def check(self, gpa: int, length: int) -> None:
        """Refuse [gpa, gpa + length) that does not lie in RAM: ProtocolViolation, rule `gpa-outside-ram`."""
        if gpa < 0 or length < 0 or gpa + length > self.size:
            raise ProtocolViolation(
                f"{length} bytes at GPA {gpa:#x} do not lie in {self.size:#x} bytes of RAM",
                rule="gpa-outside-ram",
                field="gpa",
                value=gpa,
            )

    def read(self, gpa: int, length: int) -> bytes:
        """Copy `length` bytes out; ProtocolViolation when they are not all RAM."""
        if gpa < 0 or length < 0 or gpa + length > self.size:
            self.check(gpa, length)
        return bytes(self.buffer[gpa : gpa + length])

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` in; ProtocolViolation when it does not all fall in RAM."""
        end = gpa + len(data)
        if gpa < 0 or end > self.size:
            self.check(gpa, len(data))
        self.buffer[gpa:end] = data

    def reserve(self, gpa: int, length: int) -> None:
        """Make sure that these pages exist, so that touching them cannot fail; what they hold stays.

        A page that this process has reserved once is there for good, and costs no system call again. Raises
        ProtocolViolation outside RAM, OutOfMemory when the tmpfs behind RAM is full.
        """
        if self._there <= gpa <= gpa + length <= self._there_end:
            return
        self.check(gpa, length)
        if self.fd is None or length == 0:
            return
        if self._reserved is None:
            # A byte a page of RAM, itself without memory until it is written to.
            self._reserved = mmap.mmap(-1, -(-self.size >> PAGE_SHIFT), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        first, end = gpa >> PAGE_SHIFT, gpa + length + PAGE_SIZE - 1 >> PAGE_SHIFT
        if self._reserved.find(b"\0", first, end) < 0:
            return
        reserve_ram(self.fd, gpa, length)
        self._reserved[first:end] = b"\1" * (end - first)

    def is_there(self, gpa: int, length: int) -> bool:
        """Whether these bytes lie in what has had memory since the launch."""
        return self._there <= gpa <= gpa + length <= self._there_end

    def room(self) -> int:
        """Bytes that the tmpfs behind RAM has free; one without a limit, or a `bytearray`, has all that RAM needs."""
        behind = None if self.fd is None else os.fstatvfs(self.fd)
        return behind.f_bavail * behind.f_frsize if behind is not None and behind.f_blocks else self.size

    def close(self) -> None:
        """End `atomics`, and the mapping if `map` made it; rings mapped from the fd live on.

        May be called twice. Raises BufferError while somebody holds a view of the mapping.
        """
        if self._atomics is not None:
            self._atomics.close()
            self._atomics = None
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None
        if self._owned is not None:
            self._owned.close()
