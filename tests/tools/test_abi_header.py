"""The guest ABI says the same in three places: the tables of emu.layout, the C header, docs/abi.md."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from emu.ipc.segments import object_name
from emu.layout import (
    BLOCKS,
    CONSTANTS,
    DOORBELLS,
    ENUMS,
    EXIT_SLOT,
    MACHINE_PAGE,
    VP_PAGE,
    Block,
    ExitOperation,
    RunState,
)
from emu.machine import ACTOR_WAKEUPS, wakeup_names
from emu.ring import RingMemory, RingProducer
from emu.wire.device_classes import ECHO
from emu.wire.hypercalls import HvStatus, PostMessageInput
from emu.wire.messages import (
    MESSAGES,
    AllOffersDelivered,
    CloseChannel,
    Direction,
    GpadlCreated,
    GpadlTeardown,
    GpadlTorndown,
    InitiateContact,
    Message,
    MessageType,
    OfferChannel,
    OpenChannel,
    OpenChannelResult,
    RelidReleased,
    RequestOffers,
    Unload,
    UnloadResponse,
    VersionResponse,
    gpadl_messages,
)
from emu.wire.packets import COMPLETION_REQUESTED, VM_PKT_COMP, VM_PKT_DATA_INBAND
from emu.wire.synic import MSR_NAMES
from tools import abi_header

SOURCES = Path(__file__).resolve().parent.parent.parent
HEADER = SOURCES / "include" / "vmbus_emu.h"
LAYOUTS: dict[str, Any] = json.loads((SOURCES / "tests" / "data" / "layouts.json").read_text(encoding="utf-8"))
PAGE = (SOURCES / "docs" / "abi.md").read_text(encoding="utf-8")


def test_header_is_what_the_tables_say() -> None:
    """The header in the repository is what the generator prints today."""
    assert HEADER.read_text(encoding="utf-8") == abi_header.header(), (
        "run: python -m tools.abi_header > include/vmbus_emu.h"
    )


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_every_field_is_asserted_in_c(block: Block) -> None:
    """A C compiler checks the size of each structure and the offset of each of its fields."""
    text = abi_header.header()

    assert f"sizeof(struct {block.name}) == {block.size}," in text
    for field in block.fields:
        assert f"offsetof(struct {block.name}, {field.name}) == {field.offset}," in text


def test_enumerations_and_constants_are_all_there() -> None:
    """Each enumerator and each constant of the table has a name in C, with its value."""
    text = abi_header.header()

    for name, enum in ENUMS.items():
        for member in enum:
            assert f"\t{name.upper()}_{member.name} = {member.value},\n" in text
    for name in CONSTANTS:
        assert f"#define {name} " in text


def test_names_in_c_are_the_names_of_the_objects() -> None:
    """The formats of the header make exactly the segments and semaphores that a guest may open."""
    formats = dict(re.findall(r'#define (VMBUS_EMU_(?:SEGMENT|SEMAPHORE)_\w+) "([^"]*)"', abi_header.header()))
    formed = {formats["VMBUS_EMU_SEMAPHORE_HOST"] % "m"}
    for position in range(2):
        formed.add(formats["VMBUS_EMU_SEMAPHORE_VP"].replace("%u", "%d") % ("m", position))
        for slot in range(CONSTANTS["VMBUS_EMU_EXIT_SLOTS"]):
            formed.add(formats["VMBUS_EMU_SEMAPHORE_EXIT"].replace("%u", "%d") % ("m", position, slot))

    harness = {f"actor.{number}" for number in range(ACTOR_WAKEUPS)}
    assert formed == {object_name("m", part) for part in wakeup_names(2) if part not in harness}
    for part in ("ram", "vps", "doorbells"):
        assert formats[f"VMBUS_EMU_SEGMENT_{part.upper()}"] % "m" == object_name("m", part)


# -- docs/abi.md --------------------------------------------------------------------------------------------


def section(title: str) -> str:
    """Text of the section of that title, subsections not included."""
    found = re.search(rf"^#+ {re.escape(title)}.*?\n(.*?)(?=^#|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1]


def rows(text: str) -> Iterator[list[str]]:
    """Cells of every table row in a section, heads and rules left out."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.replace(r"\|", "¦").strip("|").split("|")]
        if line.startswith("|") and not set(cells[0]) <= {"-"}:
            yield cells


@pytest.mark.parametrize(
    ("title", "block"),
    [
        ("1.1 The machine page", MACHINE_PAGE),
        ("1.2 A VP page", VP_PAGE),
        ("1.3 The doorbells", DOORBELLS),
        ("3.1 A slot", EXIT_SLOT),
    ],
)
def test_tables_of_the_page_are_the_layout(title: str, block: Block) -> None:
    """Every field of a block stands in its table on the page, with its offset and type, and no other."""
    written = {cells[2]: (int(cells[0]), cells[1]) for cells in rows(section(title)) if cells[0].isdigit()}
    declared = {}
    for field in block.fields:
        counted = f"{field.ctype}[{field.count}]" if field.count > 1 else field.ctype
        declared[field.name] = (field.offset, counted if field.ctype != "u8" else "64 B × 8")

    assert written == declared


def test_operations_registers_and_statuses_are_named_with_their_numbers() -> None:
    """Operations, run states, MSRs and hypercall statuses have on the page their own numbers."""
    operations = {cells[1]: int(cells[0]) for cells in rows(section("4. Operations")) if cells[0].isdigit()}
    states = {cells[1]: int(cells[0]) for cells in rows(section("6. Interrupts")) if cells[0].isdigit()}
    registers = {cells[0]: cells[1] for cells in rows(section("4.1 MSRs")) if cells[1].startswith("0x")}
    statuses = {
        cells[1]: int(cells[0], 16)
        for cells in rows(section("4.2 Hypercalls"))
        if re.match(r"0x[0-9A-F]{2}$", cells[0])
    }

    assert operations == {member.name: member.value for member in ExitOperation}
    assert states == {member.name: member.value for member in RunState}
    assert len(statuses) == 8
    assert statuses == {name: HvStatus[name].value for name in statuses}
    assert len(registers) == 12
    by_name = {name: number for number, name in MSR_NAMES.items()}
    for name, number in registers.items():
        assert by_name[re.split(r"[ ,]", name)[0]] == int(re.split(r"[ ,]", number)[0], 16), name


@pytest.mark.parametrize(
    "cells", [one for one in rows(section("10. Above it")) if one[0].isdigit()], ids=lambda cells: cells[1]
)
def test_messages_of_the_page_have_their_structs_layout(cells: list[str]) -> None:
    """Number, direction and size of a message are the table's, and every offset is one of its struct's fields."""
    number, _name, to, size, text = cells
    spec = MESSAGES[MessageType(int(number))]
    offsets = {at for at, _size in LAYOUTS[spec.struct_name]["fields"].values()}
    if spec.cls is OfferChannel:
        offsets |= {8 + at for at, _size in LAYOUTS["vmbus_channel_offer"]["fields"].values()}

    assert spec.direction is (Direction.GUEST_TO_HOST if to == "host" else Direction.HOST_TO_GUEST)
    assert int(size.split()[0]) == spec.least_size
    assert {int(at) for at in re.findall(r"@(\d+)", text)} <= offsets


def worked_messages() -> list[tuple[str, Message]]:
    """Every message whose bytes the example of the page spells out."""
    handle = 0xE1E10
    return [
        ("contact", InitiateContact(vmbus_version_requested=0x50003, target_vcpu=0, msg_sint=2)),
        ("version response", VersionResponse(1, msg_conn_id=1)),
        ("request offers", RequestOffers()),
        ("all offers", AllOffersDelivered()),
        ("gpadl", gpadl_messages(1, handle, range(0x200, 0x204))[0]),
        ("created", GpadlCreated(1, handle, 0)),
        ("open result", OpenChannelResult(1, 1, 0)),
        ("close", CloseChannel(1)),
        ("teardown", GpadlTeardown(1, handle)),
        ("torndown", GpadlTorndown(handle)),
        ("released", RelidReleased(1)),
        ("unload", Unload()),
        ("unload response", UnloadResponse()),
    ]


def spelt_out() -> set[str]:
    """Every run of hexadecimal bytes of the worked example, spaces taken out."""
    example = section("10.2 From nothing to a packet")
    return {re.sub(r"\s", "", run) for run in re.findall(r"`([0-9a-f ]{8,})`", example)}


@pytest.mark.parametrize(("name", "message"), worked_messages(), ids=lambda value: str(value)[:20])
def test_worked_bytes_are_what_the_wire_module_writes(name: str, message: Message) -> None:
    """The example spells out each message exactly as emu.wire packs it."""
    assert message.pack().hex() in spelt_out(), name


def test_worked_open_and_post_begin_as_the_wire_module_writes() -> None:
    """OPENCHANNEL and the input of HvCallPostMessage are spelt out up to the zeros that follow."""
    opened = OpenChannel(1, openid=1, ringbuffer_gpadlhandle=0xE1E10, target_vp=1, downstream_ringbuffer_pageoffset=2)
    posted = PostMessageInput.of(4, 1, bytes(40))

    assert opened.pack()[:28].hex() in spelt_out()
    assert posted.pack()[:16].hex() in spelt_out()


def test_worked_packets_are_what_the_ring_writes() -> None:
    """The packet of the example and its completion are the bytes that our ring puts into an empty ring."""
    data = bytes(range(1, 9))
    for packet_type, flags in ((VM_PKT_DATA_INBAND, COMPLETION_REQUESTED), (VM_PKT_COMP, 0)):
        memory = bytearray(2 * 4096)
        RingProducer(RingMemory.on(memory)).write(data, 7, flags, packet_type)

        assert memory[4096:4128].hex() in spelt_out()
        assert memory[0:4] == (32).to_bytes(4, "little")


def test_page_names_the_echo_class() -> None:
    """The class GUID on the page is the echo device's."""
    assert {UUID(text) for text in re.findall(r"`([0-9a-f]{8}-[0-9a-f-]{27})`", PAGE)} == {ECHO.guid}
