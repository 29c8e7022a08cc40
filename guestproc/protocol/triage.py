"""What to do with a message from the slot: the decisions of `vmbus_on_msg_dpc`, on a private copy.

The host's bytes are not trusted: a type beyond the table, a payload longer than a message, one shorter than
its handler needs, a type that has no handler: each is dropped, with the kernel's line in the log. Era `seed`
knows no lengths, and leaves a type without a handler to the worker; its kernel reads the shared slot itself,
as often as it likes, where ours reads the copy in both eras.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from emu.errors import ProtocolViolation
from emu.switches import ALL_FIXED, Fix
from emu.values import valueclass
from emu.wire.messages import MAX_MESSAGE_SIZE, MessageType
from guestproc.kernel.workqueue import QueueNumber
from guestproc.protocol.era import Era, HandlerType, TableEntry

MESSAGE_BYTES: Final = 256
_HEAD: Final = Struct("<IBBHQI")
"""message_type, payload_size, message_flags, reserved, sender; then msgtype, the payload's first word."""


@valueclass()
class Triage:
    """A message looked at: its types and payload, the table's entry (None: drop it), what is wrong with it."""

    message_type: int
    msgtype: int
    payload: bytes
    entry: TableEntry | None
    complaint: ProtocolViolation | None = None

    @property
    def blocking(self) -> bool:
        """Whether its handler may sleep, so that it must go to a queue."""
        return self.entry is not None and self.entry.handler_type == HandlerType.BLOCKING

    @property
    def is_offer(self) -> bool:
        """Whether it counts in offer_in_progress."""
        return self.msgtype == MessageType.OFFERCHANNEL

    @property
    def is_rescind(self) -> bool:
        """Whether it goes to the queue of its own."""
        return self.msgtype == MessageType.RESCIND_CHANNELOFFER

    def queue(self, era: Era, fix: Fix = ALL_FIXED) -> QueueNumber:
        """Where a blocking message goes: what may cancel a wait must not stand behind the one who waits.

        On one queue with the offers (races.md A2, wrong on purpose) it does.
        """
        return era.rescind_queue if self.is_rescind and fix.rescind_own_queue else era.offer_queue


def triage(era: Era, copy: bytes) -> Triage:
    """Look at a copy of the whole 256-byte slot; the slot itself is not read again."""
    message_type, payload_size, _flags, _reserved, _sender, msgtype = _HEAD.unpack_from(copy)
    if msgtype >= era.channelmsg_count:
        refusal = _wrong("unknown-msgtype", f"unknown msgtype={msgtype}", "msgtype", msgtype)
        return Triage(message_type, msgtype, b"", None, refusal)
    if era.checks_lengths and payload_size > MAX_MESSAGE_SIZE:
        text = f"payload size is too large ({payload_size})"
        return Triage(message_type, msgtype, b"", None, _wrong("message-too-long", text, "payload_size", payload_size))
    entry = era.channel_message_table[msgtype]
    payload = payload_of(era, copy)
    if not entry.message_handler:
        return Triage(message_type, msgtype, payload, entry if era.queues_unhandled else None)
    if payload_size < entry.min_payload_len:
        text = f"message too short: msgtype={msgtype} len={payload_size}"
        refusal = _wrong("message-too-short", text, "payload_size", payload_size)
        return Triage(message_type, msgtype, payload, None, refusal)
    return Triage(message_type, msgtype, payload, entry)


def payload_of(era: Era, copy: bytes) -> bytes:
    """The payload of a message: what its size says, or all that is behind the header where no size counts."""
    return copy[16 : 16 + copy[4]] if era.checks_lengths else copy[16:]


def _wrong(rule: str, text: str, field: str, value: int) -> ProtocolViolation:
    return ProtocolViolation(text, rule=rule, field=field, value=value)
