"""GUIDs on the wire and in sysfs."""

from __future__ import annotations

from uuid import UUID

from emu.wire.guids import NULL_GUID, braced, guid_from_wire, guid_to_wire, modalias

NIC = UUID("f8615163-df3e-46c5-913f-f2d2f965ed0e")
NIC_BYTES = bytes.fromhex("635161f8 3edf c546 913ff2d2f965ed0e")


def test_first_three_parts_are_little_endian() -> None:
    """u32, u16, u16 are turned round, the last eight bytes are not."""
    assert guid_to_wire(NIC) == NIC_BYTES
    assert guid_from_wire(NIC_BYTES) == NIC


def test_null_guid_is_zeros() -> None:
    """Sixteen zero bytes."""
    assert guid_to_wire(NULL_GUID) == bytes(16)


def test_sysfs_says_a_guid_in_braces_and_the_modalias_in_wire_order() -> None:
    """`class_id` is text, `modalias` the raw bytes."""
    assert braced(NIC) == "{f8615163-df3e-46c5-913f-f2d2f965ed0e}"
    assert modalias(NIC) == "vmbus:635161f83edfc546913ff2d2f965ed0e"
