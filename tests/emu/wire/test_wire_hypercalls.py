"""Hypercalls: control words, the two inputs that VMBus uses, statuses."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu.wire.hypercalls import (
    FAST_SIGNAL_EVENT,
    HV_HYPERCALL_NESTED,
    HV_HYPERCALL_RESERVED_MASK,
    HVCALL_POST_MESSAGE,
    HVCALL_SIGNAL_EVENT,
    HvStatus,
    PostMessageInput,
    call_code,
    is_fast,
    is_simple,
    rep_count,
    rep_start,
    result_status,
    signal_event_input,
    split_signal_event,
)


def test_fast_signal_event_is_0x1005d() -> None:
    """The one control word that drivers use: code 0x5D in a fast call."""
    assert FAST_SIGNAL_EVENT == 0x1005D
    assert (call_code(FAST_SIGNAL_EVENT), is_fast(FAST_SIGNAL_EVENT)) == (HVCALL_SIGNAL_EVENT, True)
    assert (call_code(HVCALL_POST_MESSAGE), is_fast(HVCALL_POST_MESSAGE)) == (0x5C, False)


def test_control_word_is_taken_apart() -> None:
    """Rep count in 43:32, rep start in 59:48."""
    control = 0x5C | 0xABC << 32 | 0x123 << 48

    assert (call_code(control), rep_count(control), rep_start(control)) == (0x5C, 0xABC, 0x123)


@pytest.mark.parametrize("bit", range(64))
def test_only_code_and_fast_bit_are_simple(bit: int) -> None:
    """Reps, a variable header, nesting and reserved bits make a call that VMBus never makes."""
    assert is_simple(1 << bit) == (bit <= 16)


def test_every_bit_of_the_control_word_has_one_meaning() -> None:
    """Code, fast, header size, nested, rep count, rep start and reserved bits cover 64 bits once."""
    fields = [0xFFFF, 1 << 16, 0x3FF << 17, HV_HYPERCALL_NESTED, 0xFFF << 32, 0xFFF << 48]

    assert sum(fields) + HV_HYPERCALL_RESERVED_MASK == (1 << 64) - 1


def test_signal_event_is_one_word() -> None:
    """Connection id, flag number, and nothing above."""
    assert signal_event_input(0x2005) == 0x2005
    assert signal_event_input(0x2005, 7) == 0x7_0000_2005
    assert split_signal_event(0xBEEF_0007_0000_2005) == (0x2005, 7, 0xBEEF)


@given(st.integers(0, 0xFFFF_FFFF), st.integers(0, 0xFFFF))
@settings(deadline=None)
def test_signal_event_survives_a_round_trip(connection_id: int, flag_number: int) -> None:
    """What was put in comes out."""
    assert split_signal_event(signal_event_input(connection_id, flag_number)) == (
        connection_id,
        flag_number,
        0,
    )


def test_post_message_input_is_256_bytes() -> None:
    """Connection id, reserved, type, size, then 240 bytes of payload."""
    data = PostMessageInput.of(4, 1, bytes.fromhex("0300000000000000")).pack()

    assert data.hex() == "040000000000000001000000080000000300000000000000" + bytes(232).hex()


@given(st.integers(0, 0xFFFF_FFFF), st.integers(1, 0x7FFF_FFFF), st.binary(max_size=240))
@settings(deadline=None)
def test_post_message_input_survives_a_round_trip(connectionid: int, kind: int, payload: bytes) -> None:
    """What was posted is what arrives, and it is in order."""
    posted = PostMessageInput.of(connectionid, kind, payload)

    assert PostMessageInput.unpack(posted.pack()) == posted
    assert posted.status is HvStatus.SUCCESS


@pytest.mark.parametrize(
    ("message_type", "payload_size", "status"),
    [
        (1, 0, HvStatus.SUCCESS),
        (1, 239, HvStatus.SUCCESS),
        (1, 240, HvStatus.SUCCESS),
        (1, 241, HvStatus.INVALID_PARAMETER),
        (1, 0xFFFFFFFF, HvStatus.INVALID_PARAMETER),
        (0, 8, HvStatus.INVALID_PARAMETER),
        (0x80000000, 8, HvStatus.INVALID_PARAMETER),
        (0x80000010, 8, HvStatus.INVALID_PARAMETER),
        (0x7FFFFFFF, 8, HvStatus.SUCCESS),
    ],
)
def test_status_of_what_a_guest_may_write(message_type: int, payload_size: int, status: HvStatus) -> None:
    """Type 0, a hypervisor's type and a size beyond 240 are INVALID_PARAMETER; nothing raises."""
    posted = PostMessageInput(1, message_type, payload_size, bytes(240))

    assert PostMessageInput.unpack(posted.pack()).status is status


def test_status_is_the_low_half_of_a_result() -> None:
    """Bits 15:0; the reps done are above."""
    assert result_status(3 << 32 | 0x13) == HvStatus.INSUFFICIENT_BUFFERS
