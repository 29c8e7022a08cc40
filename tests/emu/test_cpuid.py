"""The hypervisor's CPUID leaves, as a guest checks them."""

from __future__ import annotations

import struct

from emu.cpuid import leaves
from emu.layout import CPUID_ENTRIES


def test_guest_recognizes_the_hypervisor() -> None:
    """Vendor and interface read as text; the highest leaf is the last one there is."""
    rows = {leaf: values for leaf, *values in leaves()}

    assert struct.pack("<III", *rows[0x40000000][1:]) == b"Microsoft Hv"
    assert struct.pack("<I", rows[0x40000001][0]) == b"Hv#1"
    assert rows[0x40000000][0] == max(rows) == 0x40000005


def test_leaves_come_without_gaps_and_fit_the_machine_page() -> None:
    """Leaf after leaf, in order, and no more than the page has entries."""
    numbers = [leaf for leaf, *_values in leaves()]

    assert numbers == list(range(0x40000000, 0x40000006))
    assert len(numbers) <= CPUID_ENTRIES


def test_features_are_those_that_exist() -> None:
    """SynIC, timers, hypercalls, VP index, reference time, reset, post and signal; no direct mode."""
    eax, ebx, _ecx, edx = {leaf: values for leaf, *values in leaves()}[0x40000003]

    assert [bit for bit in range(32) if eax >> bit & 1] == [1, 2, 3, 5, 6, 7]
    assert [bit for bit in range(32) if ebx >> bit & 1] == [4, 5]
    assert [bit for bit in range(32) if edx >> bit & 1] == [17]


def test_guest_is_told_who_ends_interrupts() -> None:
    """Hint bit 9 says that AutoEOI is deprecated: the guest writes EOI itself."""
    hints = [
        {leaf: values for leaf, *values in leaves(deprecate_auto_eoi=deprecate)}[0x40000004][0]
        for deprecate in (True, False)
    ]

    assert hints == [1 << 9, 0]
