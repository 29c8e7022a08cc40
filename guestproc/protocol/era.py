"""What differs between the kernels that the guest can be: a policy that a scenario picks, not two copies of code.

`current` is 6.x: versions 5.3 down to 2.4, 25 message types with least lengths, a global relid table, a rescind
queue of its own. `seed` is about 5.0: versions 4.0 down to 0.13, 22 types without least lengths, a list of
channels for each processor that is edited by IPI, rescinds on the system queue. Another era is another value
of `Era`; whoever does something differently asks the value, never its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Final

from emu.values import valueclass
from emu.wire.messages import MessageType
from emu.wire.versions import (
    VERSION_WIN7,
    VERSION_WIN8,
    VERSION_WIN8_1,
    VERSION_WIN10,
    VERSION_WIN10_V4_1,
    VERSION_WIN10_V5,
    VERSION_WIN10_V5_1,
    VERSION_WIN10_V5_2,
    VERSION_WIN10_V5_3,
    VERSION_WS2008,
)
from guestproc.kernel.layout import Era as EraNumber
from guestproc.kernel.layout import KernelTables
from guestproc.kernel.workqueue import QueueNumber

SHARED_INTERRUPT_VERSIONS: Final = frozenset({VERSION_WS2008, VERSION_WIN7})
"""One interrupt for all channels: flag 0, then the bits of the interrupt page."""
JIFFY_NS: Final = 4_000_000
"""HZ is 250."""


class HandlerType(IntEnum):
    """Where a message's handler runs (`VMHT_BLOCKING`, `VMHT_NON_BLOCKING`)."""

    BLOCKING = 0
    NON_BLOCKING = 1


@valueclass()
class TableEntry:
    """One entry of `channel_message_table`: the handler's kernel name ("" is NULL), its type, least length."""

    msgtype: MessageType
    handler_type: HandlerType
    message_handler: str
    min_payload_len: int


@valueclass()
class Era:
    """One kernel's ways."""

    name: str
    number: EraNumber
    linux_version_code: int
    versions: tuple[int, ...]
    """Those it asks for, in this order."""
    channel_message_table: Mapping[int, TableEntry]
    offer_queue: QueueNumber
    rescind_queue: QueueNumber
    checks_lengths: bool
    """Whether a message's size counts. Else handlers read the slot as far as they like, whatever it says."""
    queues_unhandled: bool
    """Whether a message without a handler is queued like any blocking one, for the worker to complain of."""
    percpu_lists: bool
    """Whether an interrupt finds its channel on its processor's chan_list; else in the relid table."""
    early_offer_done: bool
    """Whether an offer stops counting before it is entered; either way rescinds wait for the mutex around both."""
    target_vcpu_from_3_0: bool
    """Whether target_vcpu is 0 in requests for older versions; else always the VP of the connect CPU."""
    event_slice_ns: int
    """How long one run of `vmbus_on_event` goes on with a ring that does not run empty."""

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


def _table(count: int, *, lengths: bool) -> dict[int, TableEntry]:
    entries = {}
    for number in range(count):
        msgtype = MessageType(number)
        kind = HandlerType.NON_BLOCKING if msgtype in _NON_BLOCKING else HandlerType.BLOCKING
        handler, least = (_NON_BLOCKING | _BLOCKING).get(msgtype, ("", 0))
        entries[number] = TableEntry(msgtype, kind, handler, least if lengths else 0)
    return entries


CURRENT: Final = Era(
    name="current",
    number=EraNumber.CURRENT,
    linux_version_code=0x060C75,  # 6.12.117
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
    channel_message_table=_table(25, lengths=True),
    offer_queue=QueueNumber.WORK,
    rescind_queue=QueueNumber.RESCIND,
    checks_lengths=True,
    queues_unhandled=False,
    percpu_lists=False,
    early_offer_done=False,
    target_vcpu_from_3_0=False,
    event_slice_ns=0,
)

SEED: Final = Era(
    name="seed",
    number=EraNumber.SEED,
    linux_version_code=0x050000,
    versions=(VERSION_WIN10, VERSION_WIN8_1, VERSION_WIN8, VERSION_WIN7, VERSION_WS2008),
    channel_message_table=_table(22, lengths=False),
    offer_queue=QueueNumber.WORK,
    rescind_queue=QueueNumber.SYSTEM,
    checks_lengths=False,
    queues_unhandled=True,
    percpu_lists=True,
    early_offer_done=True,
    target_vcpu_from_3_0=True,
    event_slice_ns=2 * JIFFY_NS,
)

ERAS: Final = {era.name: era for era in (CURRENT, SEED)}
_BY_NUMBER: Final = {era.number: era for era in ERAS.values()}


def era_of(tables: KernelTables) -> Era:
    """The era of the kernel whose records these are."""
    return _BY_NUMBER[tables.era]
