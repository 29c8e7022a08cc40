"""The drivers of schedules: replies on a stack, NICs with one lock, a buffer, a socket that polls; right and wrong."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest

from emu.ring import Packet
from emu.switches import ALL_FIXED, Fix
from emu.wire.device_classes import ECHO
from emu.wire.messages import GpadlCreated, MessageType
from emu.wire.packets import VM_PKT_COMP
from guestproc.current import Current
from guestproc.drivers import stream
from guestproc.drivers.driver import DRIVER_OBJECTS
from guestproc.drivers.exhibits import EXHIBIT_DRIVERS, add_exhibit_drivers
from guestproc.drivers.lender import BUFFER_GPA, BUFFER_GPADL
from guestproc.kernel.layout import Channel
from guestproc.kernel.page_records import PageRun
from guestproc.kernel.pages import PageOwner, owned_by
from guestproc.user import run_call
from guestproc.vmbus import channel_mgmt
from tests.guestproc.conftest import HOST_VERSIONS
from tests.guestproc.vmbus.test_vmbus_mistakes import circles, mistaken
from tests.guestproc.vmbus.test_vmbus_subchannels import PRIMARY, Device
from tests.guestproc.world import Task, World, new_world
from tests.tools.settled_world import findings

T = MessageType


@pytest.fixture(autouse=True)
def exhibit_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process knows them for one test."""
    for driver in EXHIBIT_DRIVERS:
        monkeypatch.setitem(DRIVER_OBJECTS, driver.number, driver)


@pytest.fixture
def nic() -> Iterator[World]:
    """A guest whose scenario gives the device of instance 9 a sub-channel."""
    with new_world(versions=HOST_VERSIONS["current"]) as world:
        device = {"class": "echo", "instance": str(UUID(int=PRIMARY)), "subchannels": 1, "ring_pages": 2}
        world.machine.config["device"] = [device]
        world.boot()
        yield world


def call(world: World, name: str, **arguments: Any) -> dict[str, Any]:
    """One call of user space, to its end."""
    return world.call(lambda current: run_call(current, name, arguments))


def bind(world: World, driver: str, device: int) -> Task[dict[str, Any]]:
    """Bind a device, which may hang."""
    return world.start(lambda current: run_call(current, "bind", {"driver": driver, "device": str(device)}))


def test_only_machines_with_schedules_have_them(booted: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without `races` knows the drivers that it always knew."""
    for driver in EXHIBIT_DRIVERS:
        monkeypatch.delitem(DRIVER_OBJECTS, driver.number)
    add_exhibit_drivers(booted.machine)
    assert not {driver.number for driver in EXHIBIT_DRIVERS} & DRIVER_OBJECTS.keys()

    monkeypatch.setattr(booted.machine, "races", True)
    for _ in range(2):
        add_exhibit_drivers(booted.machine)

    assert {driver.number for driver in EXHIBIT_DRIVERS} <= DRIVER_OBJECTS.keys()


# -- hv_polling -----------------------------------------------------------------------------------------


def polling(world: World, *answers: Packet, silent: bool = False) -> Task[dict[str, Any]]:
    """A device that hv_polling is bound to; it sends these first, and then answers, unless it is silent."""

    def answer(packet: Packet) -> list[Packet]:
        return [*answers, *([] if silent else [(VM_PKT_COMP, 0, packet[2], b"version 7")])]

    world.host.device(9)
    world.settle()
    call(world, "unbind", device="9")
    call(world, "override", device="9", driver="hv_polling")
    world.host.on_packet[9] = answer
    task = bind(world, "hv_polling", 9)
    world.settle()
    return task


def test_reply_ends_the_probe(booted: World) -> None:
    """The device is bound when it has answered, and the frame is given back."""
    task = polling(booted)

    assert task.result["driver"] == "hv_polling"
    assert (booted.tables.frames.in_use, booted.tables.damage()) == (0, [])
    assert booted.shut_down() == {}


def test_replies_to_nobody_are_refused(booted: World) -> None:
    """A transaction id that names no frame is counted, and the right one still found."""
    task = polling(booted, (VM_PKT_COMP, 0, 77 << 32 | 1, b""), (VM_PKT_COMP, 0, 1 << 40, b""))

    assert task.result["driver"] == "hv_polling"
    assert booted.refused()["reply-to-nobody"] == 2
    assert booted.shut_down() == {}


def test_rescind_ends_the_wait_for_a_reply(booted: World) -> None:
    """-ENODEV, the channel released, no frame left."""
    task = polling(booted, silent=True)
    assert booted.tables.frames.in_use == 1
    booted.host.rescind(9)
    booted.settle()

    assert task.result["errno"] == errno.ENODEV
    assert booted.host.released == [9]
    assert (booted.tables.frames.in_use, booted.tables.damage()) == (0, [])


def test_device_that_does_not_answer_is_given_up(booted: World) -> None:
    """After 30 s, with the callback stopped before the frame is gone."""
    task = polling(booted, silent=True)
    booted.pass_time(31)

    assert task.result["errno"] == errno.ETIMEDOUT
    assert booted.tables.frames.in_use == 0
    assert booted.shut_down() == {}


@pytest.mark.parametrize(("fix", "runs"), [(ALL_FIXED, False), (Fix(quiesce_before_flag=False), True)])
def test_callback_when_the_flag_goes_up(
    booted: World, monkeypatch: pytest.MonkeyPatch, fix: Fix, *, runs: bool
) -> None:
    """A7: it is taken away before that, unless the mistake is made."""
    seen: list[bool] = []
    cleanup = channel_mgmt.vmbus_rescind_cleanup

    def look(current: Current, channel: Channel) -> None:
        seen.append(channel.onchannel_callback != 0)
        cleanup(current, channel)

    monkeypatch.setattr(channel_mgmt, "vmbus_rescind_cleanup", look)
    mistaken(booted, **fix.to_config())
    booted.host.device(9)
    booted.settle()
    booted.host.rescind(9)
    booted.settle()

    assert seen == [runs]
    assert booted.host.released == [9]


# -- hv_locked_nic --------------------------------------------------------------------------------------


def locked(world: World) -> Device:
    """A device with a sub-channel, unbound; hv_locked_nic takes whatever echo device comes."""
    device = Device(world, order=(1,))
    device.appear()
    call(world, "unregister", driver="hv_echo")
    call(world, "new_id", driver="hv_locked_nic", guid=str(ECHO.guid))
    world.settle()
    return device


def test_set_up_ends_when_the_subchannels_are_open(nic: World) -> None:
    """The lock is free again, and the device goes as it should."""
    device = locked(nic)
    assert len(device.asked) == 2  # of hv_echo, then of ours
    assert nic.tables.connection.rtnl_mutex.owner == 0

    device.rescind()
    nic.settle()

    assert nic.tables.devices.in_use == 0
    assert nic.shut_down() == {}


@pytest.mark.parametrize(("fix", "stuck"), [(ALL_FIXED, False), (Fix(split_pri_sub=False), True)])
def test_two_nics_and_a_lock(nic: World, fix: Fix, *, stuck: bool) -> None:
    """A3: one NIC's probe waits for the lock, the lock for the other's sub-channels; not behind it in one queue."""
    mistaken(nic, **fix.to_config())
    device = locked(nic)
    call(nic, "unbind", device=str(PRIMARY))
    device.order = []
    bind(nic, "hv_locked_nic", PRIMARY)
    nic.settle()
    assert nic.tables.connection.rtnl_mutex.owner
    nic.host.device(30)
    nic.settle()

    device.offer(1)
    nic.settle()

    assert len(circles(nic)) == stuck
    assert bool(nic.tables.connection.rtnl_mutex.owner) == stuck


# -- hv_lender ------------------------------------------------------------------------------------------


def lending(world: World) -> PageRun:
    """A device that hv_lender is bound to; where its buffer is."""
    world.host.device(9)
    world.settle()
    call(world, "unbind", device="9")
    call(world, "override", device="9", driver="hv_lender")
    task = bind(world, "hv_lender", 9)
    world.settle()
    assert task.result["driver"] == "hv_lender"
    (device,) = (one for one in world.tables.devices.live() if one.driver_state[BUFFER_GPADL])
    return world.tables.pages.run_at(device.driver_state[BUFFER_GPA] >> 12)


def to_be_lent(world: World) -> None:
    """A device that hv_lender may take, with rings so small that one message names their pages: a GPADL_BODY is of the
    buffer's alone."""
    world.machine.config["device"] = [{"class": "echo", "instance": str(UUID(int=9)), "ring_pages": 2}]
    world.host.device(9)
    world.settle()
    call(world, "unbind", device="9")
    call(world, "override", device="9", driver="hv_lender")


def lent_pages(world: World) -> list[tuple[int, ...]]:
    """The pages of each GPADL that the host has."""
    return [one.ranges[0].pfns for one in world.host.gpadls.values()]


def test_buffer_is_lent_beside_the_rings(booted: World) -> None:
    """The host has its pages; they come back behind the close, and go to the free list behind that."""
    buffer = lending(booted)
    assert tuple(buffer.pfns) in lent_pages(booted) and len(lent_pages(booted)) == 2
    assert findings(booted, 12) == []
    said = len(booted.host.posted)

    call(booted, "unbind", device="9")

    assert [type(message).__name__ for message in booted.host.posted[said:]] == [
        "CloseChannel",
        "GpadlTeardown",
        "GpadlTeardown",
    ]
    assert lent_pages(booted) == [] and booted.tables.pages.owner_of(buffer.pfn) == 0
    assert findings(booted, 12) == []


def test_buffer_of_a_device_that_goes_comes_back_without_a_word(booted: World) -> None:
    """Behind a RESCIND the host has no device that could touch it."""
    buffer = lending(booted)

    booted.host.rescind(9)
    booted.settle()

    assert booted.tables.pages.owner_of(buffer.pfn) == 0
    assert findings(booted, 12) == []


def test_device_without_its_buffer_is_not_bound(booted: World) -> None:
    """A host that refuses the second GPADL: the channel is closed again, and nothing is lost."""
    to_be_lent(booted)
    before, said = booted.tables.pages.pages_in_use, len(booted.host.posted)
    booted.host.answer[T.GPADL_BODY] = lambda body: [GpadlCreated(9, body.gpadl, 0xC000_0044)]  # type: ignore[attr-defined]

    result = bind(booted, "hv_lender", 9)
    booted.settle()

    assert result.result["errno"] == errno.EDQUOT
    assert [message.TYPE for message in booted.host.posted[said:]] == [
        T.GPADL_HEADER,
        T.OPENCHANNEL,
        T.GPADL_HEADER,
        T.GPADL_BODY,
        T.CLOSECHANNEL,
        T.GPADL_TEARDOWN,
    ]
    assert booted.tables.pages.pages_in_use == before


def test_rescind_ends_the_wait_for_a_buffer(booted: World) -> None:
    """-ENODEV: the channel that was open is closed, and released; no page is left."""
    to_be_lent(booted)
    before = booted.tables.pages.pages_in_use
    booted.host.answer[T.GPADL_BODY] = lambda _body: []
    task = bind(booted, "hv_lender", 9)
    booted.settle()
    assert not task.ended() and booted.host.posted[-1].TYPE is T.GPADL_BODY
    booted.host.rescind(9)
    booted.settle()

    assert task.result["errno"] == errno.ENODEV
    assert (booted.host.released, booted.tables.pages.pages_in_use) == ([9], before)
    assert booted.shut_down() == {}


def test_buffer_that_is_freed_before_it_is_torn_down(booted: World) -> None:
    """INV-12: its pages are free while the host has them, or another's already; then nobody may write there."""
    buffer = lending(booted)
    pages = booted.tables.pages
    booted.call(lambda current: pages.free(current.actor, buffer))
    (found,) = findings(booted, 12)
    assert f"page {buffer.pfn:#x} of GPADL" in found.text and "(lent by its driver)" in found.text
    assert found.relid == 9 and found.text.endswith("is free")

    stranger = owned_by(PageOwner.DRIVER, 77)
    while pages.owner_of(buffer.pfn) == 0:
        booted.call(lambda current: pages.alloc_pages_exact(current.actor, buffer.count, stranger))

    assert [one.text.rsplit(" ", 1)[1] for one in findings(booted, 12)] == ["DRIVER[77]"]


# -- hv_stream ------------------------------------------------------------------------------------------

TOGGLES = {"recheck_after_stop": False, "variant": "hvsock_epoll"}


def streaming(world: World, *, right: bool = True) -> None:
    """A device that hv_stream is bound to, whose host reads nothing by itself."""
    mistaken(world, **({} if right else TOGGLES))
    world.host.device(9)
    world.settle()
    call(world, "unbind", device="9")
    call(world, "override", device="9", driver="hv_stream")
    task = bind(world, "hv_stream", 9)
    world.settle()
    assert task.result["driver"] == "hv_stream"
    world.host.channels[9].echo = False


def write(world: World, count: int) -> Task[dict[str, Any]]:
    """A program that writes, which may sleep."""
    task = world.start(lambda current: run_call(current, "stream_write", {"device": "9", "bytes": count}), cpu=1)
    world.settle()
    return task


def host_reads(world: World, limit: int = 1_000) -> None:
    """The host takes packets, and signals for room as the ring says."""
    consumer = world.host.channels[9].consumer
    assert consumer is not None
    consumer.read_many(limit)
    if consumer.take_signal():
        world.host.signal(9)


def test_writer_sleeps_until_there_is_room(booted: World) -> None:
    """It is told of the room once the threshold is crossed; nobody is accused, asleep or done."""
    streaming(booted)
    assert findings(booted, 20) == [], "a threshold that stands for nobody accuses nobody"
    task = write(booted, 30_000)
    assert not task.ended()
    assert (findings(booted, 20), findings(booted, 22)) == ([], [])

    host_reads(booted)
    booted.settle()

    assert task.result["written"] == 30_000
    assert booted.shut_down() == {}


@pytest.mark.parametrize("right", [True, False])
def test_room_that_comes_before_the_wish(booted: World, monkeypatch: pytest.MonkeyPatch, *, right: bool) -> None:
    """D4 and INV-20: the host reads all between a poll's look and its wish; a threshold that stands is crossed."""
    streaming(booted, right=right)
    look = stream.hvs_channel_writable_bytes

    def look_too_early(current: Current, channel: Channel) -> int:
        writable = look(current, channel)
        if not writable:
            host_reads(booted)
        return writable

    monkeypatch.setattr(stream, "hvs_channel_writable_bytes", look_too_early)
    task = write(booted, 30_000)

    assert task.ended() is right
    assert len(findings(booted, 20)) == (not right)
    assert booted.shut_down() == {}


@pytest.mark.parametrize("right", [True, False])
def test_poll_that_takes_anothers_wish_back(booted: World, *, right: bool) -> None:
    """D4 and INV-22: a second poll of the socket finds a little room, while the first one sleeps for more."""
    streaming(booted, right=right)
    write(booted, 1_000)
    task = write(booted, 30_000)
    host_reads(booted, 1)
    booted.settle()
    assert not task.ended(), "less than the threshold: no signal"
    handle = booted.channel(9).handle
    room = booted.call(lambda current: stream.hvs_stream_has_space(current, current.channel(handle)))
    assert 0 < room < stream.THRESHOLD

    host_reads(booted)
    booted.settle()

    assert task.ended() is right
    assert len(findings(booted, 22)) == (not right)


def test_removal_wakes_who_sleeps(booted: World) -> None:
    """The device is taken away under a writer, which leaves with what it had written."""
    streaming(booted)
    task = write(booted, 30_000)
    booted.start(lambda current: run_call(current, "unbind", {"device": "9"}))
    booted.settle()

    assert 0 < task.result["written"] < 30_000
    assert call(booted, "stream_write", device="9", bytes=1)["errno"] == errno.ENODEV
    assert (booted.tables.damage(), booted.shut_down()) == ([], {})
