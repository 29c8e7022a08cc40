"""Which channel a message is about, read from its bytes without parsing it: for records, never for decisions."""

from __future__ import annotations

from typing import Final

from emu.wire.messages import MessageType

_FIRST: Final = 8
"""Right behind the header, as in most messages."""
_RELID_AT: Final[dict[int, int]] = {
    MessageType.OFFERCHANNEL: 184,
    MessageType.RESCIND_CHANNELOFFER: _FIRST,
    MessageType.OPENCHANNEL: _FIRST,
    MessageType.OPENCHANNEL_RESULT: _FIRST,
    MessageType.CLOSECHANNEL: _FIRST,
    MessageType.GPADL_HEADER: _FIRST,
    MessageType.GPADL_CREATED: _FIRST,
    MessageType.GPADL_TEARDOWN: _FIRST,
    MessageType.RELID_RELEASED: _FIRST,
    MessageType.MODIFYCHANNEL: _FIRST,
    MessageType.MODIFYCHANNEL_RESPONSE: _FIRST,
}


def relid_of(payload: bytes) -> int:
    """The relid that a channel message names; 0 when it names none, or is too short for it."""
    at = _RELID_AT.get(int.from_bytes(payload[:4], "little"))
    return 0 if at is None else int.from_bytes(payload[at : at + 4], "little")
