"""What is done with a message from the slot, for every type at every length."""

from __future__ import annotations

from itertools import product

import pytest

from emu.wire.messages import MESSAGES, MessageType
from emu.wire.synic import HVMSG_CHANNEL_MESSAGE, HVMSG_NONE
from guestproc.kernel.layout import Era as EraNumber
from guestproc.kernel.layout import KernelTables
from guestproc.kernel.workqueue import QueueNumber
from guestproc.protocol.era import CURRENT, ERAS, SEED, HandlerType, era_of
from guestproc.protocol.triage import MESSAGE_BYTES, payload_of, triage
from guestproc.vmbus.channel_mgmt import MESSAGE_HANDLERS

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


def test_table_of_the_seed_is_that_kernels() -> None:
    """22 types, the same handlers with the same flags but for MODIFYCHANNEL_RESPONSE, and not one least length."""
    table = SEED.channel_message_table

    assert list(table) == list(range(22)) == [int(entry.msgtype) for entry in table.values()]
    assert {entry.msgtype: entry.handler_type for entry in table.values() if entry.message_handler} == {
        msgtype: kind for msgtype, (kind, _least) in HANDLED.items() if msgtype < 22
    }
    assert {entry.handler_type for entry in table.values() if not entry.message_handler} == {HandlerType.BLOCKING}
    assert {entry.min_payload_len for entry in table.values()} == {0}
    for number, entry in table.items():
        assert entry.message_handler == CURRENT.channel_message_table[number].message_handler


@pytest.mark.parametrize("name", list(ERAS))
def test_every_handler_of_a_table_exists(name: str) -> None:
    """The table names functions; each is there under its name."""
    entries = ERAS[name].channel_message_table.values()

    assert {entry.message_handler for entry in entries} - {""} <= set(MESSAGE_HANDLERS)


def test_era_is_found_by_what_guest_ram_says(tables: KernelTables) -> None:
    """Any process that attaches knows which kernel this is."""
    assert era_of(tables) is CURRENT
    assert {era.number for era in ERAS.values()} == set(EraNumber)


@pytest.mark.parametrize("msgtype", range(22))
def test_seed_handles_every_type_at_every_length(msgtype: int) -> None:
    """A known type is never dropped: the handler gets the slot to its end; one without a handler is queued."""
    handled = HANDLED.get(MessageType(msgtype))
    for size in range(256):
        message = triage(SEED, slot(msgtype, size))

        assert message.complaint is None
        assert message.entry is SEED.channel_message_table[msgtype]
        assert message.blocking == (handled is None or handled[0] is HandlerType.BLOCKING)
        assert message.payload == slot(msgtype, size)[16:] == payload_of(SEED, slot(msgtype, size))


@pytest.mark.parametrize("msgtype", [22, 24, 25, 0xFFFFFFFF])
def test_type_beyond_the_table_of_the_seed_is_unknown(msgtype: int) -> None:
    """Also those that came later: dropped with the kernel's line."""
    message = triage(SEED, slot(msgtype, 16))

    assert message.entry is None
    assert str(message.complaint) == f"unknown msgtype={msgtype}"


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
    assert (offer.queue(SEED), rescind.queue(SEED)) == (QueueNumber.WORK, QueueNumber.SYSTEM)
