"""The drivers of schedules: one that waits for a reply on its stack; right and wrong."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from emu.ring import Packet
from emu.switches import ALL_FIXED, Fix
from emu.wire.messages import MessageType
from emu.wire.packets import VM_PKT_COMP
from guestproc.current import Current
from guestproc.drivers.driver import DRIVER_OBJECTS
from guestproc.drivers.exhibits import EXHIBIT_DRIVERS, add_exhibit_drivers
from guestproc.kernel.layout import Channel
from guestproc.user import run_call
from guestproc.vmbus import channel_mgmt
from tests.guestproc.vmbus.test_vmbus_mistakes import mistaken
from tests.guestproc.world import Task, World

T = MessageType


@pytest.fixture(autouse=True)
def exhibit_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process knows them for one test."""
    for driver in EXHIBIT_DRIVERS:
        monkeypatch.setitem(DRIVER_OBJECTS, driver.number, driver)


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
