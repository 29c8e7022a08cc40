"""Ring packets byte for byte, and what a hostile peer may make of them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu.errors import ProtocolViolation
from emu.wire.gpa_range import GpaRange
from emu.wire.packets import (
    COMPLETION_REQUESTED,
    CURRENT_TYPES,
    DESCRIPTOR,
    GPA_DIRECT,
    MAX_PACKET_SIZE,
    VM_PKT_COMP,
    VM_PKT_DATA_INBAND,
    VM_PKT_DATA_USING_GPA_DIRECT,
    VM_PKT_DATA_USING_XFER_PAGES,
    XFER_PAGES,
    Packet,
    PacketType,
    XferPages,
    pack_gpa_direct,
    pack_packet,
    pack_pipe,
    pack_trailer,
    parse_gpa_direct,
    parse_packet,
    parse_pipe,
    parse_xfer_pages,
    ring_bytes,
)

WORKED = bytes.fromhex("0600 0200 0300 0100 0700000000000000 0102030405060708")
TRAILER = bytes.fromhex("0000000040000000")


def test_worked_packet_comes_out() -> None:
    """In-band, 8 bytes, id 7, completion requested, written at 0x40: the reference's bytes."""
    assert pack_packet(bytes(range(1, 9)), trans_id=7, flags=COMPLETION_REQUESTED) == WORKED
    assert pack_trailer(0x40) == TRAILER
    assert parse_packet(WORKED + TRAILER) == Packet(VM_PKT_DATA_INBAND, 1, 7, b"", bytes(range(1, 9)))


def test_payload_is_padded_to_8_bytes() -> None:
    """The reader cannot tell padding from payload."""
    packet = pack_packet(b"abc", packet_type=VM_PKT_COMP)

    assert packet.hex() == "0b000200030000000000000000000000" + b"abc\0\0\0\0\0".hex()
    assert parse_packet(packet + pack_trailer(0)).payload == b"abc\0\0\0\0\0"


@given(
    st.binary(max_size=300),
    st.integers(0, (1 << 64) - 1),
    st.sampled_from((0, COMPLETION_REQUESTED)),
    st.sampled_from(sorted(CURRENT_TYPES)),
    st.binary(max_size=40).map(lambda header: header[: len(header) & ~7]),
)
@settings(deadline=None)
def test_packet_survives_a_round_trip(payload: bytes, trans_id: int, flags: int, kind: int, header: bytes) -> None:
    """Type, flags, id and header come back, and the payload with its padding; the size is as computed."""
    packet = pack_packet(payload, trans_id, flags, kind, header)
    padded = payload.ljust((len(payload) + 7) // 8 * 8, b"\0")

    assert parse_packet(packet + pack_trailer(0)) == Packet(kind, flags, trans_id, header, padded)
    assert ring_bytes(len(payload), len(header)) == len(packet) + 8


def test_largest_packet_is_what_len8_can_say() -> None:
    """524,280 bytes with the descriptor; one byte of payload more does not fit the field."""
    largest = pack_packet(bytes(MAX_PACKET_SIZE - 16))

    assert len(largest) == MAX_PACKET_SIZE == 524_280
    with pytest.raises(AssertionError):
        pack_packet(bytes(MAX_PACKET_SIZE - 15))


@pytest.mark.parametrize(
    ("descriptor", "rule", "field", "value"),
    [
        ((0, 2, 3, 0, 0), "packet-type", "type", 0),
        ((8, 2, 3, 0, 0), "packet-type", "type", 8),
        ((0xFFFF, 2, 3, 0, 0), "packet-type", "type", 0xFFFF),
        ((6, 2, 3, 2, 0), "packet-flags", "flags", 2),
        ((6, 2, 3, 0x8001, 0), "packet-flags", "flags", 0x8001),
        ((6, 2, 0, 0, 0), "packet-length", "len8", 0),
        ((6, 2, 1, 0, 0), "packet-length", "len8", 1),
        ((6, 2, 4, 0, 0), "packet-length", "len8", 4),
        ((6, 2, 0xFFFF, 0, 0), "packet-length", "len8", 0xFFFF),
        ((6, 0, 3, 0, 0), "packet-offset", "offset8", 0),
        ((6, 1, 3, 0, 0), "packet-offset", "offset8", 1),
        ((6, 4, 3, 0, 0), "packet-offset", "offset8", 4),
        ((6, 0xFFFF, 3, 0, 0), "packet-offset", "offset8", 0xFFFF),
    ],
)
def test_descriptor_that_no_honest_peer_writes_is_refused(
    descriptor: tuple[int, int, int, int, int], rule: str, field: str, value: int
) -> None:
    """In 32 bytes with the trailer, each nonsense names its rule, its field and what it held."""
    with pytest.raises(ProtocolViolation) as refused:
        parse_packet(DESCRIPTOR.pack(*descriptor) + bytes(16))

    assert (refused.value.rule, refused.value.field, refused.value.value) == (rule, field, value)


def test_payload_may_be_empty() -> None:
    """offset8 = len8 = 2: a descriptor and a trailer."""
    assert parse_packet(DESCRIPTOR.pack(6, 2, 2, 0, 9) + bytes(8)) == Packet(6, 0, 9, b"", b"")


def test_packet_cut_at_any_length_is_refused() -> None:
    """There must be room for the whole packet and its trailer."""
    whole = WORKED + TRAILER

    for size in range(len(whole)):
        with pytest.raises(ProtocolViolation):
            parse_packet(whole[:size])


@given(st.binary(max_size=64))
@settings(deadline=None)
def test_noise_is_a_packet_or_a_violation(data: bytes) -> None:
    """No bytes make a parser raise anything but ProtocolViolation."""
    for parser in (parse_packet, parse_gpa_direct, parse_xfer_pages, parse_pipe):
        try:
            parser(data)
        except ProtocolViolation as refused:
            assert refused.rule and refused.field


def test_gpa_direct_is_written_as_spelled_out() -> None:
    """Two ranges, of one and of two pages, between descriptor and payload."""
    ranges = (GpaRange(0x200, 0x10, (0x123,)), GpaRange(0x1001, 0xFFF, (0x200, 0x300)))
    header = pack_gpa_direct(ranges)
    packet = pack_packet(b"8 bytes.", 1, COMPLETION_REQUESTED, VM_PKT_DATA_USING_GPA_DIRECT, header)

    assert header.hex() == (
        "00000000" "02000000"
        "00020000" "10000000" "2301000000000000"
        "01100000" "ff0f0000" "0002000000000000" "0003000000000000"
    )  # fmt: skip
    assert packet[:16].hex() == "09000800090001000100000000000000"
    assert parse_gpa_direct(parse_packet(packet + bytes(8)).header) == ranges


@pytest.mark.parametrize(
    ("header", "rule"),
    [
        (b"", "packet-header-short"),
        (bytes(7), "packet-header-short"),
        (GPA_DIRECT.pack(0, 0), "packet-range-count"),
        (GPA_DIRECT.pack(0, 1), "gpa-range-truncated"),
        (
            GPA_DIRECT.pack(0, 0xFFFFFFFF) + bytes.fromhex("0100000000000000") + bytes(8),
            "gpa-range-truncated",
        ),
        (GPA_DIRECT.pack(0, 1) + bytes(16), "gpa-range-empty"),
        (GPA_DIRECT.pack(0, 1) + bytes.fromhex("0100000000100000") + bytes(8), "gpa-range-offset"),
        (GPA_DIRECT.pack(0, 1) + bytes.fromhex("ffffffff00000000") + bytes(8), "gpa-range-truncated"),
    ],
)
def test_gpa_direct_with_wrong_ranges_is_refused(header: bytes, rule: str) -> None:
    """Too short a header, no range, more ranges or pages than there are, an empty range, a wild offset."""
    with pytest.raises(ProtocolViolation) as refused:
        parse_gpa_direct(header)

    assert refused.value.rule == rule


def test_xfer_pages_are_written_as_spelled_out() -> None:
    """netvsc's receive buffer: page set 0xCAFE, two ranges."""
    pages = XferPages(0xCAFE, 0, ((100, 0), (60, 0x800)))
    packet = pack_packet(b"payload.", 5, 1, VM_PKT_DATA_USING_XFER_PAGES, pages.pack())

    assert pages.pack().hex() == "feca00000200000064000000000000003c00000000080000"
    assert parse_xfer_pages(parse_packet(packet + bytes(8)).header) == pages


@pytest.mark.parametrize(
    ("header", "rule"),
    [
        (b"", "packet-header-short"),
        (bytes(7), "packet-header-short"),
        (XFER_PAGES.pack(0xCAFE, 0, 0), "packet-range-count"),
        (XFER_PAGES.pack(0xCAFE, 0, 1), "packet-range-count"),
        (XFER_PAGES.pack(0xCAFE, 0, 2) + bytes(15), "packet-range-count"),
        (XFER_PAGES.pack(0xCAFE, 0, 0xFFFFFFFF) + bytes(16), "packet-range-count"),
    ],
)
def test_xfer_pages_with_wrong_counts_are_refused(header: bytes, rule: str) -> None:
    """Too short a header, no range, or more ranges than there are."""
    with pytest.raises(ProtocolViolation) as refused:
        parse_xfer_pages(header)

    assert refused.value.rule == rule


def test_pipe_header_wraps_a_payload() -> None:
    """Type 1, the size, the bytes; what follows them is padding."""
    wrapped = pack_pipe(b"hello")

    assert wrapped.hex() == "0100000005000000" + b"hello".hex()
    assert parse_pipe(wrapped.ljust(16, b"\0")) == (1, b"hello")


@pytest.mark.parametrize(
    ("payload", "rule"),
    [
        (b"", "pipe-header-short"),
        (bytes(7), "pipe-header-short"),
        (bytes.fromhex("0100000001000000"), "pipe-data-size"),
        (bytes.fromhex("01000000ffffffff") + bytes(8), "pipe-data-size"),
        (bytes.fromhex("0100000001400000") + bytes(16_385), "pipe-data-size"),
    ],
)
def test_pipe_data_that_is_not_there_is_refused(payload: bytes, rule: str) -> None:
    """No header, more data than the packet has, or more than a pipe may carry."""
    with pytest.raises(ProtocolViolation) as refused:
        parse_pipe(payload)

    assert refused.value.rule == rule


def test_packet_types_have_their_numbers() -> None:
    """0 to 0xD without a gap."""
    assert [kind.value for kind in PacketType] == list(range(14))
