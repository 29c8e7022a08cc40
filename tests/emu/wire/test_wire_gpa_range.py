"""GPA ranges: bytes to pages, written, read, cut, and wrong."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu.errors import ProtocolViolation
from emu.wire.gpa_range import GpaRange, pack_gpa_ranges, parse_gpa_ranges, pfn_count


@st.composite
def gpa_ranges(draw: st.DrawFn) -> GpaRange:
    """A range of up to a few pages, with just the PFNs that it touches."""
    byte_count = draw(st.integers(1, 20_000))
    byte_offset = draw(st.integers(0, 4095))
    pages = pfn_count(byte_count, byte_offset)
    pfns = draw(st.lists(st.integers(0, (1 << 64) - 1), min_size=pages, max_size=pages))
    return GpaRange(byte_count, byte_offset, tuple(pfns))


@pytest.mark.parametrize(
    ("byte_count", "byte_offset", "pages"),
    [(1, 0, 1), (4096, 0, 1), (4097, 0, 2), (1, 4095, 1), (2, 4095, 2), (4096, 1, 2), (8192, 4095, 3)],
)
def test_a_range_has_the_pages_that_its_bytes_touch(byte_count: int, byte_offset: int, pages: int) -> None:
    """(offset + count + 4095) >> 12."""
    assert pfn_count(byte_count, byte_offset) == pages


@given(st.lists(gpa_ranges(), max_size=4), st.binary(max_size=16), st.integers(0, 5))
@settings(deadline=None)
def test_ranges_survive_a_round_trip(ranges: list[GpaRange], behind: bytes, start: int) -> None:
    """What was written is what is read, from any byte on, and the end is where the next thing begins."""
    data = bytes(start) + pack_gpa_ranges(ranges)

    assert parse_gpa_ranges(data + behind, len(ranges), start) == (tuple(ranges), len(data))


def test_ranges_cut_at_any_length_are_refused() -> None:
    """Neither a range nor a page may be missing."""
    data = pack_gpa_ranges([GpaRange(4096, 0, (1,)), GpaRange(5000, 4000, (2, 3, 4))])

    for size in range(len(data)):
        with pytest.raises(ProtocolViolation) as refused:
            parse_gpa_ranges(data[:size], 2)
        assert refused.value.rule == "gpa-range-truncated"


@pytest.mark.parametrize(
    ("text", "rule", "field", "value"),
    [
        ("00000000 00000000 0100000000000000", "gpa-range-empty", "byte_count", 0),
        ("01000000 00100000 0100000000000000", "gpa-range-offset", "byte_offset", 4096),
        ("01000000 ffffffff 0100000000000000", "gpa-range-offset", "byte_offset", 0xFFFFFFFF),
        ("01100000 00000000 0100000000000000", "gpa-range-truncated", "byte_count", 4097),
        ("ffffffff ff0f0000 0100000000000000", "gpa-range-truncated", "byte_count", 0xFFFFFFFF),
    ],
)
def test_a_wrong_range_is_refused(text: str, rule: str, field: str, value: int) -> None:
    """No bytes, an offset beyond the page, fewer pages than bytes: each names rule, field and value."""
    with pytest.raises(ProtocolViolation) as refused:
        parse_gpa_ranges(bytes.fromhex(text), 1)

    assert (refused.value.rule, refused.value.field, refused.value.value) == (rule, field, value)
