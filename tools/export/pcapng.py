"""The `pcapng` format: control messages and what was published in rings, for Wireshark and tshark.

    frame                one for each            direction   bytes
    control message      post seen by the host   outbound    the message as it was posted
                         slot_write              inbound     the message as it stands in the slot
    ring                 ring_publish            by the side the first bytes that became the reader's

Directions are the guest's. The link type is Exported PDU (252), whose tag names the dissector (`vmbus` or
`vmbus_ring`, tools/lua/vmbus.lua), so nothing has to be set. Messages are one interface, each channel is another.
Where bytes were not recorded a message has its header, a ring frame nothing, and the length on the wire says how much
there was. Comments say who, where and how, and of a message the relid, which is known without its bytes, too.

Blocks: draft-ietf-opsawg-pcapng; tags: Wireshark's wsutil/exported_pdu_tlvs.h.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from struct import pack
from typing import Final

from emu.control import slot_of
from emu.recording import Recording, TraceRecord
from emu.wire.hypercalls import HvStatus
from emu.wire.messages import HEADER, MESSAGES, MessageType
from emu.wire.synic import HVMSG_CHANNEL_MESSAGE
from tools.export.captures import Capture, captures
from tools.export.rings import SIDES, TO_HOST
from tools.invariants import is_host
from tools.nouns import counted

LINKTYPE_WIRESHARK_UPPER_PDU: Final = 252
SNAP_BYTES: Final = 0
"""No limit: the recorder has its own."""
_SECTION, _INTERFACE, _PACKET = 0x0A0D0D0A, 1, 6
_BYTE_ORDER: Final = 0x1A2B3C4D
_OPT_END, _OPT_COMMENT = 0, 1
_SHB_USERAPPL: Final = 4
_IF_NAME, _IF_DESCRIPTION, _IF_TSRESOL = 2, 3, 9
_NANOSECONDS: Final = b"\x09"
_EPB_FLAGS: Final = 2
_INBOUND, _OUTBOUND = 1, 2
_TAG_DISSECTOR_NAME: Final = 12
_WANTED: Final = frozenset({"post", "slot_write", "ring_publish"})
_SYNIC: Final = "synic"


def pcapng(recording: Recording) -> Iterator[bytes]:
    """A section, and each frame behind the interface that it belongs to."""
    offset_ns = int(recording.head.get("began_unix_ns", 0)) - int(recording.head.get("began_ns", 0))
    yield section_block(recording.machine, recording.dropped, recording.seed)
    interfaces: dict[str, int] = {}
    relids = relids_of(recording.records())
    for capture in captures(recording.records(), _WANTED):
        record = capture.record
        frame = frame_of(capture, relids.get((record.event.name, record.arguments.get("serial", 0)), 0))
        if frame is None:
            continue
        if frame.interface not in interfaces:
            interfaces[frame.interface] = len(interfaces)
            yield interface_block(frame.interface)
        yield frame.block(interfaces[frame.interface], record.t_ns + offset_ns)


class Frame:
    """One frame: where it was seen, which way it went, who reads it, its bytes, how many there were, remarks."""

    def __init__(
        self, interface: str, direction: int, dissector: str, data: bytes, length: int, comments: list[str]
    ) -> None:
        self.interface = interface
        self.direction = direction
        self.dissector = dissector
        self.data = data
        self.length = max(length, len(data))
        self.comments = comments

    def block(self, interface_id: int, unix_ns: int) -> bytes:
        """An Enhanced Packet Block."""
        tags = _exported_pdu_tags(self.dissector)
        captured = tags + self.data
        head = pack("<IIIII", interface_id, unix_ns >> 32, unix_ns & 0xFFFFFFFF, len(captured), len(tags) + self.length)
        options = [(_OPT_COMMENT, comment.encode()) for comment in self.comments]
        options.append((_EPB_FLAGS, pack("<I", self.direction)))
        return _block(_PACKET, head + _padded(captured) + _options(options))


def relids_of(records: Iterable[TraceRecord]) -> dict[tuple[str, int], int]:
    """By the event that is a message's frame, and its serial: the channel that it is about, 0 for none.

    The host says so when it posts a message, and when it takes one of the guest's; a guest of ours, as it posts.
    """
    posting: dict[int, int] = {}  # by actor
    found: dict[tuple[str, int], int] = {}
    for record in records:
        name = record.event.name
        if name not in ("message_post", "message_take", "post_begin", "post"):
            continue
        arguments = record.arguments
        relid, serial = arguments.get("relid", 0), arguments.get("serial", 0)
        if name == "post_begin":
            posting[record.actor.slot] = relid
        elif name == "post" and is_host(record):
            relid = posting.pop(slot_of(arguments.get("claimer", 0)), 0)
        if serial:  # a post that was refused has none
            found["slot_write" if name == "message_post" else "post", serial] = relid
    return found


def frame_of(capture: Capture, relid: int = 0) -> Frame | None:
    """The frame of a record, with what a message is about; None for a guest's own word of a post: the host has one."""
    record, arguments = capture.record, capture.record.arguments
    if record.event.name == "ring_publish":
        return _ring_frame(capture, arguments)
    if record.event.name == "slot_write":
        return _slot_frame(capture, arguments, relid)
    if record.context != "HOST":
        return None
    return _post_frame(capture, arguments, relid)


def _post_frame(capture: Capture, arguments: dict[str, int], relid: int) -> Frame:
    """A message that the guest posts, and what the hypercall said."""
    msgtype, status = arguments["msgtype"], arguments["status"]
    data = HEADER.pack(msgtype, 0)[: arguments["size"]] if capture.data is None else capture.data
    comments = [*_who(capture.record, arguments, relid), f"connection_id {arguments['connection_id']:#x}"]
    comments.append(f"status {_status(status)}")
    return Frame(_SYNIC, _OUTBOUND, "vmbus", data, arguments["size"], [", ".join(comments)])


def _slot_frame(capture: Capture, arguments: dict[str, int], relid: int) -> Frame:
    """A message that was written into a slot; one that is no channel message is data to Wireshark."""
    message_type, msgtype = arguments["message_type"], arguments["msgtype"]
    channel = message_type == HVMSG_CHANNEL_MESSAGE
    data = HEADER.pack(msgtype, 0) if capture.data is None and channel else capture.data or b""
    length = len(data)
    if capture.data is None and channel and msgtype in MESSAGES:
        length = MESSAGES[MessageType(msgtype)].least_size
    comments = [*_who(capture.record, arguments, relid), f"sint {arguments['sint']}", f"queued {arguments['queued']}"]
    if not channel:
        comments.append(f"SynIC message type {message_type:#x}")
    return Frame(_SYNIC, _INBOUND, "vmbus" if channel else "data", data, length, [", ".join(comments)])


def _ring_frame(capture: Capture, arguments: dict[str, int]) -> Frame:
    """What one publish made the reader's."""
    relid, side = arguments["relid"], arguments["side"]
    comments = [*_who(capture.record, arguments), f"relid {relid} {SIDES[side & 1]}"]
    comments.append(f"write_index {arguments['write_index']}")
    direction = _OUTBOUND if side == TO_HOST else _INBOUND
    data = capture.data or b""
    return Frame(f"channel {relid}", direction, "vmbus_ring", data, arguments.get("bytes", 0), [", ".join(comments)])


def _who(record: TraceRecord, arguments: dict[str, int], relid: int = 0) -> Iterator[str]:
    """Who recorded it, on which processor or for which; the message's serial, and the channel that it is about."""
    yield f"{record.actor.name} seq {record.seq}"
    if record.vp is not None:
        yield f"vp {record.vp}"
    if "position" in arguments:
        yield f"position {arguments['position']}"
    if arguments.get("serial"):
        yield f"serial {arguments['serial']}"
    if relid:
        yield f"relid {relid}"


def _status(status: int) -> str:
    try:
        return HvStatus(status).name
    except ValueError:
        return f"{status:#x}"


# -- blocks ---------------------------------------------------------------------------------------------


def section_block(machine: str, dropped: int, seed: int | None = None) -> bytes:
    """The Section Header Block: who wrote it, of which machine, its seed, and how many records are missing."""
    comment = f"machine {machine or 'unknown'}"
    if seed is not None:
        comment += f", seed {seed}"
    if dropped:
        lost = counted(dropped, "record was overwritten before it was", "records were overwritten before they were")
        comment += f"; {lost} drained"
    options = [(_OPT_COMMENT, comment.encode()), (_SHB_USERAPPL, b"vmbus-emu")]
    return _block(_SECTION, pack("<IHHq", _BYTE_ORDER, 1, 0, -1) + _options(options))


def interface_block(name: str) -> bytes:
    """An Interface Description Block."""
    what = "channel messages of SINT 2 and posts" if name == _SYNIC else f"both rings of {name}"
    options = [(_IF_NAME, name.encode()), (_IF_DESCRIPTION, what.encode()), (_IF_TSRESOL, _NANOSECONDS)]
    return _block(_INTERFACE, pack("<HHI", LINKTYPE_WIRESHARK_UPPER_PDU, 0, SNAP_BYTES) + _options(options))


def _block(kind: int, body: bytes) -> bytes:
    """A block: type, length, body, length again."""
    length = pack("<I", len(body) + 12)
    return pack("<I", kind) + length + body + length


def _options(options: list[tuple[int, bytes]]) -> bytes:
    return b"".join(pack("<HH", code, len(value)) + _padded(value) for code, value in [*options, (_OPT_END, b"")])


def _exported_pdu_tags(dissector: str) -> bytes:
    """Which dissector reads what follows; tags are big-endian."""
    name = _padded(dissector.encode())
    return pack(">HH", _TAG_DISSECTOR_NAME, len(name)) + name + pack(">HH", 0, 0)


def _padded(data: bytes) -> bytes:
    """To whole words of 4 bytes."""
    return data + bytes(-len(data) % 4)
