"""Rings for tests, over every kind of memory a ring can lie in, and a look at their bytes past our own code."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from emu.gpadl import MapBudget, map_ring
from emu.memory import PAGE_SIZE, GuestMemory
from emu.ring import RingMemory

KINDS: Final = ("contiguous", "scattered", "paged", "bytearray")
"""Mapped in one run; mapped page by page; copied page by page from scattered pages; on a bytearray."""


class RingPages:
    """The pages of one ring. `memory` is one attachment; `attach` makes more, `peek` and `poke` see the bytes."""

    def __init__(self, kind: str, ram: GuestMemory, pfns: list[int]) -> None:
        self._kind = kind
        self._ram = ram
        self._pfns = pfns
        self._attached: list[RingMemory] = []
        self.memory = self.attach()
        self.data_size = self.memory.data_size

    def attach(self) -> RingMemory:
        """The ring once more, as another process would see it; closed with the rest."""
        budget = MapBudget(0) if self._kind == "paged" else None
        self._attached.append(map_ring(self._ram, self._pfns, 0, len(self._pfns), budget))
        return self._attached[-1]

    def start_at(self, index: int) -> None:
        """An empty ring whose indices stand at `index`, its data full of rubbish."""
        self.poke(0, b"\xee" * self.data_size)
        self.memory.init()
        self.memory.words.store_write(index)
        self.memory.words.store_read(index)

    def peek(self, index: int, length: int) -> bytes:
        """Bytes of the data area from `index` on, wrapping."""
        return bytes(self._ram.read(self._gpa(at), 1)[0] for at in range(index, index + length))

    def poke(self, index: int, data: bytes) -> None:
        """Store bytes into the data area from `index` on, wrapping."""
        while data:
            step = min(len(data), PAGE_SIZE - index % PAGE_SIZE)
            self._ram.write(self._gpa(index), data[:step])
            index, data = index + step, data[step:]

    def control_page(self) -> bytes:
        """The bytes of the control page."""
        return self._ram.read(self._pfns[0] * PAGE_SIZE, PAGE_SIZE)

    def dirty_control_page(self) -> None:
        """Fill the control page with rubbish."""
        self._ram.write(self._pfns[0] * PAGE_SIZE, b"\xee" * PAGE_SIZE)

    def close(self) -> None:
        """Close every attachment."""
        for memory in self._attached:
            memory.close()

    def _gpa(self, index: int) -> int:
        page, offset = divmod(index % self.data_size, PAGE_SIZE)
        return self._pfns[1 + page] * PAGE_SIZE + offset


@contextmanager
def ring_pages(kind: str, data_pages: int = 1) -> Iterator[RingPages]:
    """A ring of so many data pages, its control page initialised."""
    pages = data_pages + 1
    pfns = list(range(1, pages + 1)) if kind in ("contiguous", "bytearray") else list(range(2 * pages, 0, -2))
    size = (2 * pages + 1) * PAGE_SIZE
    if kind == "bytearray":
        ring = RingPages(kind, GuestMemory.on(bytearray(size)), pfns)
        ring.memory.init()
        yield ring
        ring.close()
        return
    fd = os.memfd_create("ring")
    try:
        os.ftruncate(fd, size)
        ram = GuestMemory.map(fd, size)
        ring = RingPages(kind, ram, pfns)
        ring.memory.init()
        yield ring
        ring.close()
        ram.close()
    finally:
        os.close(fd)
