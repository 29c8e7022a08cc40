"""What is done with a message from the slot, for every type at every length."""

from __future__ import annotations

from itertools import product

import pytest

from emu.wire.messages import MESSAGES, MessageType
from emu.wire.synic import HVMSG_CHANNEL_MESSAGE, HVMSG_NONE
from guestproc.kernel.workqueue import QueueNumber
from guestproc.protocol.era import CURRENT, HandlerType
from guestproc.protocol.triage import MESSAGE_BYTES, payload_of, triage

HANDLED = {
    MessageType.OFFERCHANNEL: (HandlerType.BLOCKING, 196),
    MessageType.RESCIND_CHANNELOFFER: (HandlerType.BLOCKING, 12),
    MessageType.ALLOFFERS_DELIVERED: (HandlerType.NON_BLOCKING, 0),
    MessageType.OPENCHANNEL_RESULT: (HandlerType.NON_BLOCKING, 20),
    MessageType.GPADL_CREATED: (HandlerType.NON_BLOCKING, 20),
    MessageType.GPADL_TORNDOWN: (HandlerType.NON_BLOCKING, 12),
    MessageType.VERSION_RESPONSE: (HandlerType.NON_BLOCKING, 16),
    MessageType.UNLOAD_RESPONSE: (HandlerType.NON_BLOCKING, 0),
    MessageType.MODIFYCHANNEL_RESPONSE: (HandlerType.NON_BLOCKING, 16),
}
"""The types of 6.12 that have a handler: where it runs, and the least length (reference 2.2)."""


def slot(msgtype: int, payload_size: int, *, message_type: int = HVMSG_CHANNEL_MESSAGE) -> bytes:
    """A slot of 256 bytes: header, then a payload that is stale behind its size."""
    head = message_type.to_bytes(4, "little") + bytes([payload_size, 1, 0, 0]) + (1).to_bytes(8, "little")
    return (head + msgtype.to_bytes(4, "little") + bytes(range(4, 240))).ljust(MESSAGE_BYTES, b"\xaa")


def test_table_is_the_kernels() -> None:
    """25 types; handlers, blocking flags and least lengths are those of the reference, and of the wire table."""
    table = CURRENT.channel_message_table

    assert CURRENT.channelmsg_count == 25
    assert {
        entry.msgtype: (entry.handler_type, entry.min_payload_len) for entry in table.values() if entry.message_handler
    } == HANDLED
    assert all(
        entry.min_payload_len == MESSAGES[entry.msgtype].min_payload_len for entry in table.values() if entry.msgtype
    )


@pytest.mark.parametrize("msgtype", range(25))
def test_every_type_at_every_length(msgtype: int) -> None:
    """A handled type is handled from its least length on; below it, and for other types, it is dropped."""
    handled = HANDLED.get(MessageType(msgtype))
    for size in range(256):
        message = triage(CURRENT, slot(msgtype, size))
        if size > 240:
            assert message.entry is None
            assert message.complaint is not None
            assert message.complaint.rule == "message-too-long"
        elif handled is None:
            assert (message.entry, message.complaint) == (None, None)
        elif size < handled[1]:
            assert message.entry is None
            assert message.complaint is not None
            assert str(message.complaint) == f"message too short: msgtype={msgtype} len={size}"
        else:
            assert message.entry is not None
            assert message.complaint is None
            assert message.blocking == (handled[0] is HandlerType.BLOCKING)
            assert len(message.payload) == size


@pytest.mark.parametrize("msgtype", [25, 29, 30, 0x7FFFFFFF, 0xFFFFFFFF])
def test_type_beyond_the_table_is_unknown(msgtype: int) -> None:
    """Whatever its length; also the types of 6.0, which this kernel does not know."""
    for size in (0, 8, 240, 255):
        message = triage(CURRENT, slot(msgtype, size))

        assert message.entry is None
        assert message.complaint is not None
        assert str(message.complaint) == f"unknown msgtype={msgtype}"


def test_empty_slot_is_said_to_be_empty() -> None:
    """The slot's own type comes out as it was read, whatever lies in the payload."""
    for message_type, size in product((HVMSG_NONE, HVMSG_CHANNEL_MESSAGE, 0x80000010), (0, 12, 240)):
        assert triage(CURRENT, slot(2, size, message_type=message_type)).message_type == message_type


def test_payload_ends_where_its_size_says() -> None:
    """Stale bytes behind the size are no part of the payload, neither now nor in the queued copy."""
    copy = slot(2, 12)

    message = triage(CURRENT, copy)

    assert message.payload == payload_of(CURRENT, copy) == copy[16:28]


def test_rescind_does_not_queue_behind_offers() -> None:
    """A rescind may cancel what an offer's handling waits for, so it has a queue of its own (races.md A2)."""
    offer = triage(CURRENT, slot(MessageType.OFFERCHANNEL, 196))
    rescind = triage(CURRENT, slot(MessageType.RESCIND_CHANNELOFFER, 12))

    assert (offer.is_offer, offer.is_rescind, offer.queue(CURRENT)) == (True, False, QueueNumber.WORK)
    assert (rescind.is_offer, rescind.is_rescind, rescind.queue(CURRENT)) == (False, True, QueueNumber.RESCIND)
