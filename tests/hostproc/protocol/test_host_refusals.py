"""What an author is told of a guest's mistake: which channel, which message, why."""

from __future__ import annotations

from dataclasses import replace

import pytest

from emu.wire.messages import CloseChannel, GpadlHeader, GpadlTeardown, Message, Unload, gpadl_messages
from hostproc.protocol.effects import Refused
from tests.hostproc.protocol.fake_partition import RAM_BYTES, RING, World, open_channel

RING_PAGES = range(0x200, 0x208)
OUTSIDE = RAM_BYTES >> 12


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([open_channel()], f"OPENCHANNEL of 1: ringbuffer_gpadlhandle {RING:#x}: the channel has no such GPADL"),
        (
            [gpadl_messages(1, RING, range(0x200, 0x240))[0], open_channel()],
            f"OPENCHANNEL of 1: ringbuffer_gpadlhandle {RING:#x}: that GPADL is IN_PROGRESS: wait for GPADL_CREATED",
        ),
        (
            [*gpadl_messages(1, RING, RING_PAGES), open_channel(downstream_ringbuffer_pageoffset=0x4000)],
            "OPENCHANNEL of 1: downstream_ringbuffer_pageoffset 0x4000: "
            "each of the two rings has two pages at least, and the GPADL has 8",
        ),
        (
            [*gpadl_messages(1, RING, RING_PAGES), open_channel(target_vp=4)],
            "OPENCHANNEL of 1: target_vp 0x4: VP indices are 0 to 3",
        ),
        (
            [*gpadl_messages(1, RING, RING_PAGES), open_channel(), open_channel()],
            "channel 1: OPENCHANNEL while the channel is OPEN",
        ),
        ([CloseChannel(1)], "channel 1: CLOSECHANNEL while the channel is CLOSED"),
        (
            [gpadl_messages(1, RING, range(0x200, 0x240))[0], GpadlTeardown(1, RING)],
            f"GPADL {RING:#x} of channel 1: GPADL_TEARDOWN while the gpadl is IN_PROGRESS",
        ),
        (gpadl_messages(1, RING, [OUTSIDE]), f"GPADL: page {OUTSIDE:#x}, and RAM has {OUTSIDE:#x}"),
    ],
)
def test_a_refusal_says_of_what_it_is_and_why(messages: list[Message], text: str) -> None:
    """Who reads it sees no state of the host's: the number, the field and what it should have been are in the line."""
    world = World()
    world.offer()
    world.connect()
    world.request_offers()
    world.post(*messages)

    (refused,) = world.happened(Refused)
    assert isinstance(refused, Refused)
    assert refused.text == text


@pytest.mark.parametrize("pages", [9, 27])
def test_a_gpadl_that_says_more_than_comes_is_told_when_the_guest_leaves(pages: int) -> None:
    """It had no answer, since a body might have come still: so its author hears of it at the end at the latest."""
    world = World()
    world.offer()
    world.connect()
    world.request_offers()
    (whole,) = gpadl_messages(1, RING, RING_PAGES)
    assert isinstance(whole, GpadlHeader)
    world.post(replace(whole, range_buflen=8 + 8 * pages))
    assert world.refused() == [] and world.sent() == []

    world.post(Unload())

    (noted,) = world.happened(Refused)
    assert isinstance(noted, Refused) and (noted.rule, noted.legal) == ("gpadl-never-complete", True)
    assert noted.text.startswith(f"GPADL {RING:#x} of channel 1: 72 of the {8 + 8 * pages} bytes of ranges came")


def test_a_gpadl_that_is_whole_is_not_told_of() -> None:
    """Nor is one that was given back."""
    world = World()
    world.offer()
    world.connect()
    world.request_offers()
    world.post(*gpadl_messages(1, RING, RING_PAGES), *gpadl_messages(1, RING + 1, range(0x300, 0x340)), Unload())

    assert world.refused() == []
