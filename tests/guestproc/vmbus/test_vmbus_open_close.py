"""Opening and closing a channel, with everything that a host may refuse or leave unanswered."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable

import pytest

from emu.errors import DeadlinePassed, OutOfMemory
from emu.memory import GuestMemory
from emu.wire.hypercalls import HvStatus
from emu.wire.messages import (
    STATUS_UNSUCCESSFUL,
    CloseChannel,
    GpadlCreated,
    GpadlHeader,
    GpadlTeardown,
    GpadlTorndown,
    Message,
    MessageType,
    OpenChannel,
    OpenChannelResult,
)
from guestproc.current import Current
from guestproc.kernel.layout import Channel, ChannelState
from guestproc.protocol.numbers import Callbacks
from guestproc.vmbus.channel import (
    vmbus_close,
    vmbus_close_internal,
    vmbus_establish_gpadl,
    vmbus_open,
    vmbus_teardown_gpadl,
)
from tests.guestproc.world import World, new_world

T = MessageType
PAGE = 4096
ECHO = int(Callbacks.ECHO_ONCHANNELCALLBACK)

Open = Callable[[Current], int]


def opening(relid: int, send: int = 4 * PAGE, recv: int = 4 * PAGE, userdata: bytes = b"") -> Open:
    """`vmbus_open` as a task, with the driver's callback."""

    def task(current: Current) -> int:
        channel = _channel(current, relid)
        return vmbus_open(current, channel, send, recv, userdata, ECHO, channel.device_obj)

    return task


def closing(relid: int) -> Callable[[Current], None]:
    """`vmbus_close` as a task."""
    return lambda current: vmbus_close(current, _channel(current, relid))


def _channel(current: Current, relid: int) -> Channel:
    channel = current.tables.relids.lookup(relid)
    assert channel is not None
    return channel


def pages_of_rings(world: World) -> int:
    """How many pages rings have."""
    return sum(count for name, count in world.tables.pages.in_use_by_owner().items() if name.startswith("RING"))


@pytest.fixture(params=["current", "seed"])
def era(request: pytest.FixtureRequest) -> str:
    """What is opened and closed here is so in both."""
    return str(request.param)


@pytest.fixture
def closed(booted: World) -> World:
    """A channel, relid 9, that no driver has opened."""
    booted.host.answer[T.OPENCHANNEL] = lambda message: [OpenChannelResult(9, 9, 1)]
    booted.host.device(9)
    booted.settle()
    del booted.host.answer[T.OPENCHANNEL]
    assert booted.channel(9).state.load() == ChannelState.OPEN_STATE
    booted.host.posted.clear()
    return booted


# -- open -----------------------------------------------------------------------------------------------


def test_open_ok(closed: World) -> None:
    """GPADL header and no body for 8 pages, CREATED, OPEN with both rings' place, result 0."""
    assert closed.call(opening(9, 2 * PAGE, 6 * PAGE, b"props")) == 0

    header, opened = closed.host.posted
    assert isinstance(header, GpadlHeader)
    assert isinstance(opened, OpenChannel)
    assert (header.child_relid, header.range_buflen, header.rangecount) == (9, 8 + 8 * 8, 1)
    assert opened.ringbuffer_gpadlhandle == header.gpadl
    assert (opened.downstream_ringbuffer_pageoffset, opened.userdata[:5]) == (2, b"props")
    assert closed.channel(9).state.load() == ChannelState.OPENED_STATE
    assert pages_of_rings(closed) == 8


def test_rings_are_initialised_between_created_and_open(closed: World) -> None:
    """When the host sees OPEN, both control pages are zero but for the feature bit."""
    seen: list[tuple[bytes, bytes]] = []

    def look(message: Message) -> list[Message]:
        assert isinstance(message, OpenChannel)
        pfns = closed.host.gpadls[message.ringbuffer_gpadlhandle].ranges[0].pfns
        split = message.downstream_ringbuffer_pageoffset
        seen.extend([(closed.host.memory.read(pfns[page] << 12, 128), b"") for page in (0, split)])
        return [OpenChannelResult(9, 9, 1)]

    closed.host.answer[T.OPENCHANNEL] = look
    closed.call(opening(9))

    feature_bits = bytes(64) + (1).to_bytes(4, "little") + bytes(60)
    assert [page for page, _ in seen] == [feature_bits, feature_bits]


def test_open_refused(closed: World) -> None:
    """A status that is not 0 is -EAGAIN; the GPADL is torn down, the pages come back, it may be tried again."""
    closed.host.answer[T.OPENCHANNEL] = lambda message: [OpenChannelResult(9, 9, STATUS_UNSUCCESSFUL)]

    assert closed.call(opening(9)) == -errno.EAGAIN

    assert closed.host.types() == [T.GPADL_HEADER, T.OPENCHANNEL, T.GPADL_TEARDOWN]
    channel = closed.channel(9)
    assert (channel.state.load(), channel.onchannel_callback) == (ChannelState.OPEN_STATE, 0)
    assert (pages_of_rings(closed), closed.host.gpadls) == (0, {})
    del closed.host.answer[T.OPENCHANNEL]
    assert closed.call(opening(9)) == 0


def test_gpadl_refused(closed: World) -> None:
    """-EDQUOT: no OPEN with a handle that the host does not know, and no teardown of it (races.md E3)."""
    closed.host.answer[T.GPADL_HEADER] = lambda message: [
        GpadlCreated(9, message.gpadl, STATUS_UNSUCCESSFUL) if isinstance(message, GpadlHeader) else message
    ]

    assert closed.call(opening(9)) == -errno.EDQUOT

    assert closed.host.types() == [T.GPADL_HEADER]
    assert (pages_of_rings(closed), closed.channel(9).state.load()) == (0, ChannelState.OPEN_STATE)
    assert f"Failed to establish GPADL: err = {STATUS_UNSUCCESSFUL:#x}" in closed.log


@pytest.mark.parametrize("state", [ChannelState.OFFER_STATE, ChannelState.OPENING_STATE, ChannelState.OPENED_STATE])
def test_only_a_closed_channel_is_opened(closed: World, state: ChannelState) -> None:
    """-EINVAL in every other state, and what the channel has stays as it is."""
    channel = closed.channel(9)
    channel.state.store(state)

    assert closed.call(opening(9)) == -errno.EINVAL
    assert channel.state.load() == state
    assert closed.host.posted == []
    assert pages_of_rings(closed) == 0


def test_second_open_leaves_the_first_alone(closed: World) -> None:
    """The rings of an open channel are not lost to a driver that opens it twice."""
    closed.call(opening(9))
    gpa = closed.channel(9).ring_gpa

    assert closed.call(opening(9)) == -errno.EINVAL
    assert closed.channel(9).ring_gpa == gpa
    assert pages_of_rings(closed) == 8


@pytest.mark.parametrize(("send", "recv"), [(0, PAGE), (PAGE, 0), (100, PAGE), (PAGE, PAGE + 8), (-PAGE, PAGE)])
def test_ring_sizes_are_whole_pages(closed: World, send: int, recv: int) -> None:
    """-EINVAL before anything is said to the host."""
    assert closed.call(opening(9, send, recv)) == -errno.EINVAL
    assert closed.host.posted == []
    assert closed.channel(9).state.load() == ChannelState.OPEN_STATE


def test_user_data_has_120_bytes(closed: World) -> None:
    """One more is -EINVAL."""
    assert closed.call(opening(9, userdata=bytes(121))) == -errno.EINVAL
    assert closed.call(opening(9, userdata=b"x" * 120)) == 0


@pytest.mark.parametrize(("send", "recv"), [(PAGE, 2 * PAGE), (2 * PAGE, PAGE)])
def test_ring_without_a_data_page_is_refused_by_us(closed: World, send: int, recv: int) -> None:
    """A control page alone cannot be initialised: -EINVAL, and the host has its GPADL back."""
    assert closed.call(opening(9, send, recv)) == -errno.EINVAL
    assert closed.host.types() == [T.GPADL_HEADER, T.GPADL_TEARDOWN]
    assert (pages_of_rings(closed), closed.host.gpadls) == (0, {})


def test_more_pages_than_a_gpadl_can_say_are_refused(closed: World) -> None:
    """8,190 PFNs is what range_buflen can count; nothing is posted for more."""
    result = closed.call(lambda current: vmbus_establish_gpadl(current, _channel(current, 9), range(8_191)))

    assert result == (-errno.EINVAL, 0)
    assert closed.host.posted == []


def test_open_without_memory(closed: World) -> None:
    """-ENOMEM when guest RAM has no such ring, or the tmpfs behind it is full; nothing is kept."""
    assert closed.call(opening(9, 1 << 28, 1 << 28)) == -errno.ENOMEM

    def full(channel: object) -> None:
        raise OutOfMemory("no pages behind 32768 bytes of RAM")

    rings = closed.currents[0].rings
    rings.init = full  # type: ignore[method-assign]
    assert closed.call(opening(9)) == -errno.ENOMEM
    assert (pages_of_rings(closed), closed.host.gpadls) == (0, {})


def test_scattered_ring_without_memory_for_its_page_list(closed: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """-ENOMEM where the tmpfs cannot supply the page of the list, which is asked for before it is written."""
    current, asked = closed.currents[0], list[int]()
    monkeypatch.setitem(current.machine.config["machine"], "ring_memory", "scattered")

    def full(gpa: int, length: int) -> None:
        asked.append(length)
        raise OutOfMemory(f"no pages behind {length} bytes of RAM")

    monkeypatch.setattr(GuestMemory, "reserve", lambda _memory, gpa, length: full(gpa, length))
    assert closed.call(opening(9)) == -errno.ENOMEM
    assert asked == [PAGE]
    assert (pages_of_rings(closed), closed.host.posted) == (0, [])


def test_open_without_a_request_record(closed: World) -> None:
    """-ENOMEM when 512 others wait."""
    taken = []
    while (request := closed.tables.requests.alloc()) is not None:
        taken.append(request)

    assert closed.call(opening(9)) == -errno.ENOMEM
    assert closed.host.posted == []
    for request in taken:
        closed.tables.requests.free(request)
    assert pages_of_rings(closed) == 0


@pytest.mark.parametrize("post", range(3))
def test_post_that_fails_in_the_middle_of_an_open(booted: World, post: int) -> None:
    """Header, body or OPEN: -EINVAL, and what was done before is undone."""
    booted.host.statuses.extend([HvStatus.SUCCESS] * post + [HvStatus.ACCESS_DENIED])
    booted.host.device(9)
    booted.settle()

    assert (
        booted.host.types()[2:]
        == [
            [],
            [T.GPADL_HEADER],
            [T.GPADL_HEADER, T.GPADL_BODY, T.GPADL_TEARDOWN],
        ][post]
    )
    assert any("probe failed for device 00000000-0000-0000-0000-000000000009 (-22)" in line for line in booted.log)
    assert (pages_of_rings(booted), booted.channel(9).state.load()) == (0, ChannelState.OPEN_STATE)


# -- a host that does not answer ------------------------------------------------------------------------


def test_gpadl_without_an_answer_ends_and_leaves_its_pages_to_the_host(closed: World) -> None:
    """The kernel would wait for ever. -ETIMEDOUT, and pages that the host may use stay allocated (races.md E2)."""
    closed.host.hold(T.GPADL_HEADER)
    task = closed.start(opening(9))
    closed.pass_time(44)
    assert not task.ended()
    closed.pass_time(2)

    assert task.result == -errno.ETIMEDOUT
    assert pages_of_rings(closed) == 8
    assert closed.channel(9).state.load() == ChannelState.OPEN_STATE
    assert any("they are not given back" in line for line in closed.log)
    assert any(re.search(r"GPADL_HEADER: no answer within 45 s \(relid 9, gpadl 0x[1-9a-f]", one) for one in closed.log)


def test_late_answer_is_ignored(closed: World) -> None:
    """The reply to a request that was given up finds nobody; a new one has another handle."""
    closed.host.hold(T.GPADL_HEADER)
    closed.start(opening(9))
    closed.pass_time(50)

    closed.host.release(T.GPADL_HEADER)
    closed.settle()

    assert closed.tables.requests.in_use == 0
    assert closed.call(opening(9)) == 0


def test_open_without_an_answer_tears_its_gpadl_down(closed: World) -> None:
    """-ETIMEDOUT; the host says that it let go of the pages, so they are given back."""
    closed.host.hold(T.OPENCHANNEL)
    task = closed.start(opening(9))
    closed.pass_time(50)

    assert task.result == -errno.ETIMEDOUT
    assert closed.host.types()[-1] == T.GPADL_TEARDOWN
    assert pages_of_rings(closed) == 0
    assert any(line.endswith("OPENCHANNEL: no answer within 45 s (relid 9)") for line in closed.log)


def test_teardown_without_an_answer_keeps_the_pages(closed: World) -> None:
    """Closed, as far as the driver goes; the ring's pages are the host's for ever."""
    closed.call(opening(9))
    closed.host.hold(T.GPADL_TEARDOWN)
    task = closed.start(closing(9))
    closed.pass_time(50)

    assert task.ended()
    assert pages_of_rings(closed) == 8
    assert "Close failed: teardown gpadl return -110" in closed.log
    assert closed.tables.requests.in_use == 0


def test_hypervisor_that_does_not_answer_a_post_fails_the_open(closed: World) -> None:
    """The exit's deadline passes: -ETIMEDOUT, and whether the host has the pages nobody knows."""
    closed.exit_errors.append(DeadlinePassed("exit slot 0", 5_000_000_000))

    assert closed.call(opening(9)) == -errno.ETIMEDOUT
    assert pages_of_rings(closed) == 8


# -- close ----------------------------------------------------------------------------------------------


def test_close(closed: World) -> None:
    """CLOSE, TEARDOWN, and the pages are free behind TORNDOWN, not before."""
    closed.call(opening(9))
    closed.host.posted.clear()
    closed.host.hold(T.GPADL_TEARDOWN)
    task = closed.start(closing(9))
    closed.settle()
    assert (task.ended(), pages_of_rings(closed)) == (False, 8)

    closed.host.release(T.GPADL_TEARDOWN)
    closed.settle()

    assert task.ended()
    assert closed.host.types() == [T.CLOSECHANNEL, T.GPADL_TEARDOWN]
    channel = closed.channel(9)
    assert (channel.state.load(), channel.onchannel_callback) == (ChannelState.OPEN_STATE, 0)
    assert (pages_of_rings(closed), closed.host.gpadls) == (0, {})


@pytest.mark.parametrize("state", [ChannelState.OFFER_STATE, ChannelState.OPENING_STATE, ChannelState.OPEN_STATE])
def test_only_an_open_channel_is_closed(closed: World, state: ChannelState) -> None:
    """-EINVAL and not a word to the host; its callback is gone all the same, and its tasklet enabled (C3)."""
    channel = closed.channel(9)
    channel.state.store(state)

    assert closed.call(lambda current: vmbus_close_internal(current, _channel(current, 9))) == -errno.EINVAL
    assert channel.state.load() == state
    assert channel.callback_event.disable_count == 0
    assert closed.host.posted == []


def test_close_that_cannot_be_posted_keeps_the_pages(closed: World) -> None:
    """The host may use them for ever: better to lose them."""
    closed.call(opening(9))
    closed.host.statuses.append(HvStatus.INVALID_PORT_ID)
    closed.call(closing(9))

    assert pages_of_rings(closed) == 8
    assert "Close failed: close post msg return is -22" in closed.log
    assert CloseChannel(9) not in closed.host.posted


def test_torn_down_of_another_handle_is_nothing(closed: World) -> None:
    """The message names no channel, only the handle."""
    closed.call(opening(9))
    gpadl = closed.channel(9).ringbuffer_gpadlhandle
    closed.host.answer[T.GPADL_TEARDOWN] = lambda message: [GpadlTorndown(gpadl + 1)]
    task = closed.start(lambda current: vmbus_teardown_gpadl(current, _channel(current, 9), gpadl))
    closed.settle()
    assert not task.ended()

    closed.host.send(GpadlTorndown(gpadl))
    closed.settle()

    assert task.result == 0
    assert closed.host.posted[-1] == GpadlTeardown(9, gpadl)


def test_five_channels_opened_and_closed_five_times_each(booted: World) -> None:
    """Each round has GPADL handles of its own and the same event flags; at the end nothing is missing."""
    relids = range(1, 6)
    for relid in relids:
        booted.host.device(relid)
    booted.settle()
    flags = {relid: booted.channel(relid).relid for relid in relids}
    handles = set()
    for _round in range(5):
        for relid in relids:
            channel = booted.channel(relid)
            handles.add(channel.ringbuffer_gpadlhandle)
            booted.host.write(relid, b"hello")
            booted.settle()
            assert channel.interrupts > _round
            booted.call(closing(relid))
        assert pages_of_rings(booted) == 0
        for relid in relids:
            assert booted.call(opening(relid)) == 0

    assert len(handles) == 25
    assert {relid: booted.host.channels[relid].opens for relid in relids} == dict.fromkeys(relids, 6)
    assert {relid: booted.channel(relid).relid for relid in relids} == flags
    for relid in relids:
        booted.call(closing(relid))
    assert booted.shut_down() == {}


@pytest.mark.parametrize("ring_memory", ["contiguous", "scattered"])
def test_rings_of_any_pages(ring_memory: str) -> None:
    """Contiguous or not, the host finds the rings by their PFN list, and all pages come back."""
    with new_world(ring_memory=ring_memory) as world:
        world.boot()
        world.host.device(9)
        world.settle()

        (assembly,) = world.host.gpadls.values()
        pfns = list(assembly.ranges[0].pfns)
        neighbours = sum(after - before == 1 for before, after in zip(pfns, pfns[1:], strict=False))
        assert neighbours == (31 if ring_memory == "contiguous" else 0)
        world.host.write(9, b"through pages of all sorts")
        world.settle()
        device = world.tables.devices.from_handle(world.channel(9).device_obj)
        assert device.driver_state[0] == 1
        assert world.shut_down() == {}
