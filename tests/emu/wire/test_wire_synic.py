"""The SynIC's numbers and its 256-byte message."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu.wire.hv_message import HvMessage
from emu.wire.synic import (
    HV_INTERFACE,
    HV_VENDOR,
    HV_X64_MSR_SINT0,
    HV_X64_MSR_SINT15,
    HV_X64_MSR_STIMER0_CONFIG,
    HV_X64_MSR_STIMER3_COUNT,
    HVMSG_CHANNEL_MESSAGE,
    HVMSG_TIMER_EXPIRED,
    HYPERVISOR_CALLBACK_VECTOR,
    MSR_NAMES,
    SINT_RESET,
    TIMER_PAYLOAD,
    VMBUS_MESSAGE_SINT,
    event_flag,
    linux_guest_os_id,
    message_slot,
    page_register,
    page_register_enabled,
    page_register_gpa,
    sint_value,
    sint_vector,
)


def test_vmbus_uses_sint_2_and_vector_0xf3() -> None:
    """Its slot is at 0x200; relid 5 is bit 5 of byte 0x200 of the event-flag page."""
    assert message_slot(VMBUS_MESSAGE_SINT) == 0x200
    assert event_flag(VMBUS_MESSAGE_SINT, 5) == (0x200, 0x20)
    assert event_flag(VMBUS_MESSAGE_SINT, 2047) == (0x2FF, 0x80)
    assert HYPERVISOR_CALLBACK_VECTOR == 0xF3


def test_sint_register_is_built_and_read() -> None:
    """Vector in 7:0, then masked, AutoEOI and polling from bit 16 on; reset is masked."""
    assert sint_value(0xF3) == 0xF3
    assert sint_value(0xF3, masked=True, auto_eoi=True, polling=True) == 0x700F3
    assert SINT_RESET == 0x10000
    assert sint_vector(0x700F3) == 0xF3


def test_page_register_is_a_gpa_and_an_enable_bit() -> None:
    """SIMP, SIEFP and HYPERCALL hold a page's GPA and bit 0; the preserved bits between are neither."""
    assert page_register(0x12000) == 0x12001
    assert page_register(0x12000, enable=False) == 0x12000
    assert (page_register_gpa(0x12FFF), page_register_enabled(0x12FFF)) == (0x12000, True)
    assert page_register_enabled(0x12FFE) is False


def test_page_register_takes_pages_only() -> None:
    """A GPA inside a page is the caller's mistake."""
    with pytest.raises(AssertionError):
        page_register(0x12008)


def test_cpuid_texts() -> None:
    """The vendor is "Microsoft Hv", the interface "Hv#1"."""
    assert b"".join(word.to_bytes(4, "little") for word in HV_VENDOR) == b"Microsoft Hv"
    assert HV_INTERFACE.to_bytes(4, "little") == b"Hv#1"


def test_linux_says_who_it_is() -> None:
    """Open source, type Linux, and the version code."""
    assert linux_guest_os_id(0x060C75) == 0x8100_0006_0C75_0000


def test_each_register_has_one_name() -> None:
    """16 SINTs, 4 timers of two registers, 5 crash parameters and 19 others, each with a name of its own."""
    assert len(MSR_NAMES) == len(set(MSR_NAMES.values())) == 16 + 8 + 5 + 19
    assert MSR_NAMES[HV_X64_MSR_SINT15] == "SINT15" and HV_X64_MSR_SINT15 == HV_X64_MSR_SINT0 + 15
    assert MSR_NAMES[HV_X64_MSR_STIMER3_COUNT] == "STIMER3_COUNT"
    assert HV_X64_MSR_STIMER3_COUNT == HV_X64_MSR_STIMER0_CONFIG + 7


def test_message_is_written_as_spelled_out() -> None:
    """REQUESTOFFERS as it lies in a slot: type 1, 8 bytes, pending, from port 1."""
    message = HvMessage(HVMSG_CHANNEL_MESSAGE, bytes.fromhex("0300000000000000"), message_flags=1, sender=1)

    assert message.pack()[:24].hex() == "010000000801000001000000000000000300000000000000"
    assert message.pack()[24:] == bytes(232)


def test_timer_message_is_written_as_spelled_out() -> None:
    """Timer 0, due at 0x1000, delivered at 0x1002."""
    message = HvMessage(HVMSG_TIMER_EXPIRED, TIMER_PAYLOAD.pack(0, 0x1000, 0x1002))

    assert message.pack()[:40].hex() == (
        "10000080180000000000000000000000000000000000000000100000000000000210000000000000"
    )


@given(st.integers(0, 0xFFFF_FFFF), st.binary(max_size=240), st.integers(0, 255), st.integers(0, (1 << 64) - 1))
@settings(deadline=None)
def test_message_survives_a_round_trip(kind: int, payload: bytes, flags: int, sender: int) -> None:
    """What was written is what is read."""
    message = HvMessage(kind, payload, flags, sender)

    assert HvMessage.unpack(message.pack()) == message


@pytest.mark.parametrize("size", [241, 255])
def test_slot_that_claims_more_than_240_bytes_gives_240(size: int) -> None:
    """The peer may write any byte there; nothing beyond the slot is read."""
    data = bytearray(HvMessage(1, b"\xaa" * 240).pack())
    data[4] = size

    assert HvMessage.unpack(bytes(data)).payload == b"\xaa" * 240
