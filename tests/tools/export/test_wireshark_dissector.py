"""The Lua dissector: tshark shows every field of every channel message, and the descriptors of ring packets."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_OID, UUID, uuid5

import pytest

from emu.wire.gpa_range import GpaRange
from emu.wire.messages import (
    MESSAGES,
    ChannelFlags,
    GpadlHeader,
    InitiateContact,
    Message,
    MessageType,
    OfferChannel,
    VersionResponse,
    gpadl_messages,
)
from emu.wire.packets import (
    COMPLETION_REQUESTED,
    VM_PKT_COMP,
    VM_PKT_DATA_INBAND,
    VM_PKT_DATA_USING_GPA_DIRECT,
    VM_PKT_DATA_USING_XFER_PAGES,
    XferPages,
    pack_gpa_direct,
    pack_packet,
    pack_trailer,
)
from emu.wire.versions import VERSION_COPPER, VERSION_WIN10, VERSION_WIN10_V5_3, FeatureFlags
from tests.tools.export.readers import dissected, written
from tools.export.pcapng import Frame, interface_block, section_block


def capture(path: Path, *frames: Frame) -> Path:
    """A file of frames."""
    blocks = [section_block("test", 0), interface_block("channel 7")]
    path.write_bytes(b"".join([*blocks, *(frame.block(0, 1_000) for frame in frames)]))
    return path


def message_frame(payload: bytes, length: int = 0) -> Frame:
    """A control message, whole or cut."""
    return Frame("synic", 2, "vmbus", payload, length or len(payload), [])


def number(shown: str) -> int:
    """A number as tshark writes it."""
    return {"True": 1, "False": 0}.get(shown) if shown in ("True", "False") else int(shown, 0)  # type: ignore[return-value]


def as_shown(value: object, shown: Any) -> object:
    """What tshark wrote, as a value like the message's."""
    if isinstance(value, UUID):
        return UUID(shown)
    if isinstance(value, bytes):
        return bytes.fromhex(shown.replace(":", ""))
    return number(shown)


def sample(cls: type[Message]) -> Message:
    """A message whose fields all differ, in its shortest form: an optional field and those behind it are left out."""
    values: dict[str, object] = {}
    for at, field in enumerate(dataclasses.fields(cls), 11):  # type: ignore[arg-type]
        kind = str(field.type)
        if "None" in kind:
            break
        values[field.name] = {
            "UUID": uuid5(NAMESPACE_OID, field.name),
            "bytes": bytes([at]) * 120,
            "bool": True,
        }.get(kind, at)
    return cls(**values)


PLAIN = [
    sample(spec.cls)
    for spec in MESSAGES.values()
    if spec.type not in (MessageType.GPADL_HEADER, MessageType.GPADL_BODY, MessageType.INITIATE_CONTACT)
]
LONG: list[Message] = [
    InitiateContact(vmbus_version_requested=VERSION_WIN10, target_vcpu=3, interrupt_page=0x5000, monitor_page1=0x6000),
    InitiateContact(vmbus_version_requested=VERSION_WIN10_V5_3, target_vcpu=3, msg_sint=2, msg_vtl=1, monitor_page2=1),
    InitiateContact(
        vmbus_version_requested=VERSION_COPPER,
        feature_flags=FeatureFlags.CLIENT_ID,
        client_id=uuid5(NAMESPACE_OID, "client"),
    ),
    VersionResponse(1, 0, 4, supported_features=1),
    VersionResponse(1, 0, 4, FeatureFlags.SERVER_SPECIFIED_MONITOR_PAGES, 0x7000, 0x8000),
    dataclasses.replace(sample(MESSAGES[MessageType.OPENCHANNEL].cls), connection_id=0x2007, event_flag=9, flags=1),  # type: ignore[type-var]
    dataclasses.replace(sample(MESSAGES[MessageType.TL_CONNECT_REQUEST].cls), silo_id=uuid5(NAMESPACE_OID, "silo")),  # type: ignore[type-var]
]


def test_every_field_of_every_message_is_shown(tshark: str, tmp_path: Path) -> None:
    """All types, and the longer forms of those that have some, under the names that our table has."""
    messages = [*PLAIN, *LONG]
    frames = dissected(tshark, capture(tmp_path / "out", *(message_frame(one.pack()) for one in messages)))

    assert {int(one.TYPE) for one in messages} | {8, 9} == set(MESSAGES)
    for message, layers in zip(messages, frames, strict=True):
        shown = layers["vmbus"]
        expected = {field.name: getattr(message, field.name) for field in dataclasses.fields(message)}  # type: ignore[arg-type]
        # Nothing there: a longer form's fields, or the other half of a union.
        there = {name: value for name, value in expected.items() if value or f"vmbus.{name}" in shown}
        assert {name: as_shown(value, shown[f"vmbus.{name}"]) for name, value in there.items()} == there, message
        assert number(shown["vmbus.msgtype"]) == message.TYPE
        assert "_ws.malformed" not in layers
        assert "vmbus.trailing" not in shown


def test_gpadl_pages_are_listed(tshark: str, tmp_path: Path) -> None:
    """Header and bodies show the page numbers; what firmware pads behind them is trailing."""
    pfns = list(range(100, 132))
    header, body = gpadl_messages(7, 0xE1E10, pfns)
    padded = body.pack().ljust(240, b"\0")
    frames = dissected(tshark, capture(tmp_path / "out", *map(message_frame, (header.pack(), body.pack(), padded))))
    first, second, third = (layers["vmbus"] for layers in frames)

    assert (number(first["vmbus.byte_count"]), number(first["vmbus.byte_offset"])) == (32 * 4096, 0)
    assert [number(one) for one in first["vmbus.pfn"]] == pfns[:26]
    assert [number(one) for one in second["vmbus.pfn"]] == pfns[26:]
    assert [number(one) for one in third["vmbus.pfn"]][:6] == pfns[26:]


def test_several_ranges_are_bytes(tshark: str, tmp_path: Path) -> None:
    """Where a GPADL has more than one range, what is a range and what a page depends on other messages."""
    header = GpadlHeader(7, 1, 64, 2, bytes(range(32)))
    (layers,) = dissected(tshark, capture(tmp_path / "out", message_frame(header.pack())))

    assert bytes.fromhex(layers["vmbus"]["vmbus.ranges"].replace(":", "")) == bytes(range(32))
    assert "vmbus.pfn" not in layers["vmbus"]


def test_offer_names_class_flags_and_pipe_mode(tshark: str, tmp_path: Path) -> None:
    """A pipe offer has a mode in its user data; flags are shown one by one."""
    offer = OfferChannel(
        if_type=UUID("f8615163-df3e-46c5-913f-f2d2f965ed0e"),
        if_instance=uuid5(NAMESPACE_OID, "nic"),
        chn_flags=ChannelFlags.NAMED_PIPE_MODE | ChannelFlags.ENUMERATE_DEVICE_INTERFACE,
        user_def=(4).to_bytes(4, "little"),
        child_relid=7,
        connection_id=0x2007,
    )
    (layers,) = dissected(tshark, capture(tmp_path / "out", message_frame(offer.pack())))
    shown, flags = layers["vmbus"], layers["vmbus"]["vmbus.chn_flags_tree"]

    assert number(shown["vmbus.pipe_mode"]) == 4
    assert number(flags["vmbus.chn_flags.named_pipe_mode"]) == 1
    assert number(flags["vmbus.chn_flags.tlnpi_provider_offer"]) == 0


@pytest.mark.parametrize(
    ("payload", "length", "expert"),
    [
        pytest.param(b"\x06\0\0\0\0\0\0\0", 20, "not_captured", id="cut"),
        pytest.param(b"\x06\0\0\0\0\0\0\0", 8, "too_short", id="short"),
        pytest.param(b"\x06\0\0", 3, "too_short", id="no header"),
        pytest.param(b"\x63\0\0\0\0\0\0\0", 8, "unknown_type", id="unknown type"),
    ],
)
def test_what_is_no_message_is_said(tshark: str, tmp_path: Path, payload: bytes, length: int, expert: str) -> None:
    """Cut by the recorder, too short by itself, or of a type that nobody has."""
    (layers,) = dissected(tshark, capture(tmp_path / "out", message_frame(payload, length)))

    assert f"vmbus.{expert}" in str(layers["vmbus"])


def test_ring_packets_are_taken_apart(tshark: str, tmp_path: Path) -> None:
    """A publish of several packets: each descriptor, the headers of the types that have one, the trailer."""
    ranges = [GpaRange(6000, 100, (21, 22)), GpaRange(10, 0, (23,))]
    xfer = XferPages(0xCAFE, 1, ((60, 0), (70, 128)))
    packets = [
        pack_packet(b"payload!", 0x1_0000_0001, COMPLETION_REQUESTED) + pack_trailer(64),
        pack_packet(b"x" * 8, 5, 0, VM_PKT_DATA_USING_GPA_DIRECT, pack_gpa_direct(ranges)) + pack_trailer(96),
        pack_packet(b"y" * 8, 6, 0, VM_PKT_DATA_USING_XFER_PAGES, xfer.pack()) + pack_trailer(200),
        pack_packet(b"", 7, 0, VM_PKT_COMP) + pack_trailer(300),
    ]
    data = b"".join(packets)
    (layers,) = dissected(tshark, capture(tmp_path / "out", Frame("channel 7", 1, "vmbus_ring", data, len(data), [])))
    ring = layers["vmbus_ring"]
    inband, gpa, pages, completion = ring["vmbus_ring.packet"]

    assert number(ring["vmbus_ring.relid"]) == 7
    assert [number(one["vmbus_ring.type"]) for one in ring["vmbus_ring.packet"]] == [6, 9, 7, 11]
    assert [number(one["vmbus_ring.trans_id"]) for one in ring["vmbus_ring.packet"]] == [0x1_0000_0001, 5, 6, 7]
    assert [number(one["vmbus_ring.trailer"]) for one in ring["vmbus_ring.packet"]] == [64, 96, 200, 300]
    assert bytes.fromhex(inband["vmbus_ring.payload"].replace(":", "")) == b"payload!"
    assert number(inband["vmbus_ring.flags_tree"]["vmbus_ring.flags.completion_requested"]) == 1
    assert list(map(number, gpa["vmbus_ring.byte_count"])) == [6000, 10]
    assert list(map(number, gpa["vmbus_ring.pfn"])) == [21, 22, 23]
    assert number(pages["vmbus_ring.xfer_pageset_id"]) == 0xCAFE
    assert list(map(number, pages["vmbus_ring.byte_offset"])) == [0, 128]
    assert "vmbus_ring.payload" not in completion


def test_cut_and_lying_packets_are_said(tshark: str, tmp_path: Path) -> None:
    """A publish that was recorded in part; a descriptor whose payload lies outside of its packet."""
    whole = pack_packet(b"z" * 400, 9) + pack_trailer(0)
    lying = pack_packet(b"z" * 8, 9)[:2] + (9).to_bytes(2, "little") + pack_packet(b"z" * 8, 9)[4:] + pack_trailer(0)
    frames = dissected(
        tshark,
        capture(
            tmp_path / "out",
            Frame("channel 7", 2, "vmbus_ring", whole[:256], len(whole), []),
            Frame("channel 7", 2, "vmbus_ring", lying, len(lying), []),
        ),
    )

    assert "vmbus_ring.cut" in str(frames[0]) and "vmbus_ring.bad_descriptor" not in str(frames[0])
    assert "vmbus_ring.bad_descriptor" in str(frames[1])


def test_recorded_run_is_dissected_to_the_last_message(real_recording: Path, tshark: str, tmp_path: Path) -> None:
    """Every message whole, with nothing to complain of; the packets in the rings are the exchange that took place."""
    frames = dissected(tshark, written("pcapng", real_recording, tmp_path / "out"))
    messages = [layers["vmbus"] for layers in frames if "vmbus" in layers]
    rings = [layers["vmbus_ring"] for layers in frames if "vmbus_ring" in layers]

    assert not any("_ws.expert" in str(message) for message in messages)
    offers = [message for message in messages if number(message["vmbus.msgtype"]) == MessageType.OFFERCHANNEL]
    assert sorted(number(offer["vmbus.child_relid"]) for offer in offers) == list(range(1, 9))
    by_type = Counter(number(message["vmbus.msgtype"]) for message in messages)
    assert by_type[MessageType.OPENCHANNEL] == by_type[MessageType.OPENCHANNEL_RESULT] == 8
    first = rings[0]["vmbus_ring.packet"]
    first = first[0] if isinstance(first, list) else first
    assert number(first["vmbus_ring.type"]) == VM_PKT_DATA_INBAND
