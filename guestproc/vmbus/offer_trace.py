"""What the tracepoint `vmbus_onoffer` says of an offer, from the bytes of its message."""

from __future__ import annotations

from struct import Struct
from typing import Final

from emu.event_fields import guid_value
from emu.tracing import EVENTS
from emu.wire.messages import HEADER

_OFFER: Final = Struct("<16s16s16xHH120xH2xIBxHI")
"""As `OfferChannel.LAYOUT`, without what the tracepoint leaves out."""
OFFER_BYTES: Final = HEADER.size + _OFFER.size
_PACK: Final = EVENTS["vmbus_onoffer"].pack


def offer_words(payload: bytes) -> tuple[int, ...]:
    """The words of its record; the message has OFFER_BYTES at least."""
    if_type, if_instance, chn_flags, mmio_mb, sub_idx, child_relid, monitorid, interrupt, connection_id = (
        _OFFER.unpack_from(payload, HEADER.size)
    )
    return _PACK(
        child_relid,
        monitorid,
        interrupt & 1,
        connection_id,
        guid_value(if_type),
        guid_value(if_instance),
        chn_flags,
        mmio_mb,
        sub_idx,
    )
