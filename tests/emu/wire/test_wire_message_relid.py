"""Which channel a message is about, told from its bytes."""

from __future__ import annotations

from uuid import UUID

import pytest

from emu.wire.message_relid import relid_of
from emu.wire.messages import (
    CloseChannel,
    GpadlTeardown,
    GpadlTorndown,
    Message,
    ModifyChannel,
    OfferChannel,
    OpenChannelResult,
    RelidReleased,
    RequestOffers,
    RescindChannelOffer,
)

OFFER = OfferChannel(if_type=UUID(int=1), if_instance=UUID(int=2), child_relid=7, connection_id=0x2007)


@pytest.mark.parametrize(
    ("message", "relid"),
    [
        (OFFER, 7),
        (RescindChannelOffer(7), 7),
        (OpenChannelResult(7, 1, 0), 7),
        (CloseChannel(7), 7),
        (GpadlTeardown(7, 0xE1E10), 7),
        (ModifyChannel(7, 1), 7),
        (RelidReleased(7), 7),
        (GpadlTorndown(0xE1E10), 0),
        (RequestOffers(), 0),
    ],
)
def test_relid_of_a_message(message: Message, relid: int) -> None:
    """As its class has it; 0 where it names none."""
    assert relid_of(message.pack()) == relid


@pytest.mark.parametrize("payload", [b"", b"\x02", b"\x02\0\0\0\0\0\0\0", b"\xff" * 20])
def test_bytes_that_are_no_message_name_none(payload: bytes) -> None:
    """A guest may post anything."""
    assert relid_of(payload) == 0
