"""The layout of the guest-visible segments: nothing overlaps, everything is aligned, names are found."""

from __future__ import annotations

from itertools import pairwise

import pytest

from emu import layout
from emu.layout import (
    BLOCKS,
    CACHE_LINE,
    CONNECTIONS,
    DOORBELLS,
    ENUMS,
    EXIT_SLOT,
    EXIT_SLOTS,
    MAX_VPS,
    PAGE_SIZE,
    VECTOR_WORDS,
    VP_PAGE,
    Block,
    Field,
    vp_page_offset,
    vps_bytes,
)

WIDTH = {"u8": 1, "u16": 2, "u32": 4, "u64": 8}
HOT = {"M": layout.MACHINE_PAGE, "VP": VP_PAGE, "X": EXIT_SLOT, "D": DOORBELLS}

blocks = pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)


@blocks
def test_fields_lie_one_behind_the_other(block: Block) -> None:
    """Fields stand in the order of their offsets, and none reaches into the next."""
    for field, following in pairwise(block.fields):
        assert field.offset + field.nbytes <= following.offset, (field.name, following.name)
    last = block.fields[-1]
    assert last.offset + last.nbytes <= block.size


@blocks
def test_fields_are_aligned(block: Block) -> None:
    """Every word can be accessed atomically: it lies on a multiple of its width."""
    assert [field.name for field in block.fields if field.offset % WIDTH[field.ctype]] == []


@blocks
def test_unknown_field_has_no_offset(block: Block) -> None:
    """A misspelt name is an error where it is spelt."""
    with pytest.raises(KeyError, match="has no field nonsense"):
        block.offset("nonsense")


def test_field_knows_its_size() -> None:
    """Four words of 64 bits take 32 bytes."""
    assert Field("words", 0, "u64", 4, "").nbytes == 32


def test_words_of_different_writers_have_lines_of_their_own() -> None:
    """Request, in-service, auto-EOI, run state and exit slots of a VP never share a cache line."""
    names = ("vp_index", "request", "in_service", "auto_eoi", "run_state", "exit_slot")
    lines = [VP_PAGE.offset(name) // CACHE_LINE for name in names]

    assert len(set(lines)) == len(names)
    assert all(VP_PAGE.offset(name) % CACHE_LINE == 0 for name in names)
    assert EXIT_SLOT.size == CACHE_LINE


def test_doorbells_have_a_bit_for_everything() -> None:
    """Every connection id, every word of them in the summary, every exit slot of every VP has its bit."""
    bits = {field.name: field.nbytes * 8 for field in DOORBELLS.fields}

    assert bits["connection"] == CONNECTIONS
    assert bits["connection_summary"] == CONNECTIONS // 64
    assert bits["exit_bell"] == MAX_VPS * EXIT_SLOTS


def test_vector_words_cover_all_vectors() -> None:
    """256 vectors, in words of 64."""
    assert VECTOR_WORDS * 64 == 256


def test_vp_pages_lie_behind_the_machine_page() -> None:
    """Page 0 is the machine's; position P has page 1 + P; the segment ends with the last."""
    assert vp_page_offset(0) == PAGE_SIZE
    assert vp_page_offset(3) == 4 * PAGE_SIZE
    assert vps_bytes(4) == vp_page_offset(3) + PAGE_SIZE


def test_exit_slots_fill_their_field() -> None:
    """Eight slots of 64 bytes."""
    slots = next(field for field in VP_PAGE.fields if field.name == "exit_slot")

    assert slots.nbytes == EXIT_SLOTS * EXIT_SLOT.size


def test_names_for_hot_code_are_the_tables_offsets() -> None:
    """M_, VP_, X_ and D_ names of the module agree with the tables, and none is missing but unused ones."""
    for prefix, block in HOT.items():
        for field in block.fields:
            constant = getattr(layout, f"{prefix}_{field.name.upper().removeprefix('VP_')}", None)
            if constant is not None:
                assert constant == field.offset, field.name


def test_enumerations_begin_at_their_idle_value() -> None:
    """A zeroed segment reads as: machine starting, VP awake, slot free, no fault."""
    idle = {name: enumeration(0).name for name, enumeration in ENUMS.items() if 0 in list(enumeration)}

    assert idle == {
        "vmbus_emu_machine_state": "STARTING",
        "vmbus_emu_run_state": "AWAKE",
        "vmbus_emu_exit_state": "FREE",
        "vmbus_emu_fault": "NONE",
    }
