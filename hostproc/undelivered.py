"""What the host had for a guest that has left, and why the guest never saw it.

A guest that does not empty its slot, writes no EOM, or has masked its SINT breaks no rule, and no message of it is
refused: it hears nothing more, and its author has nothing to go by. So its end is looked at: how many messages were
left over, and which step of the hand-over (reference 1.3) was missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from emu.synic import Synic
from emu.wire.messages import MessageType
from emu.wire.synic import HV_SYNIC_CONTROL_ENABLE, HV_SYNIC_SINT_POLLING, HVMSG_CHANNEL_MESSAGE
from hostproc.protocol.effects import Refused

RULE: Final = "messages-undelivered"


def undelivered(
    synic: Synic, vp_index: int, sint: int, waiting: int, *, requested: int = 0, in_service: int = 0
) -> tuple[Refused, int] | None:
    """Say what was not delivered to (`vp_index`, `sint`), and how many messages that are; None if nothing was.

    `waiting` messages have not been in the slot; `requested` and `in_service` are the VP's words, bit by vector.
    Call it before the partition is reset.
    """
    enabled = synic.messages_enabled()
    resident = synic.slot_type(sint) if enabled else 0
    count = waiting + (resident == HVMSG_CHANNEL_MESSAGE)
    if not count:
        return None
    text = f"{count} message{'s' * (count > 1)} of the host's for SINT {sint} of VP {vp_index} not taken: "
    if not enabled:
        text += "SCONTROL is off" if not synic.scontrol & HV_SYNIC_CONTROL_ENABLE else "SIMP is off"
    elif not resident:
        text += "the slot was emptied, and EOM (MSR 0x40000084) not written although msg_pending was set"
    else:
        text += _why_full(synic, sint, resident, requested, in_service)
    return Refused(RULE, text, "messages", count, legal=True), count


def left_in_rings(relid: int, incoming: tuple[int, int], outgoing: tuple[int, int]) -> Iterator[Refused]:
    """Say why packets of a channel that is closed were never read; each ring is (bytes unread, interrupt_mask).

    The guest's: the host had unmasked it and slept, so no doorbell was rung. The host's: the guest has it masked.
    """
    unread, mask = incoming
    if unread and not mask:
        text = f"channel {relid}: {unread} bytes of the guest's packets not read: "
        yield Refused(
            "packets-unannounced", f"{text}interrupt_mask is 0, and no doorbell rang", "bytes", unread, legal=True
        )
    unread, mask = outgoing
    if unread and mask:
        text = f"channel {relid}: {unread} bytes of the host's packets not read: the guest left interrupt_mask at "
        yield Refused("packets-masked", f"{text}{mask:#x}, so it was not signalled", "interrupt_mask", mask, legal=True)


def _why_full(synic: Synic, sint: int, resident: int, requested: int, in_service: int) -> str:
    """Why a slot with a message in it was not emptied, as far as the processor's state tells."""
    vector = synic.vector_to_raise(sint)
    if synic.masked(sint):
        return f"the SINT is masked (its register is {synic.sint[sint]:#x}), so no interrupt told the guest"
    found = f"the slot was not emptied (its message_type is {resident:#x}"
    msgtype = synic.slot_msgtype(sint)
    if resident == HVMSG_CHANNEL_MESSAGE and msgtype in set(MessageType):
        found += f", {MessageType(msgtype).name}"
    found += ")"
    if synic.sint[sint] & HV_SYNIC_SINT_POLLING:
        return f"{found}; the SINT is polled"
    if in_service >> vector & 1:
        return f"{found}; vector {vector:#x} is in service still: its handler has not ended, or wrote no EOI"
    if requested >> vector & 1:
        return f"{found}; vector {vector:#x} is requested, and was not taken"
    return f"{found}; vector {vector:#x} was taken"
