"""GPADLs on the host: assembly from messages, every refusal, limits, and giving them back."""

from __future__ import annotations

from struct import pack

import pytest

from emu.wire.gpa_range import GpaRange, pack_gpa_ranges
from emu.wire.messages import (
    STATUS_UNSUCCESSFUL,
    CloseChannel,
    GpadlBody,
    GpadlCreated,
    GpadlHeader,
    GpadlTeardown,
    GpadlTorndown,
    Message,
    gpadl_messages,
    split_gpadl,
)
from hostproc.protocol.effects import MapGpadl, OpenDevice, UnmapGpadl
from hostproc.protocol.versions import Limits
from tests.hostproc.protocol.fake_partition import RAM_BYTES, RING, World, open_channel

FAILED = STATUS_UNSUCCESSFUL
RAM_PAGES = RAM_BYTES // 4096


def mapped(world: World) -> list[tuple[GpaRange, ...]]:
    """Return the ranges of the GPADLs that reached a device."""
    return [effect.ranges for effect in world.happened(MapGpadl) if isinstance(effect, MapGpadl)]


def booted(**limits: int) -> World:
    """Return a world with two devices offered, relids 1 and 2."""
    world = World(limits=Limits(vp_count=4, ram_bytes=RAM_BYTES, **limits))  # type: ignore[arg-type]
    world.boot(2)
    return world


@pytest.mark.parametrize("count", [1, 2, 25, 26, 27, 53, 54, 55, 82, 83, 4096, 8190])
def test_gpadl_of_so_many_pages(count: int) -> None:
    """One header and as many bodies as it takes, around every boundary of 26 and 28."""
    world = booted()
    pfns = tuple(range(7, 7 + count))

    messages = gpadl_messages(1, RING, pfns)
    world.post(*messages)

    assert len(messages) == 1 + -(-max(0, count - 26) // 28)
    assert mapped(world) == [(GpaRange(count * 4096, 0, pfns),)]
    assert world.sent() == [GpadlCreated(1, RING, 0)]


@pytest.mark.parametrize("split", range(41))
def test_header_and_body_at_every_split(split: int) -> None:
    """However many words the header brings, bodies bring the rest."""
    ranges = (GpaRange(39 * 4096, 0, tuple(range(39))),)
    data = pack_gpa_ranges(ranges)
    world = booted()
    header = min(split, 27) * 8

    world.post(GpadlHeader(1, RING, len(data), 1, data[:header]))
    while header < len(data):
        step = min(28, max(1, split)) * 8
        world.post(GpadlBody(0, RING, data[header : header + step]))
        header += step

    assert mapped(world) == [ranges]
    assert world.refused() == []


def test_pages_of_a_gpadl_are_told_as_runs() -> None:
    """Neighbours are one run, ranges are apart; there are none before it is whole."""
    world = booted()
    ranges = GpaRange(96, 4000, (9,)), GpaRange(5 * 4096, 0, (20, 21, 7, 8, 22)), GpaRange(2 * 4096, 0, (9, 10))
    data = pack_gpa_ranges(ranges)
    world.post(GpadlHeader(1, RING, len(data), 3, data[:16]))
    assert [one.runs for one in world.server.gpadls_of(1)] == [()]

    world.post(GpadlBody(0, RING, data[16:]))

    assert [one.runs for one in world.server.gpadls_of(1)] == [((9, 1), (20, 2), (7, 2), (22, 1), (9, 2))]


def test_several_ranges() -> None:
    """Ranges follow each other in the byte stream, split anywhere."""
    ranges = (
        GpaRange(96, 4000, (9,)),
        GpaRange(4096, 1, (3, 5)),
        GpaRange(40 * 4096, 0, tuple(range(100, 140))),
        GpaRange(1, 4095, (8,)),
    )
    world = booted()

    world.post(*split_gpadl(1, RING, pack_gpa_ranges(ranges), len(ranges)))

    assert mapped(world) == [ranges]


@pytest.mark.parametrize("count", [1, 26, 27, 30, 54, 55])
def test_padding_behind_the_last_word_is_nothing(count: int) -> None:
    """Firmware posts 240 bytes, whatever it says; a range_buflen that ends inside a word is rounded down."""
    world = booted()
    header, *bodies = gpadl_messages(1, RING, range(count))
    assert isinstance(header, GpadlHeader)
    longer = GpadlHeader(1, RING, header.range_buflen + 7, 1, header.ranges)

    for message in (longer, *bodies):
        world.post_bytes(message.pack().ljust(240, b"\xff"))

    assert mapped(world) == [(GpaRange(count * 4096, 0, tuple(range(count))),)]
    assert world.sent() == [GpadlCreated(1, RING, 0)]


def test_one_body_too_many_is_ignored() -> None:
    """A body for a GPADL that is whole names nothing that could be answered."""
    world = booted()
    world.lend(pages=40)
    world.forget()

    world.post(GpadlBody(0, RING, pack("<Q", 1)), GpadlBody(0, RING + 1, pack("<Q", 1)))

    assert world.refused() == ["gpadl-body-without-header"] * 2
    assert world.sent() == []


def test_a_body_without_a_word_is_ignored() -> None:
    """It brings nothing, and the GPADL goes on."""
    world = booted()
    header, body = gpadl_messages(1, RING, range(40))
    world.post(header, GpadlBody(0, RING, b""), GpadlBody(0, RING, bytes(7)), body)

    assert world.refused() == ["gpadl-body-empty"] * 2
    assert world.sent() == [GpadlCreated(1, RING, 0)]


# Header fields (range_buflen, rangecount, bytes of ranges) and the rule that stands against them.
BAD = {
    "no range": (16, 0, pack("<IIQ", 4096, 0, 1), "gpadl-no-range"),
    "no words": (0, 1, b"", "gpadl-range-buflen"),
    "half a range": (8, 1, pack("<II", 4096, 0), "gpadl-range-buflen"),
    "more ranges than words": (24, 2, pack("<IIQQ", 4096, 0, 1, 1), "gpadl-range-buflen"),
    "no bytes": (16, 1, pack("<IIQ", 0, 0, 1), "gpa-range-empty"),
    "offset of a page": (16, 1, pack("<IIQ", 4096, 4096, 1), "gpa-range-offset"),
    "one page too few": (16, 1, pack("<IIQ", 4097, 0, 1), "gpa-range-truncated"),
    "one page too many": (24, 1, pack("<IIQQ", 4096, 0, 1, 2), "gpadl-words-left"),
    "four gigabytes": (16, 1, pack("<IIQ", 0xFFFFFFFF, 4095, 1), "gpa-range-truncated"),
    "page behind ram": (16, 1, pack("<IIQ", 4096, 0, RAM_PAGES), "gpadl-page-outside-ram"),
    "page far behind ram": (16, 1, pack("<IIQ", 4096, 0, (1 << 64) - 1), "gpadl-page-outside-ram"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_range_in_one_message(case: str) -> None:
    """It is refused by a status, and the handle is usable again."""
    buflen, count, data, rule = BAD[case]
    world = booted()

    world.post(GpadlHeader(1, RING, buflen, count, data))
    assert world.refused() == [rule]
    assert world.sent() == [GpadlCreated(1, RING, FAILED)]
    assert world.server.summary().gpadls == 0 and world.server.summary().gpadl_pages == 0
    world.lend()

    assert world.sent() == [GpadlCreated(1, RING, 0)]


def test_a_bad_range_in_many_messages() -> None:
    """What is wrong at the end of the last body is found, and the handle is usable again."""
    data = pack_gpa_ranges([GpaRange(59 * 4096, 0, (*range(58), RAM_PAGES))])
    world = booted()

    world.post(*split_gpadl(1, RING, data, 1))
    assert world.refused() == ["gpadl-page-outside-ram"]
    assert world.sent() == [GpadlCreated(1, RING, FAILED)]
    world.lend(pages=59)

    assert world.sent() == [GpadlCreated(1, RING, 0)]


def test_a_handle_is_used_once_on_a_channel() -> None:
    """The second is refused, the first stays; another channel may use the same number."""
    world = booted()
    world.lend(1)
    world.forget()

    world.lend(1)
    assert world.refused() == ["gpadl-handle-in-use"]
    assert world.sent() == [GpadlCreated(1, RING, FAILED)]
    world.lend(2)

    assert world.sent() == [GpadlCreated(2, RING, 0)]


def test_a_handle_in_progress_is_everybodys() -> None:
    """Bodies name no channel, so no other channel may begin the same handle; the first goes on unharmed."""
    world = booted()
    header, body = gpadl_messages(1, RING, range(40))
    world.post(header)

    world.post(gpadl_messages(2, RING, range(40))[0], gpadl_messages(1, RING, range(40))[0])
    assert world.refused() == ["gpadl-handle-in-use"] * 2
    assert world.sent() == [GpadlCreated(2, RING, FAILED), GpadlCreated(1, RING, FAILED)]
    world.post(body)

    assert world.sent() == [GpadlCreated(1, RING, 0)]


def test_dropping_a_handle_leaves_the_same_one_in_progress_elsewhere() -> None:
    """Channel 1 gives back its GPADL while channel 2 still posts bodies for the same number."""
    world = booted()
    world.lend(1)
    header, body = gpadl_messages(2, RING, range(40))
    world.post(header, GpadlTeardown(1, RING))
    world.forget()

    world.post(body)

    assert world.sent() == [GpadlCreated(2, RING, 0)]


def test_a_device_that_refuses() -> None:
    """Its refusal is the guest's status, and nothing is kept."""
    world = World(quick=False)
    world.boot()
    world.lend()

    world.answer(MapGpadl, yes=False)

    assert world.sent() == [GpadlCreated(1, RING, FAILED)]
    assert world.server.summary().gpadls == 0


# -- limits --------------------------------------------------------------------------------------------


def refusals(world: World, messages: list[Message]) -> list[str]:
    """Post, and return the rules refused; each refusal must have been answered."""
    world.post(*messages)
    rules = world.refused()
    failed = [m for m in world.sent() if isinstance(m, GpadlCreated) and m.creation_status == FAILED]
    assert len(failed) == len(rules)
    return rules


def test_pages_are_limited_by_ram() -> None:
    """A guest cannot lend more pages than it has, however often it names the same ones."""
    world = booted(gpadl_pages=100)

    assert refusals(world, [*gpadl_messages(1, 1, range(60)), *gpadl_messages(1, 2, range(40))]) == []
    assert refusals(world, gpadl_messages(2, 3, range(1))) == ["gpadl-too-many-pages"]
    world.post(GpadlTeardown(1, 2))

    assert refusals(world, gpadl_messages(2, 3, range(40))[:1]) == []


def test_default_page_limit_is_ram() -> None:
    """64 MiB of RAM are 16,384 pages: two GPADLs of 8,190 fit, a third of 5 does not."""
    world = booted()

    for handle, pages in ((1, 8190), (2, 8190), (3, 4)):
        assert refusals(world, gpadl_messages(1, handle, range(pages))) == []
    assert refusals(world, gpadl_messages(1, 4, range(5))) == ["gpadl-too-many-pages"]


def test_gpadls_of_a_channel_are_limited() -> None:
    """One channel cannot use up what all have."""
    world = booted(gpadls_per_channel=3)

    assert refusals(world, [m for h in range(4) for m in gpadl_messages(1, h, range(1))]) == [
        "gpadl-too-many-on-channel"
    ]
    assert refusals(world, gpadl_messages(2, 9, range(1))) == []


def test_all_gpadls_are_limited() -> None:
    """The host remembers a bounded number of them."""
    world = booted(gpadls=3)

    assert refusals(world, [m for h in range(4) for m in gpadl_messages(1, h, range(1))]) == ["gpadl-too-many"]


def test_gpadls_in_progress_are_limited() -> None:
    """Headers without bodies cannot pile up."""
    world = booted(gpadls_in_progress=3)

    headers = [gpadl_messages(1, handle, range(40))[0] for handle in range(4)]

    assert refusals(world, headers) == ["gpadl-too-many-in-progress"]
    assert world.server.summary().gpadls_in_progress == 3


# -- teardown ------------------------------------------------------------------------------------------


def test_teardown_is_answered_when_the_device_is_done() -> None:
    """TORNDOWN names the handle only, and comes last."""
    world = World(quick=False)
    world.boot()
    world.lend()
    world.answer(MapGpadl)
    world.forget()

    world.post(GpadlTeardown(1, RING))
    assert world.sent() == []
    world.answer(UnmapGpadl)

    assert world.sent() == [GpadlTorndown(RING)]


@pytest.mark.parametrize("state", ["nothing", "in progress", "offered", "tearing down", "torn down"])
def test_teardown_of_what_is_not_accepted_has_no_answer(state: str) -> None:
    """A guest that tears down twice, or what is not there, is not told (and waits for ever)."""
    world = World(quick=False)
    world.boot()
    rule = "gpadl-teardown-unknown"
    if state == "in progress":
        world.post(gpadl_messages(1, RING, range(40))[0])
        rule = "gpadl-teardown-requested-while-in-progress"
    elif state != "nothing":
        world.lend()
        rule = "gpadl-teardown-requested-while-offered"
    if state in ("tearing down", "torn down"):
        world.answer(MapGpadl)
        world.post(GpadlTeardown(1, RING))
        rule = "gpadl-teardown-requested-while-tearing-down"
    if state == "torn down":
        world.answer(UnmapGpadl)
        rule = "gpadl-teardown-unknown"
    world.forget()

    world.post(GpadlTeardown(1, RING))

    assert world.refused() == [rule]
    assert world.effects == []


def test_release_takes_the_answer_of_a_teardown_with_it() -> None:
    """A guest that lets go of the relid before its TORNDOWN came has no use for it."""
    world = World(quick=False)
    world.boot()
    world.lend()
    world.answer(MapGpadl)
    world.post(GpadlTeardown(1, RING))
    world.release()
    world.forget()

    world.answer(UnmapGpadl)

    assert world.sent() == []
    assert world.server.summary().gpadls == 0


def test_teardown_on_the_wrong_channel_has_no_answer() -> None:
    """A handle is looked for where the guest says it is."""
    world = booted()
    world.lend(1)
    world.forget()

    world.post(GpadlTeardown(2, RING))

    assert world.refused() == ["gpadl-teardown-unknown"]


def test_teardown_of_an_open_ring_waits_for_the_close() -> None:
    """Nothing is unmapped under a device: TORNDOWN comes when the channel has closed."""
    world = booted()
    world.open()
    world.forget()

    world.post(GpadlTeardown(1, RING))
    assert world.refused() == ["gpadl-teardown-of-open-ring"]
    assert world.effects == []
    world.post(CloseChannel(1))

    assert world.sent() == [GpadlTorndown(RING)]


def test_teardown_of_another_buffer_of_an_open_channel_does_not_wait() -> None:
    """Only the ring is in use for as long as the channel is open."""
    world = booted()
    world.open()
    world.lend(gpadl=RING + 1)
    world.forget()

    world.post(GpadlTeardown(1, RING + 1))

    assert world.sent() == [GpadlTorndown(RING + 1)]


def test_a_refused_open_frees_the_ring() -> None:
    """The ring of an open that failed can be torn down, also if the guest did not wait."""
    world = World(quick=False)
    world.boot()
    world.lend()
    world.answer(MapGpadl)
    world.post(open_channel(), GpadlTeardown(1, RING))
    world.answer(OpenDevice, yes=False)

    world.answer(UnmapGpadl)

    assert world.sent()[-1] == GpadlTorndown(RING)


def test_answers_for_gpadls_that_are_gone_are_counted() -> None:
    """A device cannot talk the server into anything."""
    world = World()
    (key,) = world.boot()

    world.take(world.server.gpadl_accepted(key, 5))
    world.take(world.server.gpadl_refused(key, 5))
    world.take(world.server.gpadl_torn_down(key, 5))

    assert world.refused() == ["late-gpadl-answer"] * 3
    assert world.sent() == []
