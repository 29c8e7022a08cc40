"""What to do with a message from the slot: the decisions of `vmbus_on_msg_dpc`, on a private copy.

The host's bytes are not trusted: a type beyond the table, a payload longer than a message, one shorter than
its handler needs, a type that has no handler: each is dropped, with the kernel's line in the log.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import Final

from emu.wire.messages import MAX_MESSAGE_SIZE, MessageType
from guestproc.protocol.era import Era, HandlerType, TableEntry

MESSAGE_BYTES: Final = 256
_HEAD: Final = Struct("<IBBHQI")
"""message_type, payload_size, message_flags, reserved, sender; then msgtype, the payload's first word."""


@dataclass(frozen=True, slots=True)
class Triage:
    """A message looked at: its types and payload, and the table's entry, or why it is dropped."""

    message_type: int
    msgtype: int
    payload: bytes
    entry: TableEntry | None
    complaint: str = ""

    @property
    def blocking(self) -> bool:
        """Whether its handler may sleep, so that it must go to a queue."""
        return self.entry is not None and self.entry.handler_type == HandlerType.BLOCKING

    @property
    def is_offer(self) -> bool:
        """Whether it counts in offer_in_progress."""
        return self.msgtype == MessageType.OFFERCHANNEL


def triage(era: Era, copy: bytes) -> Triage:
    """Look at a copy of the whole 256-byte slot; the slot itself is not read again."""
    message_type, payload_size, _flags, _reserved, _sender, msgtype = _HEAD.unpack_from(copy)
    if msgtype >= era.channelmsg_count:
        return Triage(message_type, msgtype, b"", None, f"unknown msgtype={msgtype}")
    if payload_size > MAX_MESSAGE_SIZE:
        return Triage(message_type, msgtype, b"", None, f"payload size is too large ({payload_size})")
    entry = era.channel_message_table[msgtype]
    payload = copy[16 : 16 + payload_size]
    if not entry.message_handler:
        return Triage(message_type, msgtype, payload, None)
    if payload_size < entry.min_payload_len:
        return Triage(message_type, msgtype, payload, None, f"message too short: msgtype={msgtype} len={payload_size}")
    return Triage(message_type, msgtype, payload, entry)
