"""Ring packets: the descriptor, the headers of the types that have one, the pipe header of the payload.

In the ring: descriptor (16), the type's own header, payload from offset8 * 8, zeros up to len8 * 8,
then a trailer of 8 bytes (the packet's own start << 32) that len8 does not count. Lengths count bytes,
except in the two fields that end in 8. The padding cannot be told from the payload: a payload has any
number of bytes when it is written, and a multiple of 8 when it is read.

`parse_...` functions take a packet's own copy of its bytes, and raise ProtocolViolation for what the
peer made of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from struct import Struct
from typing import Final

from emu.errors import ProtocolViolation
from emu.values import valueclass
from emu.wire.gpa_range import GpaRange, pack_gpa_ranges, parse_gpa_ranges

VM_PKT_INVALID: Final = 0x0
VM_PKT_SYNCH: Final = 0x1
VM_PKT_ADD_XFER_PAGESET: Final = 0x2
VM_PKT_RM_XFER_PAGESET: Final = 0x3
VM_PKT_ESTABLISH_GPADL: Final = 0x4
VM_PKT_TEARDOWN_GPADL: Final = 0x5
VM_PKT_DATA_INBAND: Final = 0x6
VM_PKT_DATA_USING_XFER_PAGES: Final = 0x7
VM_PKT_DATA_USING_GPADL: Final = 0x8
VM_PKT_DATA_USING_GPA_DIRECT: Final = 0x9
VM_PKT_CANCEL_REQUEST: Final = 0xA
VM_PKT_COMP: Final = 0xB
VM_PKT_DATA_USING_ADDITIONAL_PKT: Final = 0xC
VM_PKT_ADDITIONAL_DATA: Final = 0xD

COMPLETION_REQUESTED: Final = 0x1
"""The only flag there is (`VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED`)."""

DESCRIPTOR: Final = Struct("<HHHHQ")
"""`vmpacket_descriptor`: type, offset8, len8, flags, trans_id."""
DESCRIPTOR_SIZE: Final = DESCRIPTOR.size
TRAILER: Final = Struct("<II")
"""Zero, and the write index before the packet."""
TRAILER_SIZE: Final = TRAILER.size
MAX_PACKET_SIZE: Final = 0xFFFF * 8
"""What len8 can say: 524,280 bytes, trailer excluded."""
DEFAULT_MAX_PKT_SIZE: Final = 4096

GPA_DIRECT: Final = Struct("<II")
"""`vmdata_gpa_direct` behind the descriptor: reserved, range_cnt; then the ranges."""
XFER_PAGES: Final = Struct("<HBxI")
"""`vmtransfer_page_packet_header` behind the descriptor: xfer_pageset_id, sender_owns_set, range_cnt."""
XFER_PAGE_RANGE: Final = Struct("<II")
"""`vmtransfer_page_range`: byte_count, byte_offset."""
PIPE_HEADER: Final = Struct("<II")
"""`vmpipe_proto_header`: pkt_type, data_size. The integration services call it `vmbuspipe_hdr`."""

MAX_PAGE_BUFFER_COUNT: Final = 32
MAX_PIPE_DATA_PAYLOAD: Final = 16_384


class PacketType(IntEnum):
    """The names of the `VM_PKT_` numbers, for people; hot code compares the numbers."""

    INVALID = VM_PKT_INVALID
    SYNCH = VM_PKT_SYNCH
    ADD_XFER_PAGESET = VM_PKT_ADD_XFER_PAGESET
    RM_XFER_PAGESET = VM_PKT_RM_XFER_PAGESET
    ESTABLISH_GPADL = VM_PKT_ESTABLISH_GPADL
    TEARDOWN_GPADL = VM_PKT_TEARDOWN_GPADL
    DATA_INBAND = VM_PKT_DATA_INBAND
    DATA_USING_XFER_PAGES = VM_PKT_DATA_USING_XFER_PAGES
    DATA_USING_GPADL = VM_PKT_DATA_USING_GPADL
    DATA_USING_GPA_DIRECT = VM_PKT_DATA_USING_GPA_DIRECT
    CANCEL_REQUEST = VM_PKT_CANCEL_REQUEST
    COMP = VM_PKT_COMP
    DATA_USING_ADDITIONAL_PKT = VM_PKT_DATA_USING_ADDITIONAL_PKT
    ADDITIONAL_DATA = VM_PKT_ADDITIONAL_DATA


CURRENT_TYPES: Final = frozenset(
    (VM_PKT_DATA_INBAND, VM_PKT_DATA_USING_XFER_PAGES, VM_PKT_DATA_USING_GPA_DIRECT, VM_PKT_COMP)
)
"""What hosts and guests still send; OpenVMM takes no other."""


class PipePacketType(IntEnum):
    """`pkt_type` of a pipe header."""

    DATA = 1
    PARTIAL = 2
    SETUP_GPA_DIRECT = 3
    TEARDOWN_GPA_DIRECT = 4


@valueclass()
class Packet:
    """One packet out of a ring, taken apart: `header` lies between descriptor and payload."""

    type: int
    flags: int
    trans_id: int
    header: bytes
    payload: bytes


@valueclass()
class XferPages:
    """The header of DATA_USING_XFER_PAGES: `ranges` are (byte_count, byte_offset) in the page set."""

    xfer_pageset_id: int
    sender_owns_set: int
    ranges: tuple[tuple[int, int], ...]

    def pack(self) -> bytes:
        """Write what stands between descriptor and payload."""
        fixed = XFER_PAGES.pack(self.xfer_pageset_id, self.sender_owns_set, len(self.ranges))
        return fixed + b"".join([XFER_PAGE_RANGE.pack(*one) for one in self.ranges])


def aligned(size: int) -> int:
    """Round up to a multiple of 8."""
    return size + 7 & ~7


def ring_bytes(payload_size: int, header_size: int = 0) -> int:
    """Bytes that a packet takes in the ring: descriptor, header, payload, padding and trailer."""
    return DESCRIPTOR_SIZE + aligned(header_size) + aligned(payload_size) + TRAILER_SIZE


def pack_packet(
    payload: bytes,
    trans_id: int = 0,
    flags: int = 0,
    packet_type: int = VM_PKT_DATA_INBAND,
    header: bytes = b"",
) -> bytes:
    """Write a packet with its padding and without its trailer."""
    offset = DESCRIPTOR_SIZE + aligned(len(header))
    length = offset + aligned(len(payload))
    assert length <= MAX_PACKET_SIZE, length
    descriptor = DESCRIPTOR.pack(packet_type, offset // 8, length // 8, flags, trans_id)
    return (descriptor + header).ljust(offset, b"\0") + payload + bytes(length - offset - len(payload))


def pack_trailer(write_index: int) -> bytes:
    """Write the 8 bytes behind a packet that began at `write_index`."""
    return TRAILER.pack(0, write_index)


def pack_gpa_direct(ranges: Sequence[GpaRange]) -> bytes:
    """Write the header of DATA_USING_GPA_DIRECT: what stands between descriptor and payload."""
    return GPA_DIRECT.pack(0, len(ranges)) + pack_gpa_ranges(ranges)


def check_descriptor(packet_type: int, offset8: int, len8: int, flags: int, available: int) -> None:
    """Refuse a descriptor that no honest peer writes.

    `available` is how many bytes the ring has from the descriptor on, trailer included. Raises
    ProtocolViolation with the rule `packet-type`, `packet-flags`, `packet-length` or `packet-offset`.
    """
    if packet_type not in CURRENT_TYPES:
        raise ProtocolViolation(f"packet of type {packet_type}", rule="packet-type", field="type", value=packet_type)
    if flags & ~COMPLETION_REQUESTED:
        raise ProtocolViolation(f"packet with flags {flags:#x}", rule="packet-flags", field="flags", value=flags)
    if len8 * 8 < DESCRIPTOR_SIZE or len8 * 8 + TRAILER_SIZE > available:
        raise ProtocolViolation(
            f"packet of {len8 * 8} bytes and a trailer, in {available} bytes",
            rule="packet-length",
            field="len8",
            value=len8,
        )
    if offset8 * 8 < DESCRIPTOR_SIZE or offset8 > len8:
        raise ProtocolViolation(
            f"payload at byte {offset8 * 8} of a packet of {len8 * 8}",
            rule="packet-offset",
            field="offset8",
            value=offset8,
        )


def parse_packet(data: bytes) -> Packet:
    """Take apart the bytes of one packet and its trailer (which is not looked at). Raises as `check_descriptor`."""
    if len(data) < DESCRIPTOR_SIZE + TRAILER_SIZE:
        raise ProtocolViolation(
            f"{len(data)} bytes are no packet", rule="packet-length", field="len8", value=len(data) // 8
        )
    packet_type, offset8, len8, flags, trans_id = DESCRIPTOR.unpack_from(data)
    check_descriptor(packet_type, offset8, len8, flags, len(data))
    offset = offset8 * 8
    return Packet(packet_type, flags, trans_id, data[DESCRIPTOR_SIZE:offset], data[offset : len8 * 8])


def parse_gpa_direct(header: bytes) -> tuple[GpaRange, ...]:
    """Read the header of DATA_USING_GPA_DIRECT.

    Raises ProtocolViolation with the rule `packet-header-short`, `packet-range-count` or one of
    `parse_gpa_ranges`.
    """
    if len(header) < GPA_DIRECT.size:
        raise _header_short("GPA-direct", header, GPA_DIRECT.size)
    _reserved, range_cnt = GPA_DIRECT.unpack_from(header)
    if range_cnt == 0:
        raise ProtocolViolation(
            "GPA-direct packet without a range", rule="packet-range-count", field="range_cnt", value=0
        )
    ranges, _end = parse_gpa_ranges(header, range_cnt, GPA_DIRECT.size)
    return ranges


def parse_xfer_pages(header: bytes) -> XferPages:
    """Read the header of DATA_USING_XFER_PAGES; whether its ranges lie in the page set, the driver checks.

    Raises ProtocolViolation with the rule `packet-header-short` or `packet-range-count`.
    """
    if len(header) < XFER_PAGES.size:
        raise _header_short("transfer-page", header, XFER_PAGES.size)
    xfer_pageset_id, sender_owns_set, range_cnt = XFER_PAGES.unpack_from(header)
    end = XFER_PAGES.size + XFER_PAGE_RANGE.size * range_cnt
    if range_cnt == 0 or end > len(header):
        raise ProtocolViolation(
            f"{range_cnt} transfer-page ranges in a header of {len(header)} bytes",
            rule="packet-range-count",
            field="range_cnt",
            value=range_cnt,
        )
    ranges = tuple(XFER_PAGE_RANGE.iter_unpack(header[XFER_PAGES.size : end]))
    return XferPages(xfer_pageset_id, sender_owns_set, ranges)


def pack_pipe(data: bytes, pkt_type: int = PipePacketType.DATA) -> bytes:
    """Wrap the payload of a pipe-mode channel."""
    assert len(data) <= MAX_PIPE_DATA_PAYLOAD, len(data)
    return PIPE_HEADER.pack(pkt_type, len(data)) + data


def parse_pipe(payload: bytes) -> tuple[int, bytes]:
    """Unwrap a pipe-mode payload: its type, and the bytes that `data_size` says.

    Raises ProtocolViolation with the rule `pipe-header-short` or `pipe-data-size`.
    """
    if len(payload) < PIPE_HEADER.size:
        raise ProtocolViolation(
            f"pipe payload of {len(payload)} bytes",
            rule="pipe-header-short",
            field="payload_size",
            value=len(payload),
        )
    pkt_type, data_size = PIPE_HEADER.unpack_from(payload)
    if data_size > min(len(payload) - PIPE_HEADER.size, MAX_PIPE_DATA_PAYLOAD):
        raise ProtocolViolation(
            f"pipe data of {data_size} bytes in a payload of {len(payload)}",
            rule="pipe-data-size",
            field="data_size",
            value=data_size,
        )
    return pkt_type, payload[PIPE_HEADER.size : PIPE_HEADER.size + data_size]


def _header_short(what: str, header: bytes, needed: int) -> ProtocolViolation:
    """Say that a packet's own header does not fit before its payload."""
    return ProtocolViolation(
        f"{what} header needs {needed} bytes, has {len(header)}",
        rule="packet-header-short",
        field="offset8",
        value=(DESCRIPTOR_SIZE + len(header)) // 8,
    )
