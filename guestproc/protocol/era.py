"""What differs between the kernels that the guest can be: a policy that a scenario picks, not two copies of code.

`current` is 6.x: versions 5.3 down to 2.4, 25 message types with least lengths, a private copy of each message,
a global relid table, a rescind queue of its own. Another era is another value of `Era`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from emu.wire.messages import MessageType
from emu.wire.versions import (
    VERSION_WIN8,
    VERSION_WIN8_1,
    VERSION_WIN10,
    VERSION_WIN10_V4_1,
    VERSION_WIN10_V5,
    VERSION_WIN10_V5_1,
    VERSION_WIN10_V5_2,
    VERSION_WIN10_V5_3,
)
from guestproc.kernel.workqueue import QueueNumber


class HandlerType(IntEnum):
    """Where a message's handler runs (`VMHT_BLOCKING`, `VMHT_NON_BLOCKING`)."""

    BLOCKING = 0
    NON_BLOCKING = 1


@dataclass(frozen=True, slots=True)
class TableEntry:
    """One entry of `channel_message_table`: the handler's kernel name ("" is NULL), its type, least length."""

    msgtype: MessageType
    handler_type: HandlerType
    message_handler: str
    min_payload_len: int


@dataclass(frozen=True, slots=True)
class Era:
    """One kernel's ways."""

    name: str
    versions: tuple[int, ...]
    channel_message_table: Mapping[int, TableEntry]
    offer_queue: QueueNumber
    rescind_queue: QueueNumber

    @property
    def channelmsg_count(self) -> int:
        """CHANNELMSG_COUNT: a message type at or above it is unknown."""
        return len(self.channel_message_table)


_BLOCKING: Final = {
    MessageType.OFFERCHANNEL: ("vmbus_onoffer", 196),
    MessageType.RESCIND_CHANNELOFFER: ("vmbus_onoffer_rescind", 12),
}
_NON_BLOCKING: Final = {
    MessageType.ALLOFFERS_DELIVERED: ("vmbus_onoffers_delivered", 0),
    MessageType.OPENCHANNEL_RESULT: ("vmbus_onopen_result", 20),
    MessageType.GPADL_CREATED: ("vmbus_ongpadl_created", 20),
    MessageType.GPADL_TORNDOWN: ("vmbus_ongpadl_torndown", 12),
    MessageType.VERSION_RESPONSE: ("vmbus_onversion_response", 16),
    MessageType.UNLOAD_RESPONSE: ("vmbus_unload_response", 0),
    MessageType.MODIFYCHANNEL_RESPONSE: ("vmbus_onmodifychannel_response", 16),
}


def _table(count: int) -> dict[int, TableEntry]:
    entries = {}
    for number in range(count):
        msgtype = MessageType(number)
        if msgtype in _NON_BLOCKING:
            handler, least = _NON_BLOCKING[msgtype]
            entries[number] = TableEntry(msgtype, HandlerType.NON_BLOCKING, handler, least)
        else:
            handler, least = _BLOCKING.get(msgtype, ("", 0))
            entries[number] = TableEntry(msgtype, HandlerType.BLOCKING, handler, least)
    return entries


CURRENT: Final = Era(
    name="current",
    versions=(
        VERSION_WIN10_V5_3,
        VERSION_WIN10_V5_2,
        VERSION_WIN10_V5_1,
        VERSION_WIN10_V5,
        VERSION_WIN10_V4_1,
        VERSION_WIN10,
        VERSION_WIN8_1,
        VERSION_WIN8,
    ),
    channel_message_table=_table(25),
    offer_queue=QueueNumber.WORK,
    rescind_queue=QueueNumber.RESCIND,
)

ERAS: Final = {era.name: era for era in (CURRENT,)}
