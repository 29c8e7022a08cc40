"""Why a guest that has left never saw what the host had for it: one cause each, by the state of its SynIC."""

from __future__ import annotations

from emu.memory import GuestMemory
from emu.synic import Synic
from emu.wire.hv_message import HvMessage
from emu.wire.synic import (
    HV_X64_MSR_SCONTROL,
    HV_X64_MSR_SIMP,
    HV_X64_MSR_SINT0,
    HVMSG_CHANNEL_MESSAGE,
    HVMSG_TIMER_EXPIRED,
    page_register,
)
from hostproc.undelivered import undelivered

SINT, VECTOR = 2, 0xF3


def synic_with(message_type: int = 0, *, sint: int = VECTOR, scontrol: int = 1, simp: bool = True) -> Synic:
    """A SynIC whose slot of SINT 2 holds such a message, a VERSION_RESPONSE, or nothing."""
    synic = Synic(GuestMemory.on(bytearray(0x4000)))
    synic.write_msr(HV_X64_MSR_SCONTROL, 1)
    synic.write_msr(HV_X64_MSR_SIMP, page_register(0x1000))
    synic.write_msr(HV_X64_MSR_SINT0 + SINT, sint)
    if message_type:
        synic.write_slot(SINT, HvMessage(message_type, bytes([15, 0, 0, 0])).pack())
    synic.write_msr(HV_X64_MSR_SCONTROL, scontrol)
    if not simp:
        synic.write_msr(HV_X64_MSR_SIMP, 0)
    return synic


def told(synic: Synic, waiting: int, *, requested: int = 0, in_service: int = 0) -> str:
    """What is told of it; the count is the one that the text begins with."""
    found = undelivered(synic, 7, SINT, waiting, requested=requested, in_service=in_service)
    assert found is not None
    refused, count = found
    number, _, rest = refused.text.partition(" ")
    assert (int(number), refused.value, refused.legal) == (count, count, True)
    return f"{count} {rest.partition('not taken: ')[2]}"


def test_an_empty_slot_and_an_empty_queue_are_nothing_to_tell() -> None:
    """A guest that took everything, and one whose slot holds a timer's message, have missed nothing of the bus's."""
    assert undelivered(synic_with(), 0, SINT, 0) is None
    assert undelivered(synic_with(HVMSG_TIMER_EXPIRED), 0, SINT, 0) is None


def test_a_slot_that_was_emptied_without_eom() -> None:
    """Messages wait although the slot is empty: only EOM brings the next one."""
    assert told(synic_with(), 3).startswith("3 the slot was emptied, and EOM (MSR 0x40000084) not written")


def test_a_masked_sint_comes_before_the_full_slot_that_follows_from_it() -> None:
    """Nobody told the guest that something is in its slot: that is the cause, with the register's value."""
    masked = synic_with(HVMSG_CHANNEL_MESSAGE, sint=0x100F3)

    assert told(masked, 0).startswith("1 the SINT is masked (its register is 0x100f3)")


def test_a_slot_that_was_not_emptied_says_how_far_its_interrupt_came() -> None:
    """Not taken, in service still, taken, or none where the SINT is polled."""
    full, bit = synic_with(HVMSG_CHANNEL_MESSAGE), 1 << VECTOR
    begin = "2 the slot was not emptied (its message_type is 0x1, VERSION_RESPONSE); "

    assert told(full, 1, requested=bit) == begin + "vector 0xf3 is requested, and was not taken"
    assert told(full, 1, in_service=bit, requested=bit) == (
        begin + "vector 0xf3 is in service still: its handler has not ended, or wrote no EOI"
    )
    assert told(full, 1) == begin + "vector 0xf3 was taken"
    assert told(synic_with(HVMSG_CHANNEL_MESSAGE, sint=1 << 18 | VECTOR), 1) == begin + "the SINT is polled"


def test_a_timers_message_keeps_the_slot_too() -> None:
    """It is not counted, but it is what the others wait for."""
    text = "1 the slot was not emptied (its message_type is 0x80000010); vector 0xf3 was taken"

    assert told(synic_with(HVMSG_TIMER_EXPIRED), 1) == text


def test_no_slot_at_all() -> None:
    """SCONTROL or SIMP is off: nothing can be delivered."""
    assert told(synic_with(scontrol=0), 1) == "1 SCONTROL is off"
    assert told(synic_with(simp=False), 1) == "1 SIMP is off"
