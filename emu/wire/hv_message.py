"""`hv_message`: what lies in a slot of the message page, as a value."""

from __future__ import annotations

from struct import Struct
from typing import ClassVar, Self

from emu.values import valueclass
from emu.wire.synic import HV_MESSAGE_PAYLOAD_BYTE_COUNT


@valueclass()
class HvMessage:
    """`hv_message`: what lies in a slot of the message page."""

    LAYOUT: ClassVar[Struct] = Struct("<IBBxxQ240s")

    message_type: int
    payload: bytes
    message_flags: int = 0
    sender: int = 0

    def pack(self) -> bytes:
        """Write 256 bytes, filled up with zeros; `payload_size` is the payload's length."""
        assert len(self.payload) <= HV_MESSAGE_PAYLOAD_BYTE_COUNT, len(self.payload)
        return self.LAYOUT.pack(self.message_type, len(self.payload), self.message_flags, self.sender, self.payload)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Read a private copy of a slot (256 bytes); a `payload_size` beyond 240 gives 240 bytes."""
        message_type, payload_size, message_flags, sender, payload = cls.LAYOUT.unpack(data)
        return cls(message_type, payload[:payload_size], message_flags, sender)
