"""Each switch of discovery and rescind, off: the mistake that it makes, in one process, and who waits for whom."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from emu.switches import Fix
from emu.wire.messages import MessageType
from guestproc.current import Current
from guestproc.protocol import pending
from guestproc.vmbus import channel_mgmt
from guestproc.vmbus.channel import _open_on_host, vmbus_close, vmbus_close_internal
from guestproc.vmbus.requests import enter_request, taken_back
from tests.guestproc.vmbus.sub_callbacks import OPEN_SUB, add_subs
from tests.guestproc.world import World
from tests.tools.settled_world import findings

T = MessageType


def mistaken(world: World, **switches: Any) -> World:
    """The same guest, with these switches off."""
    fix = Fix(**switches)
    for current in (*world.currents, *world.workers.values()):
        setattr(current, "fix", fix)  # noqa: B010 (it is Final: chosen when a thread attaches)
    return world


def opener_that_waits(world: World) -> None:
    """Relid 9 is offered, and its probe waits for a host that does not answer the OPEN."""
    world.host.hold(T.OPENCHANNEL)
    world.host.device(9)
    world.settle()
    assert circles(world) == []


def circles(world: World) -> list[str]:
    """What INV-27 says of waits in a circle."""
    return [one.text for one in findings(world, 27) if one.text.endswith(": a cycle")]


def test_rescind_that_waits_for_the_probe_first(booted: World) -> None:
    """A5: the handler sleeps until the probe is over, which sleeps until the handler wakes it."""
    opener_that_waits(mistaken(booted, wake_before_probe_wait=False))
    booted.host.rescind(9)
    booted.settle()

    (text,) = circles(booted)
    assert "RESCIND waits for relid 9 to be handled" in text
    assert "PRI_CHAN waits for the answer to OPENCHANNEL of relid 9" in text


def test_rescind_on_the_queue_of_the_offers(booted: World) -> None:
    """A2: the rescind is queued behind the probe, whose worker waits for what only it would do."""
    opener_that_waits(mistaken(booted, rescind_own_queue=False))
    booted.host.rescind(9)
    booted.settle()

    (text,) = circles(booted)
    assert text.startswith("WORK waits for the answer to OPENCHANNEL of relid 9")


def test_probe_inside_the_offers_work(booted: World) -> None:
    """A3: a second offer is counted and waits behind the probe; the rescind waits for the count."""
    opener_that_waits(mistaken(booted, addchan_offload=False))
    booted.host.device(10)
    booted.settle()
    booted.host.rescind(9)
    booted.settle()

    (text,) = circles(booted)
    assert "RESCIND waits for offer_in_progress to fall to 0" in text
    assert "WORK waits for the answer to OPENCHANNEL of relid 9" in text


def test_right_guest_waits_in_no_circle(booted: World) -> None:
    """The same of a guest that makes no mistake: everything is released."""
    opener_that_waits(booted)
    booted.host.device(10)
    booted.settle()
    booted.host.rescind(9)
    booted.settle()

    assert circles(booted) == []
    assert booted.host.released == [9]


def test_no_second_look_at_the_flag(booted: World) -> None:
    """A4: who enlists behind the rescind's walk does not see that the channel was taken back."""
    booted.host.device(9)
    booted.settle()
    channel = booted.channel(9)
    channel.rescind.store(1)
    assert booted.call(lambda current: taken_back(current, channel))

    mistaken(booted, recheck_rescind_after_enlist=False)

    assert not booted.call(lambda current: taken_back(current, channel))


@pytest.mark.parametrize(("right", "waiting"), [(True, []), (False, [9])])
def test_rescind_that_says_nothing(booted: World, right: bool, waiting: list[int]) -> None:
    """A4, i: the opener's request is completed by its channel's rescind, or by nobody."""
    opener_that_waits(mistaken(booted, wake_on_rescind=right))
    booted.host.rescind(9)
    booted.settle()

    assert [one.relid for one in findings(booted, 27)] == waiting
    assert (booted.host.released == [9]) is right


def test_request_that_is_freed_on_the_list(booted: World) -> None:
    """A4, ii: the opener that sees the flag leaves a freed record behind, which the next walk meets (INV-13)."""
    booted.host.device(9)
    booted.settle()
    channel = booted.channel(9)
    channel.rescind.store(1)

    def opened(current: Current) -> int:
        return _open_on_host(current, channel, b"")

    assert booted.call(opened) == -errno.ENODEV
    assert pending.waiting_on(booted.tables, channel) == []

    mistaken(booted, unlink_before_free=False)

    assert booted.call(opened) == -errno.ENODEV
    with pytest.raises(AssertionError, match="stale, generation"):
        pending.waiting_on(booted.tables, channel)


@pytest.mark.parametrize(("right", "woken"), [(True, [1, 1, 0]), (False, [1, 0, 0])])
def test_two_who_wait_on_one_channel(booted: World, right: bool, woken: list[int]) -> None:
    """A4, iii: both are woken, or the first; who waits on another channel is left alone in any case."""
    for relid in (9, 10):
        booted.host.device(relid)
    booted.settle()
    mistaken(booted, wake_all_waiters=right)

    def done(current: Current) -> list[int]:
        waiting = [
            enter_request(current, msgtype, child_relid=relid, channel=booted.channel(relid).handle)
            for msgtype, relid in ((T.GPADL_HEADER, 9), (T.MODIFYCHANNEL, 9), (T.MODIFYCHANNEL, 10))
        ]
        channel_mgmt.vmbus_rescind_cleanup(current, booted.channel(9))
        return [int(request is not None and request.waitevent.done > 0) for request in waiting]

    assert booted.call(done) == woken


@pytest.mark.parametrize("right", [True, False])
def test_closer_that_holds_what_a_rescind_needs(booted: World, right: bool) -> None:
    """A5, second half: it waits for the sub-channel's rescind, which waits for its mutex; or has given that back."""
    booted.host.device(9)
    booted.settle()
    booted.channel(9).sc_creation_callback = OPEN_SUB
    (sub,) = add_subs(booted, 1)
    mistaken(booted, close_waits_unlocked=right)
    sub.rescind.store(1)
    task = booted.start(lambda current: vmbus_close(current, booted.channel(9)))
    booted.settle()
    assert not task.ended()
    booted.host.rescind(10)
    booted.settle()

    assert (task.ended(), booted.host.released == [10]) == (right, right)
    assert len(circles(booted)) == (0 if right else 1)


def test_channel_that_two_rescinds_find(booted: World) -> None:
    """A6: without the claim each of them has it; with it the second one leaves."""
    booted.host.device(9)
    booted.settle()
    mistaken(booted, rescind_once=False)
    found = [booted.call(lambda current: channel_mgmt._claim(current, 9)) for _ in range(2)]
    assert found == [booted.channel(9)] * 2

    mistaken(booted)

    found = [booted.call(lambda current: channel_mgmt._claim(current, 9)) for _ in range(2)]
    assert found == [booted.channel(9), None]


@pytest.mark.parametrize(
    ("wrong", "deaf"),
    [
        ({}, []),
        ({"enable_on_all_paths": False, "variant": "per_channel"}, [9]),
        ({"enable_on_all_paths": False, "variant": "per_vcpu"}, [9, 10]),
    ],
)
def test_close_of_a_channel_that_is_not_open(booted: World, wrong: dict[str, Any], deaf: list[int]) -> None:
    """C3: whoever returns early and enables nothing leaves one tasklet disabled, or those of a whole processor."""
    for relid in (9, 10):
        booted.host.device(relid)
    booted.settle()
    mistaken(booted, **wrong)
    handle = booted.channel(9).handle
    booted.call(lambda current: current.channel(handle).target_cpu.store(booted.channel(10).target_cpu.load()))

    def close(current: Current) -> tuple[int, int]:
        channel = current.channel(handle)
        with current.connection.channel_mutex.hold(current.actor):
            return vmbus_close_internal(current, channel), vmbus_close_internal(current, channel)

    assert booted.call(close) == (0, -errno.EINVAL)
    assert [one.relid for one in findings(booted, 18)] == deaf
