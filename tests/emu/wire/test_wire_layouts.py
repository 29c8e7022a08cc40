"""Every struct that `emu.wire` declares has the size and the offsets of the kernel's (or OpenVMM's) struct.

`tests/data/layouts.json` holds the sizes, offsets and bit positions, by the struct's own name.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from struct import Struct, calcsize
from typing import Any
from uuid import UUID

import pytest

import emu.wire
from emu.wire import gpa_range, hypercalls, packets, ring_layout, synic
from emu.wire.hv_message import HvMessage
from emu.wire.messages import (
    HEADER,
    MESSAGES,
    InitiateContact,
    Message,
    MessageSpec,
    OfferChannel,
    OpenChannel,
    TlConnectRequest,
    VersionResponse,
)
from emu.wire.versions import VERSION_WIN10_V5, FeatureFlags

TESTS = Path(__file__).parents[2]
COPY = TESTS / "data" / "layouts.json"
REFERENCE = TESTS.parent.parent / "shared" / "reference" / "layouts.json"

LAYOUTS: dict[str, Any] = json.loads(COPY.read_text())

Span = tuple[int, int]


def oracle(struct: str, field: str) -> Span:
    """Offset and size of a field as the table has it."""
    offset, size = LAYOUTS[struct]["fields"][field]
    return offset, size


def items(layout: Struct) -> list[Span]:
    """Offset and size of each value that a format without alignment packs."""
    spans = []
    at = 0
    for digits, code in re.findall(r"(\d*)([a-zA-Z])", layout.format):
        count = int(digits or 1)
        if code in "sx":
            spans += [(at, count)] if code == "s" else []
            at += count
            continue
        for _ in range(count):
            spans.append((at, calcsize(f"<{code}")))
            at += calcsize(f"<{code}")
    return spans


# Each Struct outside the messages: what it stands for, where it begins there, and its values in order.
STRUCTS: list[tuple[str, Struct, int, list[str]]] = [
    ("vmbus_channel_message_header", HEADER, 0, ["msgtype", "padding"]),
    (
        "hv_message_header",
        synic.MESSAGE_HEADER,
        0,
        ["message_type", "payload_size", "message_flags", "sender"],
    ),
    ("hv_timer_message_payload", synic.TIMER_PAYLOAD, 0, ["timer_index", "expiration_time", "delivery_time"]),
    ("ms_hyperv_tsc_page", synic.REFERENCE_TSC_PAGE, 0, ["tsc_sequence", "tsc_scale", "tsc_offset"]),
    (
        "hv_input_post_message",
        hypercalls.PostMessageInput.LAYOUT,
        0,
        ["connectionid", "reserved", "message_type", "payload_size", "payload"],
    ),
    ("gpa_range", gpa_range.GPA_RANGE, 0, ["byte_count", "byte_offset"]),
    ("vmpacket_descriptor", packets.DESCRIPTOR, 0, ["type", "offset8", "len8", "flags", "trans_id"]),
    ("openvmm::ring::Footer", packets.TRAILER, 0, ["reserved", "offset"]),
    ("vmdata_gpa_direct", packets.GPA_DIRECT, 16, ["reserved", "range_cnt"]),
    (
        "vmtransfer_page_packet_header",
        packets.XFER_PAGES,
        16,
        ["xfer_pageset_id", "sender_owns_set", "range_cnt"],
    ),
    ("vmtransfer_page_range", packets.XFER_PAGE_RANGE, 0, ["byte_count", "byte_offset"]),
    ("vmpipe_proto_header", packets.PIPE_HEADER, 0, ["pkt_type", "data_size"]),
    ("vmbuspipe_hdr", packets.PIPE_HEADER, 0, ["flags", "msgsize"]),
]

# Where a Struct ends before its counterpart does, because the ranges behind it are counted there.
ENDS_AT_RANGES = {"vmdata_gpa_direct": "range"}

# One Struct for header and payload at once; the message classes are compared below, by what they pack.
COMPARED_OTHERWISE = {id(HvMessage.LAYOUT)}


def test_copy_equals_the_reference_where_there_is_one() -> None:
    """The table in the repository says what the reference says, for every struct in it."""
    reference = json.loads((REFERENCE if REFERENCE.exists() else COPY).read_text())

    for name, layout in LAYOUTS.items():
        assert layout == {key: reference[name][key] for key in layout}, name


@pytest.mark.parametrize(("name", "layout", "start", "names"), STRUCTS, ids=[row[0] for row in STRUCTS])
def test_struct_has_the_layout_of_its_name(name: str, layout: Struct, start: int, names: list[str]) -> None:
    """Size, and offset and size of every value, are those of the named struct."""
    end = oracle(name, ENDS_AT_RANGES[name])[0] if name in ENDS_AT_RANGES else LAYOUTS[name]["size"]

    assert start + layout.size == end
    assert [(start + offset, size) for offset, size in items(layout)] == [oracle(name, one) for one in names]


def test_every_struct_is_compared() -> None:
    """No module of `emu.wire` declares a Struct that this file does not know."""
    compared = {id(row[1]) for row in STRUCTS} | COMPARED_OTHERWISE | set(map(id, message_structs()))
    found = list(declared_structs())

    assert len(found) > 30
    assert [where for where, layout in found if id(layout) not in compared] == []


def declared_structs() -> Iterator[tuple[str, Struct]]:
    """Every public Struct in a module or class of `emu.wire`, and where it is."""
    for info in pkgutil.iter_modules(emu.wire.__path__):
        module = importlib.import_module(f"emu.wire.{info.name}")
        for name, thing in vars(module).items():
            if isinstance(thing, Struct) and not name.startswith("_"):
                yield f"{info.name}.{name}", thing
            if isinstance(thing, type) and thing.__module__ == module.__name__:
                for inner, value in vars(thing).items():
                    if isinstance(value, Struct):
                        yield f"{info.name}.{name}.{inner}", value


def message_structs() -> Iterator[Struct]:
    """The Structs of the message classes."""
    yield Message.LAYOUT
    for spec in MESSAGES.values():
        yield from (value for value in vars(spec.cls).values() if isinstance(value, Struct))


# The messages, by what they pack: all zeros but one field, and only that field's bytes may differ.

# What a field is called in a struct that is not the kernel's, or that nests it.
OTHER_NAMES = {
    ("openvmm::proto::OpenReservedChannel", "child_relid"): "channel_id",
    ("openvmm::proto::OpenReservedChannel", "ringbuffer_gpadlhandle"): "ring_buffer_gpadl",
    ("openvmm::proto::OpenReservedChannel", "downstream_ringbuffer_pageoffset"): "downstream_page_offset",
    ("openvmm::proto::CloseReservedChannel", "child_relid"): "channel_id",
    ("openvmm::proto::CloseReservedChannelResponse", "child_relid"): "channel_id",
    ("openvmm::proto::TlConnectResult", "guest_endpoint_id"): "endpoint_id",
    ("openvmm::proto::TlConnectResult", "host_service_id"): "service_id",
    ("vmbus_channel_offer", "user_def"): "u.std.user_def",
    ("vmbus_channel_offer", "mmio_megabytes_optional"): "reserved3",
    ("vmbus_channel_gpadl_header", "ranges"): "range",
    ("vmbus_channel_gpadl_body", "data"): "pfn",
}

IN_THE_OFFER = {
    "if_type",
    "if_instance",
    "chn_flags",
    "mmio_megabytes",
    "user_def",
    "sub_channel_index",
    "mmio_megabytes_optional",
}

# The fields of the longer forms: the struct that has them, where in it, and what else makes them real.
LONGER_FORMS: dict[tuple[type[Message], str], tuple[str, Span, dict[str, int]]] = {
    (InitiateContact, "client_id"): (
        "openvmm::proto::InitiateContact2",
        oracle("openvmm::proto::InitiateContact2", "client_id"),
        {},
    ),
    # Documented only: a u32 in the kernel's six reserved bytes.
    (InitiateContact, "feature_flags"): (
        "vmbus_channel_initiate_contact",
        (20 - HEADER.size, 4),
        {"vmbus_version_requested": VERSION_WIN10_V5},
    ),
    (VersionResponse, "supported_features"): (
        "openvmm::proto::VersionResponse2",
        oracle("openvmm::proto::VersionResponse2", "supported_features"),
        {"supported_features": 0},
    ),
    (VersionResponse, "parent_to_child_monitor_page_gpa"): (
        "openvmm::proto::VersionResponse3",
        oracle("openvmm::proto::VersionResponse3", "parent_to_child_monitor_page_gpa"),
        {"supported_features": FeatureFlags.SERVER_SPECIFIED_MONITOR_PAGES},
    ),
    (VersionResponse, "child_to_parent_monitor_page_gpa"): (
        "openvmm::proto::VersionResponse3",
        oracle("openvmm::proto::VersionResponse3", "child_to_parent_monitor_page_gpa"),
        {"supported_features": FeatureFlags.SERVER_SPECIFIED_MONITOR_PAGES},
    ),
    (OpenChannel, "connection_id"): (
        "openvmm::proto::OpenChannel2",
        oracle("openvmm::proto::OpenChannel2", "connection_id"),
        {"connection_id": 0},
    ),
    (OpenChannel, "event_flag"): (
        "openvmm::proto::OpenChannel2",
        oracle("openvmm::proto::OpenChannel2", "event_flag"),
        {"connection_id": 0},
    ),
    (OpenChannel, "flags"): (
        "openvmm::proto::OpenChannel2",
        oracle("openvmm::proto::OpenChannel2", "flags"),
        {"connection_id": 0},
    ),
    (TlConnectRequest, "silo_id"): (
        "openvmm::proto::TlConnectRequest2",
        oracle("openvmm::proto::TlConnectRequest2", "silo_id"),
        {},
    ),
}

NEEDS_VERSION_5 = {"msg_sint", "msg_vtl"}
ZERO = {"int": 0, "bytes": b"", "bool": False, "UUID": UUID(int=0), "int | None": None, "UUID | None": None}


def fields_of(cls: Any) -> tuple[dataclasses.Field[Any], ...]:
    """The fields of a message class, which is a dataclass although `Message` itself is none."""
    return dataclasses.fields(cls)


FIELDS = [(spec, field) for spec in MESSAGES.values() for field in fields_of(spec.cls)]


def where(spec: MessageSpec, field: str) -> Span:
    """Offset and size of a message's field, counted from the message header's first byte."""
    if (spec.cls, field) in LONGER_FORMS:
        _struct, (offset, size), _base = LONGER_FORMS[spec.cls, field]
        return HEADER.size + offset, size
    struct, start = spec.struct_name, 0
    if spec.cls is OfferChannel and field in IN_THE_OFFER:
        struct, start = "vmbus_channel_offer", oracle("vmbus_channel_offer_channel", "offer")[0]
    elif struct.startswith("openvmm"):
        start = HEADER.size
    offset, size = oracle(struct, OTHER_NAMES.get((struct, field), field))
    return start + offset, size


def ones(kind: str, size: int) -> Any:
    """A value of that type with every bit set."""
    match kind.removesuffix(" | None"):
        case "int":
            return (1 << 8 * size) - 1
        case "bytes":
            return b"\xff" * (size or 8)
        case "bool":
            return True
        case _:
            return UUID(int=(1 << 128) - 1)


@pytest.mark.parametrize(("spec", "field"), FIELDS, ids=[f"{spec.cls.__name__}.{field.name}" for spec, field in FIELDS])
def test_message_field_lies_where_the_struct_has_it(spec: MessageSpec, field: dataclasses.Field[Any]) -> None:
    """A field of all ones changes just the bytes (of a bit field, the bit) that the struct gives it."""
    offset, size = where(spec, field.name)
    zeros = {one.name: ZERO[str(one.type)] for one in fields_of(spec.cls)}
    zeros |= LONGER_FORMS.get((spec.cls, field.name), ("", (0, 0), {}))[2]
    if field.name in NEEDS_VERSION_5:
        zeros["vmbus_version_requested"] = VERSION_WIN10_V5
    before = spec.cls(**zeros).pack()
    after = spec.cls(**zeros | {field.name: ones(str(field.type), size)}).pack()
    if field.type == "bool":
        bit, width = LAYOUTS[spec.struct_name]["bitfields"][field.name]
        expected = {bit // 8: 1 << bit % 8}
        assert width == 1
    else:
        expected = dict.fromkeys(range(offset, offset + (size or 8)), 0xFF)

    padded = before.ljust(len(after), b"\0")[: len(after)]
    changed = {at: new for at, (old, new) in enumerate(zip(padded, after, strict=True)) if old != new}
    assert changed == expected


@pytest.mark.parametrize("spec", MESSAGES.values(), ids=[spec.cls.__name__ for spec in MESSAGES.values()])
def test_message_has_every_field_of_its_struct(spec: MessageSpec) -> None:
    """Nothing is left out but the header, padding, reserved bytes and what only wraps other fields."""
    ours = {where(spec, field.name)[0] for field in fields_of(spec.cls)}
    shift = HEADER.size if spec.struct_name.startswith("openvmm") else 0
    theirs = {
        name: shift + offset
        for name, (offset, _size) in LAYOUTS[spec.struct_name]["fields"].items()
        if name not in {"header", "msgtype", "offer"} and not name.startswith(("reserved", "padding"))
    }

    assert [name for name, offset in theirs.items() if offset not in ours] == []


@pytest.mark.parametrize("spec", MESSAGES.values(), ids=[spec.cls.__name__ for spec in MESSAGES.values()])
def test_least_size_is_the_size_of_the_struct(spec: MessageSpec) -> None:
    """The table's least size, the Struct's and the named struct's are one number."""
    shift = HEADER.size if spec.struct_name.startswith("openvmm") else 0

    assert spec.least_size == HEADER.size + spec.cls.LAYOUT.size == shift + LAYOUTS[spec.struct_name]["size"]


@pytest.mark.parametrize(
    ("message", "struct"),
    [
        (
            InitiateContact(vmbus_version_requested=0x60000, feature_flags=8, client_id=UUID(int=1)),
            "InitiateContact2",
        ),
        (VersionResponse(1, supported_features=0), "VersionResponse2"),
        (VersionResponse(1, supported_features=0x40), "VersionResponse3"),
        (OpenChannel(1, 1, 1, 1, 1, connection_id=1), "OpenChannel2"),
        (TlConnectRequest(UUID(int=1), UUID(int=2), UUID(int=3)), "TlConnectRequest2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_longer_form_has_the_size_of_its_struct(message: Message, struct: str) -> None:
    """The forms of 56, 20, 40, 156 and 56 bytes are as long as OpenVMM's, and the header."""
    assert len(message.pack()) == HEADER.size + LAYOUTS[f"openvmm::proto::{struct}"]["size"]


def test_hv_message_is_header_and_payload() -> None:
    """A slot is the header's 16 bytes and 240 of payload."""
    layout = HvMessage.LAYOUT

    assert layout.size == LAYOUTS["hv_message"]["size"] == synic.HV_MESSAGE_SIZE
    assert items(layout)[:4] == items(synic.MESSAGE_HEADER)
    assert items(layout)[4] == oracle("hv_message", "u.payload")
    assert oracle("hv_message_header", "message_type")[0] == synic.MESSAGE_TYPE_OFFSET
    assert oracle("hv_message_header", "message_flags")[0] == synic.MESSAGE_FLAGS_OFFSET
    assert oracle("hv_message", "u.payload")[0] == synic.MESSAGE_PAYLOAD_OFFSET
    assert LAYOUTS["hv_synic_event_flags"]["size"] == synic.HV_EVENT_FLAGS_BYTE_COUNT


@pytest.mark.parametrize(
    ("struct", "field", "mask"),
    [
        ("hv_message_flags", "msg_pending", synic.HV_MESSAGE_FLAG_PENDING),
        ("hv_synic_scontrol", "enable", synic.HV_SYNIC_CONTROL_ENABLE),
        ("hv_synic_simp", "simp_enabled", synic.HV_SYNIC_SIMP_ENABLE),
        ("hv_synic_simp", "base_simp_gpa", synic.PAGE_REGISTER_GPA_MASK),
        ("hv_synic_siefp", "siefp_enabled", synic.HV_SYNIC_SIEFP_ENABLE),
        ("hv_synic_siefp", "base_siefp_gpa", synic.PAGE_REGISTER_GPA_MASK),
        ("hv_x64_msr_hypercall_contents", "enable", synic.HV_X64_MSR_HYPERCALL_ENABLE),
        ("hv_x64_msr_hypercall_contents", "guest_physical_address", synic.PAGE_REGISTER_GPA_MASK),
        ("hv_synic_sint", "vector", synic.HV_SYNIC_SINT_VECTOR_MASK),
        ("hv_synic_sint", "masked", synic.HV_SYNIC_SINT_MASKED),
        ("hv_synic_sint", "auto_eoi", synic.HV_SYNIC_SINT_AUTO_EOI),
        ("hv_synic_sint", "polling", synic.HV_SYNIC_SINT_POLLING),
        ("hv_stimer_config", "enable", synic.HV_STIMER_ENABLE),
        ("hv_stimer_config", "periodic", synic.HV_STIMER_PERIODIC),
        ("hv_stimer_config", "lazy", synic.HV_STIMER_LAZY),
        ("hv_stimer_config", "auto_enable", synic.HV_STIMER_AUTOENABLE),
        ("hv_stimer_config", "apic_vector", 0xFF << synic.HV_STIMER_VECTOR_SHIFT),
        ("hv_stimer_config", "direct_mode", synic.HV_STIMER_DIRECT_MODE),
        ("hv_stimer_config", "sintx", 0xF << synic.HV_STIMER_SINT_SHIFT),
    ],
)
def test_register_bits_are_where_the_union_has_them(struct: str, field: str, mask: int) -> None:
    """A mask covers just the bits of the bit field."""
    first, width = LAYOUTS[struct]["bitfields"][field]

    assert mask == ((1 << width) - 1) << first


def test_ring_control_page_words_are_where_the_struct_has_them() -> None:
    """The offsets of the control page are those of `hv_ring_buffer`."""
    struct = "hv_ring_buffer"

    assert oracle(struct, "write_index") == (ring_layout.WRITE_INDEX, 4)
    assert oracle(struct, "read_index") == (ring_layout.READ_INDEX, 4)
    assert oracle(struct, "interrupt_mask") == (ring_layout.INTERRUPT_MASK, 4)
    assert oracle(struct, "pending_send_sz") == (ring_layout.PENDING_SEND_SZ, 4)
    assert oracle(struct, "feature_bits.value") == (ring_layout.FEATURE_BITS, 4)
    assert oracle(struct, "buffer")[0] == ring_layout.DATA == LAYOUTS[struct]["size"]
    first, width = LAYOUTS[struct]["bitfields"]["feature_bits.feat_pending_send_sz"]
    assert (1 << first - 8 * ring_layout.FEATURE_BITS, width) == (ring_layout.FEAT_PENDING_SEND_SZ, 1)


def test_signal_event_input_is_laid_out_as_openvmm_has_it() -> None:
    """The one u64 of HvCallSignalEvent holds connection id and flag number where the struct has them."""
    data = hypercalls.signal_event_input(0xFFFF_FFFF, 0).to_bytes(8, "little")
    flag = hypercalls.signal_event_input(0, 0xFFFF).to_bytes(8, "little")

    assert (data.index(0xFF), data.count(0xFF)) == oracle("openvmm::hvdef::SignalEvent", "connection_id")
    assert (flag.index(0xFF), flag.count(0xFF)) == oracle("openvmm::hvdef::SignalEvent", "flag_number")
