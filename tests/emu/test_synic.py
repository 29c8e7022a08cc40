"""The SynIC: registers, overlay pages that keep and restore RAM, slots written type last, flags set once."""

from __future__ import annotations

import pytest

from emu.errors import GeneralProtection, OutOfMemory
from emu.layout import PAGE_SIZE
from emu.memory import GuestMemory
from emu.synic import Synic
from emu.wire.hv_message import HvMessage
from emu.wire.synic import (
    HV_SYNIC_SINT_COUNT,
    HV_X64_MSR_EOM,
    HV_X64_MSR_SCONTROL,
    HV_X64_MSR_SIEFP,
    HV_X64_MSR_SIMP,
    HV_X64_MSR_SINT0,
    HV_X64_MSR_SVERSION,
    page_register,
    sint_value,
)

SIMP_GPA = 0x3000
SIEFP_GPA = 0x5000
SINT = 2
RAM = 16 * PAGE_SIZE


@pytest.fixture
def memory() -> GuestMemory:
    """RAM in which every page is marked with its number."""
    pages = (bytes([page]) * PAGE_SIZE for page in range(RAM // PAGE_SIZE))
    return GuestMemory.on(bytearray(b"".join(pages)))


@pytest.fixture
def synic(memory: GuestMemory) -> Synic:
    """A SynIC as after reset."""
    return Synic(memory)


def enable(synic: Synic) -> None:
    """Both pages placed, SynIC on, SINT 2 on vector 0xF3."""
    synic.write_msr(HV_X64_MSR_SIMP, page_register(SIMP_GPA))
    synic.write_msr(HV_X64_MSR_SIEFP, page_register(SIEFP_GPA))
    synic.write_msr(HV_X64_MSR_SCONTROL, 1)
    synic.write_msr(HV_X64_MSR_SINT0 + SINT, sint_value(0xF3))


def page(memory: GuestMemory, gpa: int) -> bytes:
    """One page of RAM as the guest sees it."""
    return memory.read(gpa, PAGE_SIZE)


def set_flag(synic: Synic, flag: int) -> bool:
    """Set an event flag as a port does; whether it was clear."""
    fetch_or, bit = synic.flag_cell(SINT, flag)
    return not fetch_or(bit) & bit


# -- registers ------------------------------------------------------------------------------------


def test_reset_values(synic: Synic) -> None:
    """SynIC off, version 1, no pages, all SINTs masked."""
    assert synic.read_msr(HV_X64_MSR_SCONTROL) == 0
    assert synic.read_msr(HV_X64_MSR_SVERSION) == 1
    assert synic.read_msr(HV_X64_MSR_SIEFP) == synic.read_msr(HV_X64_MSR_SIMP) == 0
    assert synic.read_msr(HV_X64_MSR_EOM) == 0
    assert {synic.read_msr(HV_X64_MSR_SINT0 + sint) for sint in range(16)} == {0x10000}


@pytest.mark.parametrize(
    ("msr", "value"),
    [
        (HV_X64_MSR_SCONTROL, 0xFFFF_FFFF_FFFF_FFFF),
        (HV_X64_MSR_SIMP, SIMP_GPA | 0xFFF),
        (HV_X64_MSR_SIMP, 0xFFFF_FFFF_FFFF_FFFE),
        (HV_X64_MSR_SIEFP, SIEFP_GPA | 1),
        *((HV_X64_MSR_SINT0 + sint, 0xABCD_0004_00F3) for sint in range(HV_SYNIC_SINT_COUNT)),
        (HV_X64_MSR_SINT0, 0x10000),
        (HV_X64_MSR_SINT0, 0x10000 | 15),
    ],
)
def test_register_reads_back(synic: Synic, msr: int, value: int) -> None:
    """Every register keeps what was written, reserved bits included."""
    synic.write_msr(msr, value)

    assert synic.read_msr(msr) == value


@pytest.mark.parametrize("vector", range(16))
def test_unmasked_sint_needs_a_valid_vector(synic: Synic, vector: int) -> None:
    """Vectors 0 to 15 are a #GP, and the register keeps its value."""
    with pytest.raises(GeneralProtection):
        synic.write_msr(HV_X64_MSR_SINT0, vector)

    assert synic.read_msr(HV_X64_MSR_SINT0) == 0x10000


def test_version_is_read_only(synic: Synic) -> None:
    """A write of SVERSION is a #GP."""
    with pytest.raises(GeneralProtection):
        synic.write_msr(HV_X64_MSR_SVERSION, 1)


def test_vectors_without_end_of_interrupt(synic: Synic) -> None:
    """AutoEOI counts for SINTs that are not masked."""
    synic.write_msr(HV_X64_MSR_SINT0 + 3, sint_value(0x50, auto_eoi=True))
    synic.write_msr(HV_X64_MSR_SINT0 + 4, sint_value(0x60))
    synic.write_msr(HV_X64_MSR_SINT0 + 5, sint_value(0x70, auto_eoi=True, masked=True))

    assert synic.auto_eoi_vectors() == [0x50]


def test_masked_and_polled_sints_raise_nothing(synic: Synic) -> None:
    """Only a SINT that is neither masked nor polled raises its vector."""
    synic.write_msr(HV_X64_MSR_SINT0 + 3, sint_value(0x50))
    synic.write_msr(HV_X64_MSR_SINT0 + 4, sint_value(0x60, masked=True))
    synic.write_msr(HV_X64_MSR_SINT0 + 5, sint_value(0x70, polling=True))

    assert [synic.vector_to_raise(sint) for sint in (3, 4, 5)] == [0x50, 0, 0]
    assert [synic.masked(sint) for sint in (3, 4, 5)] == [False, True, False]


# -- overlays -------------------------------------------------------------------------------------

overlays = pytest.mark.parametrize("msr", [HV_X64_MSR_SIMP, HV_X64_MSR_SIEFP])


@overlays
def test_overlay_covers_what_ram_holds(synic: Synic, memory: GuestMemory, msr: int) -> None:
    """The page is zero after reset, whatever stood in RAM; its neighbours stay."""
    synic.write_msr(msr, page_register(SIMP_GPA))

    assert page(memory, SIMP_GPA) == bytes(PAGE_SIZE)
    assert page(memory, SIMP_GPA - PAGE_SIZE) == b"\x02" * PAGE_SIZE
    assert page(memory, SIMP_GPA + PAGE_SIZE) == b"\x04" * PAGE_SIZE


@overlays
def test_disabling_gives_ram_its_bytes_back(synic: Synic, memory: GuestMemory, msr: int) -> None:
    """What stood in RAM before is there again, and the overlay's bytes are kept for its next time."""
    synic.write_msr(msr, page_register(SIMP_GPA))
    memory.write(SIMP_GPA + 8, b"overlay")
    synic.write_msr(msr, 0)
    lifted = page(memory, SIMP_GPA)
    synic.write_msr(msr, page_register(SIMP_GPA))

    assert lifted == b"\x03" * PAGE_SIZE
    assert memory.read(SIMP_GPA + 8, 7) == b"overlay"


@overlays
def test_moving_takes_the_page_along(synic: Synic, memory: GuestMemory, msr: int) -> None:
    """Another address: the old RAM comes back, the overlay's bytes lie at the new one."""
    synic.write_msr(msr, page_register(SIMP_GPA))
    memory.write(SIMP_GPA, b"overlay")
    synic.write_msr(msr, page_register(0x8000))

    assert page(memory, SIMP_GPA) == b"\x03" * PAGE_SIZE
    assert memory.read(0x8000, 8) == b"overlay\0"
    synic.write_msr(msr, 0)
    assert page(memory, 0x8000) == b"\x08" * PAGE_SIZE


@overlays
def test_writing_the_same_address_again_changes_nothing(synic: Synic, memory: GuestMemory, msr: int) -> None:
    """The page keeps its bytes, and RAM's are not taken from the overlay."""
    synic.write_msr(msr, page_register(SIMP_GPA))
    memory.write(SIMP_GPA, b"overlay")
    synic.write_msr(msr, page_register(SIMP_GPA) | 0xFFE)

    assert memory.read(SIMP_GPA, 8) == b"overlay\0"
    synic.write_msr(msr, 0)
    assert page(memory, SIMP_GPA) == b"\x03" * PAGE_SIZE


@overlays
@pytest.mark.parametrize("gpa", [RAM, RAM + PAGE_SIZE, 1 << 40, 0xFFFF_FFFF_FFFF_F000])
def test_page_outside_ram_is_refused(synic: Synic, memory: GuestMemory, msr: int, gpa: int) -> None:
    """A #GP, and the page stays where it was."""
    synic.write_msr(msr, page_register(SIMP_GPA))

    with pytest.raises(GeneralProtection):
        synic.write_msr(msr, page_register(gpa))

    assert synic.read_msr(msr) == page_register(SIMP_GPA)
    assert page(memory, SIMP_GPA) == bytes(PAGE_SIZE)


def test_last_page_of_ram_can_be_an_overlay(synic: Synic, memory: GuestMemory) -> None:
    """RAM ends where its last page does."""
    synic.write_msr(HV_X64_MSR_SIMP, page_register(RAM - PAGE_SIZE))

    assert page(memory, RAM - PAGE_SIZE) == bytes(PAGE_SIZE)


def test_page_without_memory_behind_it_is_refused(synic: Synic, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tmpfs that is full makes a #GP of it, not a SIGBUS."""

    def full(_memory: GuestMemory, _gpa: int, _length: int) -> None:
        raise OutOfMemory("full")

    monkeypatch.setattr(GuestMemory, "reserve", full)

    with pytest.raises(GeneralProtection):
        synic.write_msr(HV_X64_MSR_SIMP, page_register(SIMP_GPA))


def test_both_overlays_on_one_page_end_with_rams_bytes(synic: Synic, memory: GuestMemory) -> None:
    """Undefined in between; lifted in reverse order, RAM has its bytes again."""
    synic.write_msr(HV_X64_MSR_SIMP, page_register(SIMP_GPA))
    synic.write_msr(HV_X64_MSR_SIEFP, page_register(SIMP_GPA))
    synic.write_msr(HV_X64_MSR_SIEFP, 0)
    synic.write_msr(HV_X64_MSR_SIMP, 0)

    assert page(memory, SIMP_GPA) == b"\x03" * PAGE_SIZE


def test_reset_lifts_and_zeroes(synic: Synic, memory: GuestMemory) -> None:
    """After a reset RAM is as it was, registers have their reset values, and the pages are zero anew."""
    enable(synic)
    synic.write_slot(SINT, HvMessage(1, b"old").pack())
    set_flag(synic, 7)

    synic.reset()
    after = page(memory, SIMP_GPA), page(memory, SIEFP_GPA)
    enable(synic)

    assert after == (b"\x03" * PAGE_SIZE, b"\x05" * PAGE_SIZE)
    assert page(memory, SIMP_GPA) == page(memory, SIEFP_GPA) == bytes(PAGE_SIZE)
    synic.reset()
    assert synic.read_msr(HV_X64_MSR_SINT0 + SINT) == 0x10000
    assert synic.read_msr(HV_X64_MSR_SCONTROL) == 0


# -- slots and flags ------------------------------------------------------------------------------


def test_pages_count_only_with_the_synic_on(synic: Synic) -> None:
    """Messages and events need SCONTROL and their own page."""
    seen = [(synic.messages_enabled(), synic.events_enabled())]
    for msr, value in (
        (HV_X64_MSR_SIMP, page_register(SIMP_GPA)),
        (HV_X64_MSR_SCONTROL, 1),
        (HV_X64_MSR_SIEFP, page_register(SIEFP_GPA)),
        (HV_X64_MSR_SCONTROL, 0),
    ):
        synic.write_msr(msr, value)
        seen.append((synic.messages_enabled(), synic.events_enabled()))

    assert seen == [(False, False), (False, False), (True, False), (True, True), (False, False)]


def test_message_lies_in_the_slot_of_its_sint(synic: Synic, memory: GuestMemory) -> None:
    """SINT 2 is bytes 0x200 to 0x2FF; a short message leaves the rest of the slot alone."""
    enable(synic)
    memory.write(SIMP_GPA + 0x200, b"\xaa" * 256)
    memory.write(SIMP_GPA + 0x200, bytes(4))
    synic.write_slot(SINT, HvMessage(1, b"payload!", sender=9).pack()[:24])

    assert synic.slot_type(SINT) == 1
    assert memory.read(SIMP_GPA + 0x200, 24) == bytes.fromhex("01000000 08000000 0900000000000000") + b"payload!"
    assert memory.read(SIMP_GPA + 0x218, 232) == b"\xaa" * 232
    assert memory.read(SIMP_GPA + 0x1FC, 4) == memory.read(SIMP_GPA + 0x300, 4) == bytes(4)


def test_pending_changes_one_bit(synic: Synic, memory: GuestMemory) -> None:
    """Setting msg_pending leaves type, size and the other flags of a resident message alone."""
    enable(synic)
    before = bytearray(b"\x01\0\0\0\x08\xf0\0\0" + b"\x55" * 248)
    memory.write(SIMP_GPA + 0x200, before)

    synic.set_pending(SINT)

    before[5] = 0xF1
    assert memory.read(SIMP_GPA + 0x200, 256) == before


@pytest.mark.parametrize(
    ("flag", "offset", "bit"), [(0, 0x200, 1), (1, 0x200, 2), (2047, 0x2FF, 0x80), (1000, 0x27D, 1)]
)
def test_flag_is_one_bit_of_its_sint(synic: Synic, memory: GuestMemory, flag: int, offset: int, bit: int) -> None:
    """Flag n of SINT 2 is bit n % 8 of byte 0x200 + n // 8; only its first setting is news."""
    enable(synic)

    assert (set_flag(synic, flag), set_flag(synic, flag)) == (True, False)
    content = page(memory, SIEFP_GPA)
    assert content[offset] == bit
    assert content.count(0) == PAGE_SIZE - 1


@pytest.mark.parametrize("flag", [-1, 2048])
def test_flag_beyond_the_page_is_our_mistake(synic: Synic, flag: int) -> None:
    """Flags of a SINT are 0 to 2047."""
    enable(synic)

    with pytest.raises(AssertionError):
        synic.flag_cell(SINT, flag)
