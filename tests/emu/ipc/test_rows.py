"""Rows in shared memory: who reads while another writes finds old words and new ones, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct

import pytest

from emu.ipc.rows import load_row, store_row
from emu.ipc.segments import Segment, object_name
from tests.processes import Forked

LAYOUT = Struct("<IIQ8Q40s")
OLD = (1, 0xFFFF, *[0x00FF_FFFF_FFFF] * 9, b"old" * 13)
NEW = (2, 0x1_0000, *[0x0100_0000_0000] * 9, b"new" * 13)


@pytest.fixture
def segment(machine_name: str) -> Iterator[Segment]:
    """A page of shared memory."""
    segment = Segment.create(object_name(machine_name, "ram"), 4096)
    yield segment
    segment.close()


def test_row_is_read_back(segment: Segment) -> None:
    """Every value, at any place; what lies beside stays."""
    store_row(segment.memory, 64, LAYOUT, *NEW)

    assert load_row(segment.memory, 64, LAYOUT) == LAYOUT.unpack(LAYOUT.pack(*NEW))
    assert segment.memory[:64] + segment.memory[64 + LAYOUT.size : 1024] == bytes(1024 - LAYOUT.size)


def test_reader_finds_the_old_or_the_new_word(segment: Segment) -> None:
    """A number that carries into its next byte is never seen half, and nothing is ever seen cleared."""
    done = segment.view.cell_u32(2048)
    store_row(segment.memory, 64, LAYOUT, *OLD)

    def writer() -> None:
        while not done.load():
            store_row(segment.memory, 64, LAYOUT, *NEW)
            store_row(segment.memory, 64, LAYOUT, *OLD)

    with Forked(writer):
        seen = [load_row(segment.memory, 64, LAYOUT) for _ in range(20_000)]
        done.store(1)
    for position, both in enumerate(zip(OLD[:-1], NEW[:-1], strict=True)):
        assert {row[position] for row in seen} <= set(both)
